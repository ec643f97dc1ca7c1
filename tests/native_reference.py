"""docs/native.md's numerics in numpy: a program file and an image -> every map, and the logits."""

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from efficientnet.runtimes.native.program_file import (
    Activation,
    DType,
    Kind,
    ProgramView,
    from_bf16,
    to_bf16,
)

Array = NDArray[Any]
f32 = np.float32

# p(f) = 2^f on [-1/2, 1/2], the highest power first.
SIGMOID = (0.000154035304, 0.00133335581, 0.00961812911, 0.0555041087, 0.240226507, 0.693147182)


def run(program: ProgramView, image: Array) -> tuple[list[Array], NDArray[np.float32]]:
    """Compute every map (uint8, or float32 of bfloat16 values), [H, W, C], and the logits.

    Args:
        program: what is run.
        image: float32 [3, H, W], or pixels uint8 [H, W, 3].
    """
    activations: list[Array] = [np.zeros(0)] * len(program.tensors)
    logits = np.zeros(0, f32)
    padding: dict[int, Array] = {}
    for layer in program.layers:
        kind = Kind(layer["kind"])
        x = image if kind is Kind.INPUT else activations[layer["input"]]
        if kind is Kind.CLASSIFIER:
            logits = classify(program, layer, x)
            continue
        out = program.tensors[layer["output"]]
        if kind is Kind.INPUT:
            value, padding[int(layer["output"])] = read_image(program, layer, out, x)
        elif kind is Kind.SQUEEZE_EXCITE:
            value = squeeze_excite(program, layer, x)
        elif kind is Kind.CONVERT:
            value = convert(program, layer, x)
        else:
            outside = padding.get(int(layer["input"]))
            residual = activations[layer["residual"]] if layer["residual"] >= 0 else None
            value = convolve(program, layer, x, outside, residual)
        assert value.shape == (out["height"], out["width"], out["channels"])
        activations[layer["output"]] = value
    return activations, logits


def read_image(
    program: ProgramView, layer: np.void, out: np.void, image: Array
) -> tuple[Array, Array]:
    """Return the first map, and the values of its padding."""
    is_pixels = image.dtype == np.uint8
    scales = program.array(layer["scales"], "<f4", (2, 2, 3))[int(is_pixels)]
    x = (image if is_pixels else image.transpose(1, 2, 0)).astype(f32)
    x = x * scales[0] + scales[1]
    padding = program.array(layer["table"], "<i4", (3,))
    if out["dtype"] == DType.BF16:
        return rounded(x), padding
    return sat8(integer(np.nan_to_num(x, nan=0.0, posinf=1e9, neginf=-1e9))), padding


def convolve(
    program: ProgramView,
    layer: np.void,
    x: Array,
    outside: Array | None,
    residual: Array | None,
) -> Array:
    """Return a convolution's map, full or depthwise."""
    source, out = program.tensors[layer["input"]], program.tensors[layer["output"]]
    is_u8 = source["dtype"] == DType.U8
    size, channels = int(layer["kernel"]), int(out["channels"])
    inputs = int(source["channels"]) if layer["kind"] == Kind.CONV else 1
    shape = (channels, size, size, inputs)
    if outside is None:
        outside = np.full(source["channels"], source["zero_point"] if is_u8 else 0)
    windows = windows_of(layer, x, outside, out)  # [H, W, C, k, k]
    weights = program.array(layer["weights"], "|i1" if is_u8 else "<u2", shape)
    # Products of 8 bits are exact in float64, whatever the order.
    wide = (weights if is_u8 else from_bf16(weights)).astype(np.float64)
    if layer["kind"] == Kind.CONV:
        rows = windows.transpose(0, 1, 3, 4, 2).reshape(-1, size * size * inputs)
        sums = (rows @ wide.reshape(channels, -1).T).reshape(*windows.shape[:2], channels)
    else:
        sums = np.einsum("hwcij,cij->hwc", windows, wide[..., 0])
    activation = Activation(layer["activation"])
    bias = program.array(layer["bias"], "<i4" if is_u8 else "<f4", (channels,))
    if not is_u8:
        y = activate(sums + bias, activation)
        return rounded(y if residual is None else y + residual)
    total = sums.astype(np.int64) + bias
    assert np.abs(total).max() < 2**31
    scales = program.array(layer["scales"], "<f4", (channels,))
    y = sat16(integer(total.astype(np.int32).astype(f32) * scales))
    fraction_bits = int(layer["fraction_bits"])
    if activation is not Activation.NONE:
        table = program.array(layer["table"], "<i2", (2, 64)).astype(np.int32)
        piece = (y >> 10) & 63
        y = adds(mulhrs(y, table[0][piece]), table[1][piece])
    if residual is not None:
        y = adds(y, mulhrs(residual.astype(np.int32) << 7, layer["residual_multiplier"]))
    if activation is Activation.NONE or residual is not None:
        y = adds(y, layer["output_offset"])
    return sat8(y >> fraction_bits)


