"""Seeds and magnitude -> images after RandAugment: one by one in memory, or a batch on its device.

OPERATIONS is the table of what can be done to an image; a new row is drawn from then on.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from training.batches import batch_operations as device
from training.batches import image_operations as host
from training.batches.image_operations import Pixels

# From this size on, pixels of translation and cutout are Google's; below they shrink with the
# image: theirs would push a picture of 64 pixels out of itself.
FULL_SIZE = 224

# int(0.4 * magnitude) bits are kept; below, no bit would be left and the image be black.
MIN_POSTERIZE_MAGNITUDE = 2.5


@dataclass(frozen=True)
class Operation:
    """A row of the table."""

    name: str
    on_host: Callable[..., Pixels]
    """Of uint8 RGB [size, size, 3], then the amount, if there is one."""
    on_device: Callable[..., Tensor]
    """The same of uint8 [N, 3, size, size]."""
    amount: Callable[[float, int], float] | None = None
    """Of a magnitude (0..30, where 10 is the original full scale) and a size in pixels."""
    is_signed: bool = False
    """Half of the amounts are negative."""
    is_placed: bool = False
    """Both take a place as well: x and y, 0..1, on the host; int64 [2, N] on the device."""

    def amounts(self, magnitude: float, size: int, sign: int) -> tuple[float, ...]:
        """Return the amount, or nothing."""
        return () if self.amount is None else (sign * self.amount(magnitude, size),)


def _factor(magnitude: float, _size: int) -> float:
    return 0.1 + 0.18 * magnitude  # 1 changes nothing


def _shear(magnitude: float, _size: int) -> float:
    return 0.03 * magnitude


def _shift(magnitude: float, size: int) -> int:
    return round(10 * magnitude * min(1.0, size / FULL_SIZE))


def _radius(magnitude: float, size: int) -> int:
    return round(4 * magnitude * min(1.0, size / FULL_SIZE))


def _bits(magnitude: float, _size: int) -> int:
    return min(int(0.4 * max(magnitude, MIN_POSTERIZE_MAGNITUDE)), 8)


def _by_matrix(
    matrix: Callable[[float, int], host.Matrix],
) -> tuple[Callable[..., Pixels], Callable[..., Tensor]]:
    return (
        lambda pixels, amount: host.warp(pixels, matrix(amount, len(pixels))),
        lambda images, amount: device.warp(images, matrix(amount, images.shape[-1])),
    )


def _along(axis: int) -> tuple[Callable[..., Pixels], Callable[..., Tensor]]:
    # Of [H, W, 3] on the host, [N, 3, H, W] on the device.
    return partial(host.translate, axis=axis), partial(device.translate, axis=axis + 2)


# In the order and with the amounts of google/automl, efficientnetv2/autoaugment.py,
# distort_image_with_randaugment; what a seed draws depends on the order.
OPERATIONS = (
    Operation("AutoContrast", host.auto_contrast, device.auto_contrast),
    Operation("Equalize", host.equalize, functional.equalize),
    Operation("Invert", host.invert, functional.invert),
    Operation("Rotate", *_by_matrix(host.rotation_matrix), lambda m, _: 3 * m, is_signed=True),
    Operation("Posterize", host.posterize, functional.posterize, _bits),
    Operation("Solarize", host.solarize, device.solarize, lambda m, _: min(int(25.6 * m), 256)),
    Operation("Color", host.color, device.color, _factor),
    Operation("Contrast", host.contrast, functional.adjust_contrast, _factor),
    Operation("Brightness", host.brightness, functional.adjust_brightness, _factor),
    Operation("Sharpness", host.sharpness, device.sharpness, _factor),
    Operation("ShearX", *_by_matrix(host.x_shear_matrix), _shear, is_signed=True),
    Operation("ShearY", *_by_matrix(host.y_shear_matrix), _shear, is_signed=True),
    Operation("TranslateX", *_along(1), _shift, is_signed=True),
    Operation("TranslateY", *_along(0), _shift, is_signed=True),
    Operation("Cutout", host.cut_out, device.cut_out, _radius, is_placed=True),
    Operation("SolarizeAdd", host.solarize_add, device.solarize_add, lambda m, _: int(11 * m)),
)
BY_NAME = {operation.name: operation for operation in OPERATIONS}


class Draw(NamedTuple):
    """An operation for an image and its random numbers, of which it may use none."""

    name: str
    sign: int
    """1 or -1; of operations that have no direction always 1."""
    x: float
    """Where Cutout's square has its centre, 0..1 of the width; `y` of the height."""
    y: float

    def on_host(self, pixels: Pixels, magnitude: float) -> Pixels:
        """Apply it to uint8 RGB [size, size, 3]."""
        row = BY_NAME[self.name]
        amounts = row.amounts(magnitude, len(pixels), self.sign)
        return row.on_host(pixels, *amounts, *((self.x, self.y) if row.is_placed else ()))

    def on_device(self, images: Tensor, magnitude: float, centres: Tensor) -> Tensor:
        """Apply it to uint8 [N, 3, size, size], each with its own centre: column, row [2, N]."""
        row = BY_NAME[self.name]
        amounts = row.amounts(magnitude, images.shape[-1], self.sign)
        return row.on_device(images, *amounts, *((centres,) if row.is_placed else ()))


