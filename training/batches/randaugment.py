"""Seed and magnitude -> an image's operations of RandAugment, and its pixels after them."""

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from training.batches.image_operations import (
    Pixels,
    auto_contrast,
    color,
    contrast,
    contrast_table,
    cut_out,
    equalize,
    look_up,
    sharpness,
    translate,
    warp,
)

# In the order of google/automl, efficientnetv2/autoaugment.py, distort_image_with_randaugment.
OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Cutout",
    "SolarizeAdd",
)

SIGNED_OPERATIONS = frozenset({"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"})

# From this size on, pixels of translation and cutout are Google's; below they shrink with the
# image: theirs would push a picture of 64 pixels out of itself.
FULL_SIZE = 224

# int(0.4 * magnitude) bits are kept.
MIN_POSTERIZE_MAGNITUDE = 2.5

_BLENDS: dict[str, Callable[[Pixels, float], Pixels]] = {
    "Color": color,
    "Contrast": contrast,
    "Sharpness": sharpness,
}

_STRETCHES: dict[str, Callable[[Pixels], Pixels]] = {
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
}


class Operation(NamedTuple):
    """One operation of RandAugment and its random numbers, of which it may use none."""

    name: str
    sign: int
    """1 or -1; of operations that have no direction always 1."""
    x: float
    """Where Cutout's square has its centre, 0..1 of the width; `y` of the height."""
    y: float


def draw_operations(seed: int, num_layers: int) -> list[Operation]:
    """Choose an image's operations: each of the 16 equally likely, repetitions allowed."""
    rng = random.Random(f"randaugment {seed}")
    operations: list[Operation] = []
    for _ in range(num_layers):
        name = OPERATIONS[int(rng.random() * len(OPERATIONS))]
        is_reversed = rng.random() < 0.5 and name in SIGNED_OPERATIONS
        operations.append(Operation(name, -1 if is_reversed else 1, rng.random(), rng.random()))
    return operations


class Strength:
    """What a magnitude means for each operation on square images of one size.

    As in Google's code, where 10 is the original full scale. At least one bit is kept by Posterize,
    which there leaves a black image below 2.5.
    """

    def __init__(self, magnitude: float, image_size: int) -> None:
        self.image_size = image_size
        self.degrees = 3 * magnitude
        self.shear = 0.03 * magnitude
        self.factor = 0.1 + 0.18 * magnitude
        """Of Color, Contrast, Brightness and Sharpness; 1 changes nothing."""
        self.posterize_bits = min(int(0.4 * max(magnitude, MIN_POSTERIZE_MAGNITUDE)), 8)
        self.solarize_threshold = min(int(25.6 * magnitude), 256)
        self.solarize_addition = int(11 * magnitude)
        part = min(1.0, image_size / FULL_SIZE)
        self.translation = round(10 * magnitude * part)
        """Pixels."""
        self.cutout_radius = round(4 * magnitude * part)
        """Half of the square's side, pixels."""

    def source_matrix(self, operation: Operation) -> tuple[tuple[float, float, float], ...]:
        """Return two rows that map x, y and 1 of an output pixel to x and y in the input.

        Rotation is about the image's centre, shear keeps the upper or left edge, as in Pillow.
        Whole numbers are pixels' centres.
        """
        amount = operation.sign * self.shear
        if operation.name == "ShearX":
            return (1, amount, amount / 2), (0, 1, 0)
        if operation.name == "ShearY":
            return (1, 0, 0), (amount, 1, amount / 2)
        angle = math.radians(operation.sign * self.degrees)
        cos, sin = math.cos(angle), math.sin(angle)
        centre = (self.image_size - 1) / 2
        return (
            (cos, -sin, centre * (1 - cos + sin)),
            (sin, cos, centre * (1 - cos - sin)),
        )


class RandAugment:
    """Operations of Cubuk et al. 2020 in Google's version, on square images in memory.

    timm has them on Pillow, which holds the loader back. Mean of the operations at magnitude 10, ms
    on one core, timm's (bilinear) / these: 128 px 0.19 / 0.04, 224 px 0.52 / 0.08, 300 px
    0.87 / 0.15; rotation at 300 px 2.2 / 0.34, where decoding a photo of 500 x 375 takes 1.3.

    Contrast is about the mean of the picture as in Pillow; Google's is about a constant, by a
    mistake in taking the mean.
    """

    def __init__(self, magnitude: float, num_layers: int, image_size: int) -> None:
        self._num_layers = num_layers
        self._strength = strength = Strength(magnitude, image_size)
        values = np.arange(256)
        threshold, addition = strength.solarize_threshold, strength.solarize_addition
        self._tables = {
            "Invert": 255 - values,
            "Posterize": values & (0xFF << (8 - strength.posterize_bits)),
            "Solarize": np.where(values < threshold, values, 255 - values),
            "SolarizeAdd": np.where(values < 128, np.minimum(values + addition, 255), values),
            "Brightness": contrast_table(0, strength.factor),
        }
        self._tables = {name: table.astype(np.uint8) for name, table in self._tables.items()}

    def __call__(self, pixels: Pixels, seed: int) -> Pixels:
        """Apply the operations of a seed to uint8 RGB [size, size, 3]."""
        for operation in draw_operations(seed, self._num_layers):
            pixels = self.apply(pixels, operation)
        return pixels

    def apply(self, pixels: Pixels, operation: Operation) -> Pixels:
        """Return the result of one operation."""
        name, strength = operation.name, self._strength
        if name in self._tables:
            return look_up(pixels, self._tables[name])
        if name in ("TranslateX", "TranslateY"):
            return translate(pixels, operation.sign * strength.translation, name == "TranslateX")
        if name in SIGNED_OPERATIONS:
            return warp(pixels, np.array(strength.source_matrix(operation), np.float32))
        if name == "Cutout":
            return cut_out(pixels, operation.x, operation.y, strength.cutout_radius)
        if name in _BLENDS:
            return _BLENDS[name](pixels, strength.factor)
        return _STRETCHES[name](pixels)
