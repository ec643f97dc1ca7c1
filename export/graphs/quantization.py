"""ONNX graph and ranges -> Q/DQ nodes around what computes in 8 bits, as each runtime wants them.

Two runtimes read such graphs, and their kernels want different ones (see SCHEMES).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.graphs.calibration import CalibrationError, Ranges
from export.graphs.folding import INPUT_NAME, FloatPrecision, is_within, remove_unused_constants

FP8_LARGEST = 448.0

LEAST_FP8_CHANNELS = 16
LARGEST_FP8_KERNEL = 32

# A bias may be half as large as int32 holds: the sums of products are added to it.
LARGEST_BIAS = 2.0**30

QUANTIZED_OPERATORS = ("Conv", "Clip", "Add", "Mul", "Sigmoid")

# Zero or more axes, numpy's scalars included.
Array = Any


@dataclass(frozen=True)
class Scheme:
    """What a runtime's 8-bit kernels take."""

    activation_type: int
    """TensorProto type of activations."""
    weight_type: int
    is_tensorrt: bool = False
    """TensorRT stores zero as zero and biases in float, and fuses what follows a convolution
    itself. ONNX Runtime computes in integers only where biases are int32 and a convolution puts 8
    bits out: there SiLU, and the scaling by a gate, compute in 8 bits, and whoever reads such a map
    reads it so. Where a Clip (ReLU6) follows, what the Clip leaves is quantized."""
    float_precision: FloatPrecision = "fp32"
    """Of all that is not quantized."""
    weight_levels: int = 127
    """Largest magnitude of a weight."""


# Without VNNI, ONNX Runtime's x86 kernels add two products of 8 bits up in 16: weights of 7 bits
# cannot overflow.
ONNXRUNTIME = Scheme(TensorProto.UINT8, TensorProto.INT8)
TENSORRT = Scheme(TensorProto.INT8, TensorProto.INT8, is_tensorrt=True, float_precision="fp16")
FP8 = TensorProto.FLOAT8E4M3FN
SCHEMES = {
    "onnxruntime": ONNXRUNTIME,
    "onnxruntime-7-bits": replace(ONNXRUNTIME, weight_levels=63),
    "tensorrt": TENSORRT,
    "tensorrt-fp8": replace(TENSORRT, activation_type=FP8, weight_type=FP8),
}


def tensors_to_quantize(graph: onnx.ModelProto, kept: Sequence[str], scheme: Scheme) -> list[str]:
    """Return the activations that are quantized, in the order of the graph.

    Inputs of convolutions and residual additions; for ONNX Runtime also what
    comes out of convolutions, SiLU, additions and the scaling by a gate, so that all between two
    convolutions is 8 bits wide. What a Clip cuts off needs no levels: its output is quantized in
    place of the convolution's, and the runtime saturates. Squeeze-excite's own layers, of one
    pixel, stay in float32: they take no time and decide about whole channels. So do the classifier
    and blocks in `kept`.
    """
    wanted: dict[str, None] = {}
    clipped = {node.input[0] for node in graph.graph.node if node.op_type == "Clip"}
    for node in graph.graph.node:
        if not is_quantized(node, kept):
            continue
        if node.op_type == "Conv":
            wanted[node.input[0]] = None
        elif node.op_type == "Add":
            wanted.update(dict.fromkeys(node.input))
        if not scheme.is_tensorrt:
            if node.op_type in ("Mul", "Sigmoid"):
                wanted.update(dict.fromkeys(node.input))
            if node.output[0] not in clipped:
                wanted[node.output[0]] = None
    return list(wanted)


def layers_without_kernel(graph: onnx.ModelProto, scheme: Scheme) -> list[str]:
    """Return the layers for whose convolutions TensorRT has no good kernel in 8 bits.

    In fp8 those with few channels to multiply, depthwise ones and the first one, and large kernels
    (as NVIDIA's ModelOpt leaves them out, modelopt/onnx/quantization/graph_utils.py).
    """
    if scheme.weight_type != FP8:
        return []
    constants = {tensor.name: tensor for tensor in graph.graph.initializer}
    found: list[str] = []
    for node in graph.graph.node:
        if node.op_type == "Conv" and is_quantized(node, ()):
            outputs, inputs, height, width = constants[node.input[1]].dims
            if min(outputs, inputs) < LEAST_FP8_CHANNELS or height * width > LARGEST_FP8_KERNEL:
                found.append(node.name.rpartition("/")[0])
    return found


def is_quantized(node: onnx.NodeProto, kept: Sequence[str]) -> bool:
    """Whether a node works on 8-bit activations."""
    if ".gate." in node.name or node.op_type not in QUANTIZED_OPERATORS:
        return False
    return not any(is_within(node.name, block) for block in kept)


