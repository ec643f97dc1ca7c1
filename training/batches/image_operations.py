"""Pixels of an image -> pixels after one operation: lookup, warp, contrast, sharpness, Cutout."""

import math
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

GRAY = 128

Pixels = NDArray[np.uint8]
"""RGB [H, W, 3]."""

Matrix = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Two rows that map x, y and 1 of an output pixel to x and y in the input; whole numbers are
pixels' centres."""


def rotation_matrix(degrees: float, size: int) -> Matrix:
    """Turn about the image's centre, as in Pillow."""
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    centre = (size - 1) / 2
    return (cos, -sin, centre * (1 - cos + sin)), (sin, cos, centre * (1 - cos - sin))


def x_shear_matrix(amount: float, _size: int) -> Matrix:
    """Keep the upper edge, as in Pillow."""
    return (1, amount, amount / 2), (0, 1, 0)


def y_shear_matrix(amount: float, _size: int) -> Matrix:
    """Keep the left edge, as in Pillow."""
    return (1, 0, 0), (amount, 1, amount / 2)


def cut_out(pixels: Pixels, radius: int, x: float, y: float) -> Pixels:
    """Lay a gray square over a copy of an image (DeVries and Taylor 2017).

    The radius is half of its side; x and y, 0..1 of width and height, are its centre.
    """
    height, width = pixels.shape[:2]
    column, row = int(x * width), int(y * height)
    result = pixels.copy()
    result[max(row - radius, 0) : row + radius, max(column - radius, 0) : column + radius] = GRAY
    return result


def look_up(pixels: Pixels, table: NDArray[np.uint8]) -> Pixels:
    """Replace each value by the table's: uint8 [256], or [1, 256, 3] by channel."""
    return as_pixels(cv2.LUT(pixels, table))


def invert(pixels: Pixels) -> Pixels:
    """Replace each value by what is left of it to 255."""
    return 255 - pixels


def posterize(pixels: Pixels, bits: int) -> Pixels:
    """Keep the highest bits of each value."""
    return pixels & np.uint8(0xFF << (8 - bits) & 0xFF)


def solarize(pixels: Pixels, threshold: int) -> Pixels:
    """Invert the values from a threshold on."""
    return look_up(pixels, _solarizing_table(threshold))


def solarize_add(pixels: Pixels, addition: int) -> Pixels:
    """Add to the dark half of the values."""
    return look_up(pixels, _adding_table(addition))


def brightness(pixels: Pixels, factor: float) -> Pixels:
    """Move away from black by a factor; 1 changes nothing."""
    return look_up(pixels, _contrast_table(0, factor))


def warp(pixels: Pixels, matrix: Matrix) -> Pixels:
    """Move pixels by a matrix; gray where one would come from outside."""
    # Four channels take half the time of three, to which OpenCV's vector code does not apply.
    four = cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA)
    warped = cv2.warpAffine(
        four,
        np.array(matrix, np.float32),
        pixels.shape[1::-1],
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(GRAY,) * 4,
    )
    return as_pixels(cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB))


def translate(pixels: Pixels, shift: int, axis: int) -> Pixels:
    """Move an image towards the beginning of an axis, if `shift` is negative to its end."""
    result = np.full_like(pixels, GRAY)
    old, new = np.moveaxis(pixels, axis, 0), np.moveaxis(result, axis, 0)
    if shift >= 0:
        new[: max(len(old) - shift, 0)] = old[shift:]
    else:
        new[-shift:] = old[:shift]
    return result


def auto_contrast(pixels: Pixels) -> Pixels:
    """Stretch each channel from its smallest and largest value to 0 and 255."""
    # By whole rows first: numpy's own minimum over two axes of three takes 50 times as long.
    rows = pixels.reshape(len(pixels), -1)
    low, high = (
        reduce(reduce(rows, axis=0).reshape(-1, 3), axis=0).astype(np.float64)
        for reduce in (np.minimum.reduce, np.maximum.reduce)
    )
    values = np.arange(256)[:, None]
    scale = 255.0 / np.maximum(high - low, 1)
    table = np.where(high > low, values * scale - low * scale, values)
    return look_up(pixels, table.clip(0, 255).astype(np.uint8)[None])


def equalize(pixels: Pixels) -> Pixels:
    """Give all values of a channel the same share of the pixels."""
    table = np.empty((1, 256, 3), np.uint8)
    for channel in range(3):
        histogram = cv2.calcHist([pixels], [channel], None, [256], [0, 256])
        table[0, :, channel] = _equalizing_table(histogram.ravel().astype(np.int64))
    return look_up(pixels, table)


def color(pixels: Pixels, factor: float) -> Pixels:
    """Move away from gray by a factor; 1 changes nothing."""
    gray = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return as_pixels(cv2.addWeighted(pixels, factor, gray, 1 - factor, 0))


def contrast(pixels: Pixels, factor: float) -> Pixels:
    """Move away from the mean brightness by a factor; 1 changes nothing."""
    level = int(cv2.mean(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return look_up(pixels, _contrast_table(level, factor))


def sharpness(pixels: Pixels, factor: float) -> Pixels:
    """Move away from the smoothed picture by a factor; 1 changes nothing."""
    # Away from the mean of the nine with five-fold weight of the middle; the edge stays as it is.
    mean = cv2.blur(pixels, (3, 3))
    middle, nine = factor + (1 - factor) * 4 / 13, (1 - factor) * 9 / 13
    result = as_pixels(cv2.addWeighted(pixels, middle, mean, nine, 0))
    for edge in (0, -1):
        result[edge], result[:, edge] = pixels[edge], pixels[:, edge]
    return result


def as_pixels(pixels: object) -> Pixels:
    """Give what OpenCV returns its type, of which its annotations leave the dtype open."""
    return np.asarray(pixels, dtype=np.uint8)


@cache
def _contrast_table(level: int, factor: float) -> Pixels:
    values = np.arange(256, dtype=np.float32)
    return (level + np.float32(factor) * (values - level)).clip(0, 255).astype(np.uint8)


@cache
def _solarizing_table(threshold: int) -> Pixels:
    values = np.arange(256)
    return np.where(values < threshold, values, 255 - values).astype(np.uint8)


@cache
def _adding_table(addition: int) -> Pixels:
    values = np.arange(256)
    return np.where(values < 128, np.minimum(values + addition, 255), values).astype(np.uint8)


def _equalizing_table(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    # Pillow's, which the papers used.
    most = counts[np.flatnonzero(counts)[-1]]
    step = (counts.sum() - most) // 255
    if step == 0:
        return np.arange(256)
    return np.minimum((step // 2 + counts.cumsum() - counts) // step, 255)
