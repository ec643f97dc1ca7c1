"""Images of a batch on its device -> images after one operation: see image_operations.py.

torchvision's where they are the same and do not wait for the device.
"""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample

from training.batches.image_operations import GRAY, Matrix


def auto_contrast(images: Tensor) -> Tensor:
    """Stretch each channel from its smallest and largest value to 0 and 255."""
    # torchvision's assigns through a mask; and a truncated quotient may be one count less here.
    values = images.float()
    low, high = values.amin((2, 3), keepdim=True), values.amax((2, 3), keepdim=True)
    stretched = (values - low) * 255 / (high - low).clamp_(min=1)
    return torch.where(high > low, stretched, values).to(torch.uint8)


def solarize(images: Tensor, threshold: int) -> Tensor:
    """Invert the values from a threshold on."""
    # Not images < threshold: 256 would become 0.
    return images.where(images <= threshold - 1, 255 - images)


def color(images: Tensor, factor: float) -> Tensor:
    """Move away from gray by a factor; 1 changes nothing."""
    # torchvision's rounds gray down, of which a large factor makes several counts.
    values = images.float()
    red, green, blue = values.unbind(1)
    gray = (0.299 * red + 0.587 * green + 0.114 * blue).round_()[:, None]
    return _to_uint8(gray + factor * (values - gray))


def sharpness(images: Tensor, factor: float) -> Tensor:
    """Move away from the smoothed picture by a factor; 1 changes nothing."""
    # torchvision's uploads its kernel in each call, for which it waits for the device.
    values = images.float()
    middle = values[..., 1:-1, 1:-1]
    mean = avg_pool2d(values, 3, stride=1).round_()
    result = images.clone()
    result[..., 1:-1, 1:-1] = _to_uint8(
        (factor + (1 - factor) * 4 / 13) * middle + (1 - factor) * 9 / 13 * mean
    )
    return result


def cut_out(images: Tensor, radius: int, centres: Tensor) -> Tensor:
    """Lay a gray square over each image, about its own column and row of int64 [2, N]."""
    positions = torch.arange(images.shape[-1], device=images.device)
    offsets = positions - centres[..., None]  # [2, N, H]
    columns, rows = (offsets >= -radius) & (offsets < radius)
    return images.masked_fill((columns[:, None, :] & rows[:, :, None])[:, None], GRAY)


def solarize_add(images: Tensor, addition: int) -> Tensor:
    """Add to the dark half of the values."""
    added = (images.to(torch.int16) + addition).clamp_(max=255)
    return images.where(images >= 128, added.to(torch.uint8))


def translate(images: Tensor, shift: int, axis: int) -> Tensor:
    """Move images towards the beginning of an axis, if `shift` is negative to its end."""
    length = images.shape[axis]
    kept = max(length - abs(shift), 0)
    result = torch.full_like(images, GRAY)
    source = images.narrow(axis, min(max(shift, 0), length), kept)
    result.narrow(axis, min(max(-shift, 0), length), kept).copy_(source)
    return result


def warp(images: Tensor, matrix: Matrix) -> Tensor:
    """Move pixels by a matrix; gray where one would come from outside."""
    size = images.shape[-1]
    x = torch.arange(size, device=images.device, dtype=torch.float32)
    y = x[:, None]
    # From pixels, whole numbers at their centres, to -1..1 between the image's edges.
    grid = torch.stack([(a * x + b * y + c + 0.5) * (2 / size) - 1 for a, b, c in matrix], dim=-1)
    # Outside the image zeros are read, so gray is to be zero.
    warped = grid_sample(
        images.float() - GRAY, grid.expand(len(images), -1, -1, -1), align_corners=False
    )
    return _to_uint8(warped + GRAY)


def _to_uint8(values: Tensor) -> Tensor:
    return values.round_().clamp_(0, 255).to(torch.uint8)