def windows_of(layer: np.void, x: Array, outside: Array, out: np.void) -> Array:
    """Return what each output sees of a padded map, [H, W, C, k, k]."""
    size, stride = int(layer["kernel"]), int(layer["stride"])
    before = int(layer["pad_top"]), int(layer["pad_left"])
    needed = [(int(out[side]) - 1) * stride + size for side in ("height", "width")]
    ends = [max(0, n - b - s) for n, b, s in zip(needed, before, x.shape, strict=False)]
    padded = np.empty(
        (x.shape[0] + before[0] + ends[0], x.shape[1] + before[1] + ends[1], x.shape[2])
    )
    padded[:] = outside
    padded[before[0] : before[0] + x.shape[0], before[1] : before[1] + x.shape[1]] = x
    windows = sliding_window_view(padded, (size, size), axis=(0, 1))  # type: ignore[call-overload]
    return windows[::stride, ::stride][: out["height"], : out["width"]]


def squeeze_excite(program: ProgramView, layer: np.void, x: Array) -> Array:
    """Return the map scaled by the gates of its channels."""
    source, out = program.tensors[layer["input"]], program.tensors[layer["output"]]
    channels, squeezed = int(source["channels"]), int(layer["squeeze_channels"])
    squeeze, excite = (
        from_bf16(program.array(layer[name], "<u2", (squeezed, channels)))
        for name in ("squeeze_weights", "excite_weights")
    )
    hidden = dot16(squeeze, mean_of(layer, source, x))
    hidden = silu(hidden + program.array(layer["squeeze_bias"], "<f4", (squeezed,)))
    z = program.array(layer["excite_bias"], "<f4", (channels,)).copy()
    for value, weights in zip(hidden, excite, strict=True):
        z = z + value * weights
    gates = sigmoid(z) * layer["multiplier"]
    if source["dtype"] == DType.BF16:
        return rounded(x * gates)
    wide = (x.astype(np.int32) - source["zero_point"]) << int(layer["fraction_bits"])
    return sat8(mulhrs(wide, integer(gates)) + out["zero_point"])


def convert(program: ProgramView, layer: np.void, x: Array) -> Array:
    """Return a map in the other type."""
    if program.tensors[layer["output"]]["dtype"] == DType.BF16:
        zero_point = program.tensors[layer["input"]]["zero_point"]
        return rounded((x.astype(np.int32) - zero_point).astype(f32) * layer["multiplier"])
    zero_point = program.tensors[layer["output"]]["zero_point"]
    return sat8(integer(x * layer["multiplier"]) + zero_point)


def classify(program: ProgramView, layer: np.void, x: Array) -> NDArray[np.float32]:
    """Return the logits."""
    source = program.tensors[layer["input"]]
    shape = (program.num_classes, int(source["channels"]))
    weights = from_bf16(program.array(layer["weights"], "<u2", shape))
    return dot16(weights, mean_of(layer, source, x)) + program.array(
        layer["bias"], "<f4", shape[:1]
    )


def mean_of(layer: np.void, source: np.void, x: Array) -> Array:
    """Return the mean of each channel, by the multiplier that the file gives."""
    if source["dtype"] == DType.BF16:
        return x.sum(axis=(0, 1), dtype=np.float64).astype(f32) * layer["mean_multiplier"]
    num_pixels = x.shape[0] * x.shape[1]
    sums = x.astype(np.int64).sum(axis=(0, 1)) - int(source["zero_point"]) * num_pixels
    return sums.astype(f32) * layer["mean_multiplier"]


def dot16(weights: Array, values: Array) -> NDArray[np.float32]:
    """Multiply float32 [N, C] by [C] in the order of the contract."""
    num_blocks = -(-len(values) // 16)
    products = np.zeros((len(weights), num_blocks * 16), f32)
    products[:, : len(values)] = weights * values
    sums = np.zeros((len(weights), 16), f32)
    for block in products.reshape(len(weights), num_blocks, 16).swapaxes(0, 1):
        sums = sums + block
    for half in (8, 4, 2, 1):
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0]


def sigmoid(x: Array) -> NDArray[np.float32]:
    """Compute what the contract calls sigmoid, each operation in float32."""
    t = np.clip(x * f32(-1.44269502), f32(-120), f32(120))
    n = np.rint(t)
    f = t - n
    p = np.full_like(f, SIGMOID[0])
    for coefficient in SIGMOID[1:]:
        p = p * f + f32(coefficient)
    p = p * f + f32(1)
    return f32(1) / (f32(1) + np.ldexp(p, n.astype(np.int32)))


def silu(x: Array) -> NDArray[np.float32]:
    """x * sigmoid(x)."""
    return x * sigmoid(x)


def activate(x: Array, activation: Activation) -> Array:
    """Apply an activation in float64."""
    if activation is Activation.RELU6:
        return np.clip(x, 0, 6)
    return x / (1 + np.exp(-x)) if activation is Activation.SILU else x


def rounded(x: Array) -> NDArray[np.float32]:
    """Round to bfloat16's values."""
    return from_bf16(to_bf16(x.astype(f32)))


def integer(x: Array) -> Array:
    """Round float32 to int32, to nearest even."""
    return np.rint(np.clip(x, -(2.0**30), 2.0**30)).astype(np.int32)


def sat8(x: Array) -> NDArray[np.uint8]:
    """Clamp to 0..255."""
    return np.clip(x, 0, 255).astype(np.uint8)


def sat16(x: Array) -> Array:
    """Clamp to int16, in int32."""
    return np.clip(x, -32768, 32767).astype(np.int32)


def mulhrs(a: Array, b: Array) -> Array:
    """Multiply 16 bits by 16 bits, keep the upper ones, rounded."""
    return (a * b + 16384) >> 15


def adds(a: Array, b: Array) -> Array:
    """Add with saturation to 16 bits."""
    return sat16(a + b)
