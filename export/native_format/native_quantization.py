"""Weights and ranges of one layer -> the integers that the native engine computes with.

docs/native.md says what they mean. Everything here is decided in float64 and rounded once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

WEIGHT_LEVELS = 127
MAP_LEVELS = 255

# int16, and the products of mulhrs take no -32768.
LARGEST_16 = 32767
UNITS_16 = 32768

# Pieces of an activation's table, and x values in each.
NUM_PIECES, PIECE = 64, 1024

# SiLU of less is above -0.003.
LEAST_FULL_RANGE = 8.0

MOST_FRACTION_BITS = 7
# Without a table the values before the residual is added may be twice as large as after.
MOST_LINEAR_FRACTION_BITS = 6

# A bias may be half as large as int32 holds: the sums of products are added to it.
LARGEST_BIAS = 2.0**30
LARGEST_SUM = 2.0**31

# Far below what any map or weight is rounded by, and a normal float32.
LEAST_SCALE = 1e-10

# Squeeze-excite shifts a map left by 6 bits at most.
MOST_SHIFT = 6


@dataclass(frozen=True)
class MapScale:
    """Real value = scale * (q - zero_point), q = 0..255."""

    scale: float
    zero_point: int


@dataclass(frozen=True)
class QuantizedWeights:
    """Weights of a convolution, quantized for each output channel."""

    weights: NDArray[np.int8]
    """As they came: [N, C, k, k]."""
    scales: Array
    """[N]; of the weights alone."""
    bias: NDArray[np.int32]
    """With the input's zero point taken off."""


@dataclass(frozen=True)
class Ending:
    """What makes a map's byte of the 16 bits after a convolution."""

    fraction_bits: int
    output_offset: int = 0
    residual_multiplier: int = 0
    table: NDArray[np.int16] | None = None
    """[2, 64]: slopes and intercepts of the activation's pieces; None without one."""

    def fields(self) -> dict[str, Any]:
        """Return what a layer's record holds of it."""
        own = {name: value for name, value in vars(self).items() if name != "table"}
        return own if self.table is None else own | {"table": self.table.astype("<i2")}


def scale_of_map(bounds: tuple[float, float], least: float = LEAST_SCALE) -> MapScale:
    """Spread 256 levels over a range that holds zero."""
    low, high = bounds
    scale = float(np.float32(max((high - low) / MAP_LEVELS, least)))
    return MapScale(scale, int(np.clip(np.rint(-low / scale), 0, MAP_LEVELS)))


def quantize_weights(weight: Array, bias: Array, source: MapScale) -> QuantizedWeights:
    """Quantize weights [N, C, k, k] and their bias [N] for maps of a scale."""
    largest = np.abs(weight).max(axis=(1, 2, 3))
    # A channel of tiny weights may have any bias, and int32 must hold it.
    least = np.maximum(np.abs(bias) / (source.scale * LARGEST_BIAS), LEAST_SCALE)
    scales = np.maximum(largest / WEIGHT_LEVELS, least).astype(np.float32).astype(np.float64)
    levels = np.rint(weight / scales[:, None, None, None])
    levels = np.clip(levels, -WEIGHT_LEVELS, WEIGHT_LEVELS)
    offsets = np.rint(bias / (scales * source.scale)) - source.zero_point * levels.sum((1, 2, 3))
    return QuantizedWeights(levels.astype(np.int8), scales, offsets.astype(np.int32))


def largest_sums(quantized: QuantizedWeights) -> Array:
    """Return what a sum of products with its bias cannot exceed, whatever the image, [N]."""
    magnitudes = np.abs(quantized.weights.astype(np.float64)).sum(axis=(1, 2, 3))
    return np.abs(quantized.bias.astype(np.float64)) + MAP_LEVELS * magnitudes


def line_to(out: MapScale, residual: MapScale | None) -> Ending:
    """Bring 16 bits to a map's bytes, and a residual's bytes with them."""
    for bits in range(MOST_LINEAR_FRACTION_BITS, -1, -1):
        offset, multiplier = _offset_and_multiplier(out, residual, bits)
        if multiplier <= LARGEST_16 and abs(offset) <= LARGEST_16:
            return Ending(bits, offset, multiplier)
    raise ValueError("the residual's range is more than 128 times that of its sum")