def draw_operations(seed: int, num_layers: int) -> list[Draw]:
    """Choose an image's operations: each row equally likely, repetitions allowed."""
    rng = random.Random(f"randaugment {seed}")
    drawn: list[Draw] = []
    for _ in range(num_layers):
        row = OPERATIONS[int(rng.random() * len(OPERATIONS))]
        is_reversed = rng.random() < 0.5 and row.is_signed
        drawn.append(Draw(row.name, -1 if is_reversed else 1, rng.random(), rng.random()))
    return drawn


class RandAugment:
    """Operations of Cubuk et al. 2020 in Google's version, on square images in memory.

    timm has them on Pillow, which holds the loader back. Mean of the operations at magnitude 10, ms
    on one core, timm's (bilinear) / these: 128 px 0.19 / 0.04, 224 px 0.52 / 0.08, 300 px
    0.87 / 0.15; rotation at 300 px 2.2 / 0.34, where decoding a photo of 500 x 375 takes 1.3.

    Contrast is about the mean of the picture as in Pillow; Google's is about a constant, by a
    mistake in taking the mean.
    """

    def __init__(self, magnitude: float, num_layers: int) -> None:
        self._magnitude = magnitude
        self._num_layers = num_layers

    def __call__(self, pixels: Pixels, seed: int) -> Pixels:
        """Apply the operations of a seed to uint8 RGB [size, size, 3]."""
        for drawn in draw_operations(seed, self._num_layers):
            pixels = drawn.on_host(pixels, self._magnitude)
        return pixels


class BatchRandAugment:
    """RandAugment on whole batches of square images, with what RandAugment draws for the seeds.

    Images with the same operation are computed together: at most 21 groups in a layer, whatever the
    size of the batch. Nothing waits for the device: which image gets what is found on the CPU and
    uploaded once. An image's result does not depend on the others of its batch.
    """

    def __init__(self, magnitude: float, num_layers: int) -> None:
        self._magnitude = magnitude
        self._num_layers = num_layers

    def __call__(self, images: Tensor, seeds: Sequence[int] | Tensor) -> Tensor:
        """Augment uint8 [N, 3, H, H] on its device, in its memory format."""
        seeds = seeds.tolist() if isinstance(seeds, Tensor) else seeds
        layers = list(
            zip(*(draw_operations(seed, self._num_layers) for seed in seeds), strict=True)
        )
        # Images are sorted by operation, layer after layer, and put back in order at the end.
        sorted_layers: list[list[Draw]] = []
        table: list[list[int]] = []
        places = list(range(len(seeds)))
        for drawn in layers:
            order = sorted(range(len(seeds)), key=lambda i, drawn=drawn: drawn[i][:2])
            position = {image: place for place, image in enumerate(places)}
            table.append([position[image] for image in order])
            sorted_layers.append([drawn[image] for image in order])
            places = order
        table.append(sorted(range(len(seeds)), key=places.__getitem__))
        size = images.shape[-1]
        for drawn in sorted_layers:
            table.append([int(one.x * size) for one in drawn])
            table.append([int(one.y * size) for one in drawn])
        uploaded = _upload(table, images.device)
        indices, centres = uploaded[: len(layers) + 1], uploaded[len(layers) + 1 :]
        memory_format = torch.contiguous_format
        if images.is_contiguous(memory_format=torch.channels_last):
            memory_format = torch.channels_last
        for number, drawn in enumerate(sorted_layers):
            images = images.index_select(0, indices[number])
            parts: list[Tensor] = []
            for start, stop in _runs(drawn):
                where = centres[2 * number : 2 * number + 2, start:stop]
                parts.append(drawn[start].on_device(images[start:stop], self._magnitude, where))
            images = torch.cat(parts) if parts else images
        return images.index_select(0, indices[-1]).contiguous(memory_format=memory_format)


def _runs(drawn: Sequence[Draw]) -> list[tuple[int, int]]:
    """List first and end of each stretch of the same operation and sign."""
    groups = [one[:2] for one in drawn]
    starts = [i for i in range(len(groups)) if i == 0 or groups[i] != groups[i - 1]]
    return list(zip(starts, [*starts[1:], len(groups)], strict=True))


def _upload(rows: list[list[int]], device: torch.device) -> Tensor:
    table = torch.tensor(rows)
    # A copy from memory that is not pinned waits until the device has nothing else to do.
    if device.type == "cuda":
        table = table.pin_memory()
    return table.to(device, non_blocking=True)
