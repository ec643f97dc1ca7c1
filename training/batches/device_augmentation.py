"""uint8 batch and seeds -> the batch after RandAugment, computed on the batch's device.

Chooses for each seed what training.batches.randaugment chooses in the worker processes. Images with
the same operation are computed together: at most 21 groups in a layer, whatever the size of the
batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample
from torchvision.transforms.v2 import functional

from training.batches.image_operations import GRAY
from training.batches.randaugment import OPERATIONS, Operation, Strength, draw_operations


class BatchRandAugment:
    """RandAugment on whole batches of square images; see training.batches.randaugment.RandAugment.

    Nothing waits for the device: which image gets what is found on the CPU and uploaded once. An
    image's result does not depend on the others of its batch.
    """

    def __init__(self, magnitude: float, num_layers: int) -> None:
        self._magnitude = magnitude
        self._num_layers = num_layers

    def __call__(self, images: Tensor, seeds: Sequence[int] | Tensor) -> Tensor:
        """Return the augmented images.

        Args:
            images: uint8 [N, 3, H, H] on any device.
            seeds: of each image, on the CPU.

        Returns:
            uint8 [N, 3, H, H] on the same device, in the memory format of `images`.
        """
        strength = Strength(self._magnitude, images.shape[-1])
        seeds = seeds.tolist() if isinstance(seeds, Tensor) else seeds
        layers = list(
            zip(*(draw_operations(seed, self._num_layers) for seed in seeds), strict=True)
        )
        # Images are sorted by operation, layer after layer, and put back in order at the end.
        sorted_layers: list[list[Operation]] = []
        table: list[list[int]] = []
        places = list(range(len(seeds)))
        for operations in layers:
            order = sorted(range(len(seeds)), key=lambda i, drawn=operations: _group(drawn[i]))
            position = {image: place for place, image in enumerate(places)}
            table.append([position[image] for image in order])
            sorted_layers.append([operations[image] for image in order])
            places = order
        table.append(sorted(range(len(seeds)), key=places.__getitem__))
        size = images.shape[-1]
        for operations in sorted_layers:
            table.append([int(operation.x * size) for operation in operations])
            table.append([int(operation.y * size) for operation in operations])
        uploaded = _upload(table, images.device)
        indices, centres = uploaded[: len(layers) + 1], uploaded[len(layers) + 1 :]
        memory_format = torch.contiguous_format
        if images.is_contiguous(memory_format=torch.channels_last):
            memory_format = torch.channels_last
        for number, operations in enumerate(sorted_layers):
            images = images.index_select(0, indices[number])
            parts: list[Tensor] = []
            for start, stop in _runs(operations):
                where = centres[2 * number : 2 * number + 2, start:stop]
                parts.append(apply(images[start:stop], operations[start], strength, where))
            images = torch.cat(parts) if parts else images
        return images.index_select(0, indices[-1]).contiguous(memory_format=memory_format)


def apply(images: Tensor, operation: Operation, strength: Strength, centres: Tensor) -> Tensor:
    """Return the result of one operation on uint8 [N, 3, H, H].

    Args:
        images: not changed.
        operation: name and sign hold for all images.
        strength: for images of this size.
        centres: int64 [2, N], column and row of each image's own Cutout.
    """
    name, factor = operation.name, strength.factor
    if name == "AutoContrast":
        return _auto_contrast(images)
    if name == "Equalize":
        return functional.equalize(images)
    if name == "Invert":
        return functional.invert(images)
    if name == "Posterize":
        return functional.posterize(images, strength.posterize_bits)
    if name == "Solarize":
        # Not images < threshold: 256 would become 0.
        return images.where(images <= strength.solarize_threshold - 1, 255 - images)
    if name == "SolarizeAdd":
        added = (images.to(torch.int16) + strength.solarize_addition).clamp_(max=255)
        return images.where(images >= 128, added.to(torch.uint8))
    if name == "Color":
        return _color(images, factor)
    if name == "Contrast":
        return functional.adjust_contrast(images, factor)
    if name == "Brightness":
        return functional.adjust_brightness(images, factor)
    if name == "Sharpness":
        return _sharpness(images, factor)
    if name in ("TranslateX", "TranslateY"):
        shift = operation.sign * strength.translation
        return _translate(images, shift, 3 if name == "TranslateX" else 2)
    if name == "Cutout":
        return _cut_out(images, centres, strength.cutout_radius)
    return _warp(images, strength.source_matrix(operation))


def _group(operation: Operation) -> tuple[int, int]:
    return OPERATIONS.index(operation.name), operation.sign


def _runs(operations: Sequence[Operation]) -> list[tuple[int, int]]:
    """List first and end of each stretch of the same group."""
    groups = [_group(operation) for operation in operations]
    starts = [i for i in range(len(groups)) if i == 0 or groups[i] != groups[i - 1]]
    return list(zip(starts, [*starts[1:], len(groups)], strict=True))


def _upload(rows: list[list[int]], device: torch.device) -> Tensor:
    table = torch.tensor(rows)
    # A copy from memory that is not pinned waits until the device has nothing else to do.
    if device.type == "cuda":
        table = table.pin_memory()
    return table.to(device, non_blocking=True)


def _auto_contrast(images: Tensor) -> Tensor:
    # torchvision's assigns through a mask; and a truncated quotient may be one count less here.
    values = images.float()
    low, high = values.amin((2, 3), keepdim=True), values.amax((2, 3), keepdim=True)
    stretched = (values - low) * 255 / (high - low).clamp_(min=1)
    return torch.where(high > low, stretched, values).to(torch.uint8)


def _color(images: Tensor, factor: float) -> Tensor:
    # torchvision's rounds gray down, of which a large factor makes several counts.
    values = images.float()
    red, green, blue = values.unbind(1)
    gray = (0.299 * red + 0.587 * green + 0.114 * blue).round_()[:, None]
    return _to_uint8(gray + factor * (values - gray))


def _sharpness(images: Tensor, factor: float) -> Tensor:
    # torchvision's uploads its kernel in each call, for which it waits for the device.
    values = images.float()
    middle = values[..., 1:-1, 1:-1]
    mean = avg_pool2d(values, 3, stride=1).round_()
    result = images.clone()
    result[..., 1:-1, 1:-1] = _to_uint8(
        (factor + (1 - factor) * 4 / 13) * middle + (1 - factor) * 9 / 13 * mean
    )
    return result


def _translate(images: Tensor, shift: int, axis: int) -> Tensor:
    length = images.shape[axis]
    kept = max(length - abs(shift), 0)
    result = torch.full_like(images, GRAY)
    source = images.narrow(axis, min(max(shift, 0), length), kept)
    result.narrow(axis, min(max(-shift, 0), length), kept).copy_(source)
    return result


def _cut_out(images: Tensor, centres: Tensor, radius: int) -> Tensor:
    positions = torch.arange(images.shape[-1], device=images.device)
    offsets = positions - centres[..., None]  # [2, N, H]
    columns, rows = (offsets >= -radius) & (offsets < radius)
    return images.masked_fill((columns[:, None, :] & rows[:, :, None])[:, None], GRAY)


def _warp(images: Tensor, matrix: tuple[tuple[float, float, float], ...]) -> Tensor:
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