def least_scale_of_sum(residual: MapScale) -> float:
    """Return the finest scale of a sum that the residual can be brought to."""
    return residual.scale / 100


def full_range(function: Callable[[Array], Array], highest: float) -> float:
    """Return what the 16 bits before an activation reach to."""
    # ReLU6 is exact where its corners are ends of pieces, and is flat above.
    return LEAST_FULL_RANGE if function is relu6 else max(LEAST_FULL_RANGE, highest)


def least_scale_of_curve(reach: float) -> float:
    """Return the finest scale of a map whose slopes a table still holds."""
    return 1.1 * reach / LARGEST_16


def curve_to(
    function: Callable[[Array], Array], reach: float, out: MapScale, residual: MapScale | None
) -> Ending:
    """Write an activation as 64 pieces from 16 bits, whose full range is `reach`, to a map's bytes.

    Each piece is the chord, moved so that its largest error is halved.
    """
    # The piece of x is (x >> 10) & 63: first those from zero up, then those below.
    starts = np.arange(NUM_PIECES) - NUM_PIECES * (np.arange(NUM_PIECES) >= NUM_PIECES // 2)
    width = reach * PIECE / UNITS_16
    x = width * (starts[:, None] + np.linspace(0, 1, 129))
    y = function(x)
    slopes = (y[:, -1] - y[:, 0]) / width
    intercepts = y[:, 0] - slopes * x[:, 0]
    errors = y - (slopes[:, None] * x + intercepts[:, None])
    worst = np.abs(errors).argmax(axis=1)[:, None]
    intercepts += np.take_along_axis(errors, worst, axis=1)[:, 0] / 2
    # In steps of the output.
    slopes, intercepts = slopes / out.scale, intercepts / out.scale
    most_bits = MOST_FRACTION_BITS
    if residual is None:
        intercepts += out.zero_point
        ends = slopes[:, None] * x[:, [0, -1]] + intercepts[:, None]
        is_highest = (ends >= MAP_LEVELS - 0.5).all(axis=1)
        is_constant = is_highest | (ends < 0.5).all(axis=1)
        slopes = np.where(is_constant, 0, slopes)
        intercepts = np.where(is_constant, MAP_LEVELS * is_highest, intercepts)
    else:
        most_bits = line_to(out, residual).fraction_bits
    for bits in range(most_bits, -1, -1):
        half = _half(bits) if residual is None else 0
        table = [np.rint(slopes * reach * 2**bits), np.rint(intercepts * 2**bits) + half]
        if np.abs(table).max() <= LARGEST_16 or bits == 0:
            offsets = _offset_and_multiplier(out, residual, bits) if residual else (0, 0)
            clamped = np.clip(table, -LARGEST_16, LARGEST_16).astype(np.int16)
            return Ending(bits, *offsets, clamped)
    raise AssertionError("fraction bits start at zero or above")


def gate_multiplier(source: MapScale, out: MapScale) -> tuple[int, float]:
    """Return squeeze-excite's shift, and what its gates are multiplied by."""
    for shift in range(MOST_SHIFT + 1):
        multiplier = source.scale / out.scale * 2 ** (15 - shift)
        if multiplier <= LARGEST_16:
            return shift, multiplier
    raise ValueError("squeeze-excite's output has less than 1/64 of its input's range")


def least_scale_of_gated(source: MapScale) -> float:
    """Return the finest scale that a map can be brought to by squeeze-excite."""
    return source.scale / 60


def silu(x: Array) -> Array:
    """X * sigmoid(x)."""
    return x / (1 + np.exp(-x))


def relu6(x: Array) -> Array:
    """min(max(x, 0), 6)."""
    return np.clip(x, 0, 6)


def _offset_and_multiplier(out: MapScale, residual: MapScale | None, bits: int) -> tuple[int, int]:
    ratio = residual.scale / out.scale if residual else 0.0
    middle = out.zero_point - (residual.zero_point * ratio if residual else 0.0)
    return round(middle * 2**bits) + _half(bits), round(ratio * 2 ** (bits + 8))


def _half(bits: int) -> int:
    return 1 << bits >> 1
