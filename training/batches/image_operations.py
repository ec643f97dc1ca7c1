"""Pixels of an image -> pixels after one operation: lookup, warp, contrast, sharpness, Cutout."""

import cv2
import numpy as np
from numpy.typing import NDArray

GRAY = 128

Pixels = NDArray[np.uint8]
"""RGB [H, W, 3]."""


def cut_out(pixels: Pixels, x: float, y: float, radius: int) -> Pixels:
    """Lay a gray square over a copy of an image (DeVries and Taylor 2017).

    Args:
        pixels: uint8 [H, W, 3].
        x: the square's centre, 0..1 of the width; parts of it may lie outside.
        y: the same of the height.
        radius: half of the square's side, pixels.
    """
    height, width = pixels.shape[:2]
    column, row = int(x * width), int(y * height)
    result = pixels.copy()
    result[max(row - radius, 0) : row + radius, max(column - radius, 0) : column + radius] = GRAY
    return result


def look_up(pixels: Pixels, table: NDArray[np.uint8]) -> Pixels:
    """Replace each value by the table's: uint8 [256], or [1, 256, 3] by channel."""
    return as_pixels(cv2.LUT(pixels, table))


def warp(pixels: Pixels, matrix: NDArray[np.float32]) -> Pixels:
    """Fetch each pixel from where a matrix [2, 3] maps it to; gray where that is outside."""
    # Four channels take half the time of three, to which OpenCV's vector code does not apply.
    four = cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA)
    warped = cv2.warpAffine(
        four,
        matrix,
        pixels.shape[1::-1],
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(GRAY,) * 4,
    )
    return as_pixels(cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB))


def translate(pixels: Pixels, shift: int, is_horizontal: bool) -> Pixels:
    """Move an image to the left or up by `shift`, if that is negative the other way."""
    result = np.full_like(pixels, GRAY)
    axis = 1 if is_horizontal else 0
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
    return look_up(pixels, contrast_table(level, factor).astype(np.uint8))


def contrast_table(level: int, factor: float) -> NDArray[np.float32]:
    """Return [256] values moved away from a level by a factor, 0..255."""
    values = np.arange(256, dtype=np.float32)
    return (level + np.float32(factor) * (values - level)).clip(0, 255)


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


def _equalizing_table(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    # Pillow's, which the papers used.
    most = counts[np.flatnonzero(counts)[-1]]
    step = (counts.sum() - most) // 255
    if step == 0:
        return np.arange(256)
    return np.minimum((step // 2 + counts.cumsum() - counts) // step, 255)