def insert_quantization(
    graph: onnx.ModelProto, ranges: Ranges, kept: Sequence[str], scheme: Scheme
) -> None:
    """Quantize activations and weights, with QuantizeLinear and DequantizeLinear nodes, in place.

    Weights are symmetric with a scale for each output channel (one for all of them in fp8). The
    graph is in the scheme's float precision, and the blocks `kept` stay in it; a map has to hold in
    it.
    """
    _require_held(ranges, scheme)
    constants = {tensor.name: tensor for tensor in graph.graph.initializer}
    scales = {tensor: _activation_scale(bounds, scheme) for tensor, bounds in ranges.items()}
    nodes: list[onnx.NodeProto] = []
    float_type = helper.np_dtype_to_tensor_dtype(np.dtype(_float_type(scheme)))

    def dequantize(name: str, axis: int | None = None) -> str:
        inputs = [f"{name}/quantized", f"{name}/scale"]
        if axis is None:
            inputs.append(f"{name}/zero_point")
        attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
        output = f"{name}/DequantizeLinear"
        nodes.append(helper.make_node("DequantizeLinear", inputs, [output], output, **attributes))
        return output

    def quantize_activation(tensor: str) -> None:
        scale, zero = scales[tensor]
        store(f"{tensor}/scale", scale, float_type)
        store(f"{tensor}/zero_point", zero, scheme.activation_type)
        inputs = [tensor, f"{tensor}/scale", f"{tensor}/zero_point"]
        name = f"{tensor}/QuantizeLinear"
        nodes.append(helper.make_node("QuantizeLinear", inputs, [f"{tensor}/quantized"], name))
        dequantize(tensor)

    def quantize_constant(name: str, values: Array, scale: Array, kind: int) -> str:
        store(f"{name}/quantized", values, kind)
        store(f"{name}/scale", scale, float_type)
        if np.ndim(scale) == 0:
            store(f"{name}/zero_point", np.zeros((), np.float32), kind)
        return dequantize(name, axis=0 if np.ndim(scale) else None)

    def store(name: str, values: Array, kind: int) -> None:
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        graph.graph.initializer.append(numpy_helper.from_array(values.astype(dtype), name))

    old = list(graph.graph.node)
    if INPUT_NAME in ranges:
        quantize_activation(INPUT_NAME)
    for node in old:
        if node.op_type == "Conv" and is_quantized(node, kept):
            (activation_scale, _), prefix = scales[node.input[0]], node.name
            weight = numpy_helper.to_array(constants[node.input[1]]).astype(np.float32)
            scale = _weight_scale(weight, scheme)
            if not scheme.is_tensorrt:
                bias = numpy_helper.to_array(constants[node.input[2]])
                # A channel of tiny weights may have any bias, and int32 must hold it.
                least = np.abs(bias) / (activation_scale * LARGEST_BIAS)
                scale = np.maximum(scale, least).astype(np.float32)
                bias_scale = (scale * activation_scale).astype(np.float32)
                node.input[2] = quantize_constant(
                    f"{prefix}/bias", np.round(bias / bias_scale), bias_scale, TensorProto.INT32
                )
            stored = _quantize_weights(weight, scale, scheme)
            node.input[1] = quantize_constant(f"{prefix}/weight", stored, scale, scheme.weight_type)
        for index, tensor in enumerate(node.input):
            if tensor in ranges and (not scheme.is_tensorrt or is_quantized(node, kept)):
                node.input[index] = f"{tensor}/DequantizeLinear"
        nodes.append(node)
        for tensor in node.output:
            if tensor in ranges:
                quantize_activation(tensor)
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    remove_unused_constants(graph.graph)


def _require_held(ranges: Ranges, scheme: Scheme) -> None:
    most = float(np.finfo(_float_type(scheme)).max)
    for tensor, (low, high) in ranges.items():
        largest = max(-low, high)
        if largest > most:
            raise CalibrationError(
                f"{tensor} has values up to {largest:.1e}, and {scheme.float_precision}, which the "
                f"rest of this graph computes in, holds {most:.1e} at most: the network cannot "
                "compute in it; take bf16 or fp32, or an int8 of ONNX Runtime or OpenVINO"
            )


def _float_type(scheme: Scheme) -> type[np.floating]:
    return np.float16 if scheme.float_precision == "fp16" else np.float32


def _activation_scale(bounds: tuple[float, float], scheme: Scheme) -> tuple[Array, Array]:
    # Scale and zero point.
    low, high = bounds
    largest = max(-low, high)
    if scheme.activation_type == FP8:
        return _as_stored(largest / FP8_LARGEST, scheme), np.zeros((), np.float32)
    if scheme.is_tensorrt:
        return _as_stored(largest / 127, scheme), np.zeros((), np.float32)
    scale = _as_stored((high - low) / 255, scheme)
    return scale, np.float32(np.clip(np.round(-low / scale), 0, 255))


def _weight_scale(weight: NDArray[np.float32], scheme: Scheme) -> Array:
    # Of each output channel, or of all in fp8.
    if scheme.weight_type == FP8:
        return _as_stored(np.abs(weight).max() / FP8_LARGEST, scheme)
    return _as_stored(np.abs(weight).max(axis=(1, 2, 3)) / scheme.weight_levels, scheme)


def _quantize_weights(weight: NDArray[np.float32], scale: Array, scheme: Scheme) -> Array:
    # By the scale as it is stored: 127 of one that was rounded down may be less than the weight.
    if scheme.weight_type == FP8:
        return np.clip(weight / scale, -FP8_LARGEST, FP8_LARGEST)
    levels = scheme.weight_levels
    return np.clip(np.round(weight / scale[:, None, None, None]), -levels, levels)


def _as_stored(scale: Array, scheme: Scheme) -> Array:
    # In the graph's float type, which must hold it as a normal number: what is below comes out as
    # another number, or as zero. 1e-10 is far below what any map or weight is rounded by.
    dtype = _float_type(scheme)
    least = max(float(np.finfo(dtype).tiny), 1e-10)
    return np.maximum(scale, least).astype(dtype).astype(np.float32)
