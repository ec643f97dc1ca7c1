"""A folded network and its ranges -> the native engine's program, layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from efficientnet.images.preprocess_spec import PreprocessSpec
from efficientnet.network.model import (
    ConvNormAct,
    EfficientNet,
    ReLU6,
    ResidualBlock,
    SamePadConv2d,
    SiLU,
    SqueezeExcite,
)
from efficientnet.runtimes.native.program_file import Activation, DType, Kind, Program, to_bf16
from export.checks.sensitivity import named_blocks
from export.graphs.calibration import CalibrationError, Ranges
from export.graphs.folding import INPUT_NAME, is_within
from export.native_format import native_quantization as quantize

# Module -> what the engine calls it, the node that puts its map out, and the function itself.
ACTIVATIONS = {
    SiLU: (Activation.SILU, "Mul", quantize.silu),
    ReLU6: (Activation.RELU6, "Clip", quantize.relu6),
}


@dataclass(frozen=True)
class Made:
    """A program, and what its parts are called in the ONNX graph of the same network."""

    program: Program
    layer_names: tuple[str, ...]
    """By layer: its module and operator."""
    tensor_names: tuple[str, ...]
    """By tensor: the node that puts it out."""


@dataclass
class _Map:
    name: str
    shape: tuple[int, int, int]
    scale: quantize.MapScale | None
    """As it is stored in 8 bits; None in a program without such activations."""
    tensors: dict[DType, int] = field(default_factory=dict)
    """By type: where it stands, once it does."""


def make_program(
    model: EfficientNet, spec: PreprocessSpec, ranges: Ranges | None, in_float: Sequence[str] = ()
) -> Made:
    """Write a network with folded batch norm as a program of the native engine.

    Its first layer holds the preprocessing. `ranges` are of the activations that activation_names
    names, None = all layers in bfloat16; blocks `in_float` are in bfloat16 whatever the others do.
    """
    writer = _Writer(model.num_classes, spec, ranges, in_float)
    x = writer.images(next(named_blocks(model))[0])
    for name, block in named_blocks(model):
        if isinstance(block, ConvNormAct):
            x = writer.convolution(name, block, x)
            continue
        assert isinstance(block, ResidualBlock)
        came_in, last = x, len(block.block) - 1
        for index, layer in enumerate(block.block):
            path = f"{name}.block.{index}"
            if isinstance(layer, SqueezeExcite):
                x = writer.squeeze_excite(path, layer, x)
            else:
                assert isinstance(layer, ConvNormAct)
                has_residual = block.has_residual and index == last
                output = f"{name}/Add" if has_residual else None
                x = writer.convolution(path, layer, x, came_in if has_residual else None, output)
    classifier = model.classifier[1]
    assert isinstance(classifier, nn.Linear)
    writer.classifier(classifier, x)
    return Made(writer.program, tuple(writer.layer_names), tuple(writer.tensor_names))


def activation_names(model: EfficientNet) -> list[str]:
    """Name the activations whose ranges an int8 program wants, as export_onnx names them."""
    names: list[str] = []
    for name, block in named_blocks(model):
        for path, module in block.named_modules(prefix=name):
            if isinstance(module, ConvNormAct):
                names += [f"{path}.0/Conv"]
                names += [_output_of(path, module)] if len(module) > 2 else []
            elif isinstance(module, SqueezeExcite):
                names.append(f"{path}/Mul")
        if isinstance(block, ResidualBlock) and block.has_residual:
            names.append(f"{name}/Add")
    return names


class _Writer:
    def __init__(
        self, num_classes: int, spec: PreprocessSpec, ranges: Ranges | None, in_float: Sequence[str]
    ) -> None:
        self.program = Program(num_classes)
        self.layer_names: list[str] = []
        self.tensor_names: list[str] = []
        self._spec = spec
        self._ranges = ranges
        self._in_float = in_float

    def images(self, first: str) -> _Map:
        """Read images in units of pixels: the first layer's weights hold the normalization."""
        size, dtype = self._spec.image_size, self._type_of(first)
        mean, std = 255 * np.array(self._spec.mean), 255 * np.array(self._spec.std)
        # A map in bfloat16 is padded with zeros, which must be what the mean is near: whole pixels
        # less a whole number are exact in it.
        middle = np.rint(mean) if dtype is DType.BF16 else np.zeros(3)
        scales = np.array([std, mean - middle, np.ones(3), -middle], "<f4")
        padding = (np.rint(mean) - middle).astype("<i4")
        images = _Map(INPUT_NAME, (size, size, 3), quantize.MapScale(1.0, 0))
        output = self._store(images, dtype)
        self._add(Kind.INPUT, f"{INPUT_NAME}/Convert", output=output, scales=scales, table=padding)
        self._mean, self._std, self._middle = mean, std, middle
        return images

    def convolution(
        self,
        path: str,
        layer: ConvNormAct,
        x: _Map,
        residual: _Map | None = None,
        output: str | None = None,
    ) -> _Map:
        """Add a convolution with what follows it; `output` names the sum with the residual."""
        conv, dtype = layer[0], self._type_of(path)
        assert isinstance(conv, nn.Conv2d)
        kind = Kind.DEPTHWISE if conv.groups > 1 else Kind.CONV
        weight, bias = _float64(conv.weight), _float64(conv.bias)
        if x.name == INPUT_NAME:
            bias = bias + (weight.sum((2, 3)) * (self._middle - self._mean) / self._std).sum(1)
            weight = weight / self._std[:, None, None]
        stride, kernel = conv.stride[0], conv.kernel_size[0]
        height, width = (-(-side // stride) for side in x.shape[:2])
        out = self._map(output or _output_of(path, layer), (height, width, conv.out_channels))
        fields: dict[str, Any] = {
            "input": self._in_type(x, dtype),
            "residual": self._in_type(residual, dtype) if residual else -1,
            "kernel": kernel,
            "stride": stride,
            "pad_top": _before(conv, x.shape[0]),
            "pad_left": _before(conv, x.shape[1]),
            "activation": ACTIVATIONS[type(layer[2])][0] if len(layer) > 2 else Activation.NONE,
        }
        if dtype is DType.BF16:
            weights = to_bf16(_channels_last(weight.astype(np.float32)))
            fields |= {"weights": weights, "bias": bias.astype("<f4")}
        else:
            fields |= self._quantized(path, layer, weight, bias, x, residual, out)
        self._add(kind, f"{path}.0/Conv", output=self._store(out, dtype), **fields)
        return out

    def squeeze_excite(self, path: str, layer: SqueezeExcite, x: _Map) -> _Map:
        """Add the scaling of each channel by its gate."""
        dtype = self._type_of(path)
        out = self._map(f"{path}/Mul", x.shape)
        fields: dict[str, Any] = {"multiplier": 1.0, "input": self._in_type(x, dtype)}
        if dtype is DType.U8:
            assert x.scale and self._ranges
            least = quantize.least_scale_of_gated(x.scale)
            out.scale = quantize.scale_of_map(self._ranges[out.name], least)
            shift, multiplier = quantize.gate_multiplier(x.scale, out.scale)
            fields |= {"fraction_bits": shift, "multiplier": multiplier}
        squeeze, excite = (
            _float32(conv.weight).reshape(conv.out_channels, -1) for conv in (layer.fc1, layer.fc2)
        )
        self._add(
            Kind.SQUEEZE_EXCITE,
            f"{path}/SqueezeExcite",
            output=self._store(out, dtype),
            mean_multiplier=_mean_multiplier(x, dtype),
            squeeze_channels=len(squeeze),
            squeeze_weights=to_bf16(squeeze),
            squeeze_bias=_float32(layer.fc1.bias),
            excite_weights=to_bf16(excite.T),
            excite_bias=_float32(layer.fc2.bias),
            **fields,
        )
        return out

    def classifier(self, layer: nn.Linear, x: _Map) -> None:
        """Add the mean over all pixels and the classifier."""
        dtype = next(iter(x.tensors))
        self._add(
            Kind.CLASSIFIER,
            "classifier.1/Gemm",
            input=x.tensors[dtype],
            mean_multiplier=_mean_multiplier(x, dtype),
            weights=to_bf16(_float32(layer.weight)),
            bias=_float32(layer.bias),
        )

    def _quantized(
        self,
        path: str,
        layer: ConvNormAct,
        weight: quantize.Array,
        bias: quantize.Array,
        x: _Map,
        residual: _Map | None,
        out: _Map,
    ) -> dict[str, Any]:
        # Also decides the output's scale.
        assert x.scale and self._ranges
        rest = residual.scale if residual else None
        least = quantize.least_scale_of_sum(rest) if rest else 0.0
        quantized = quantize.quantize_weights(weight, bias, x.scale)
        if len(layer) > 2:
            function = ACTIVATIONS[type(layer[2])][2]
            reach = quantize.full_range(function, self._ranges[f"{path}.0/Conv"][1])
            bounds = self._ranges[out.name]
            out.scale = quantize.scale_of_map(
                bounds, max(least, quantize.least_scale_of_curve(reach))
            )
            ending = quantize.curve_to(function, reach, out.scale, rest)
            unit = reach / quantize.UNITS_16
        else:
            out.scale = quantize.scale_of_map(self._ranges[out.name], least)
            ending = quantize.line_to(out.scale, rest)
            unit = out.scale.scale / 2**ending.fraction_bits
        scales = (quantized.scales * x.scale.scale / unit).astype("<f4")
        sums = quantize.largest_sums(quantized)
        if max(sums.max(), (sums * scales).max()) >= quantize.LARGEST_SUM:
            raise CalibrationError(
                f"{path} has sums of products that may leave 32 bits: its weights or biases are "
                "out of proportion to its range; keep its block in float, or export in bf16"
            )
        return {
            "weights": _channels_last(quantized.weights),
            "bias": quantized.bias.astype("<i4"),
            "scales": scales,
            **ending.fields(),
        }

    def _type_of(self, path: str) -> DType:
        is_float = self._ranges is None or any(is_within(path, name) for name in self._in_float)
        return DType.BF16 if is_float else DType.U8

    def _map(self, name: str, shape: tuple[int, int, int]) -> _Map:
        # The scale is finer where a layer of 8 bits says so.
        return _Map(
            name, shape, quantize.scale_of_map(self._ranges[name]) if self._ranges else None
        )

    def _store(self, value: _Map, dtype: DType) -> int:
        scale = value.scale if dtype is DType.U8 else None
        index = self.program.add_tensor(
            value.shape, dtype, scale.scale if scale else 0.0, scale.zero_point if scale else 0
        )
        self.tensor_names.append(value.name)
        value.tensors[dtype] = index
        return index

    def _in_type(self, value: _Map, dtype: DType) -> int:
        # In the other type a map is written when it is first asked for.
        if dtype not in value.tensors:
            (source,) = value.tensors.values()
            assert value.scale is not None
            scale = value.scale.scale
            multiplier = scale if dtype is DType.BF16 else 1 / scale
            output = self._store(value, dtype)
            name = f"{value.name.partition('/')[0]}/Convert"
            self._add(Kind.CONVERT, name, input=source, output=output, multiplier=multiplier)
        return value.tensors[dtype]

    def _add(self, kind: Kind, name: str, **fields: Any) -> None:
        self.program.add_layer(kind, **fields)
        self.layer_names.append(name)


def _output_of(path: str, layer: ConvNormAct) -> str:
    return f"{path}.2/{ACTIVATIONS[type(layer[2])][1]}" if len(layer) > 2 else f"{path}.0/Conv"


def _before(conv: nn.Conv2d, size: int) -> int:
    if isinstance(conv, SamePadConv2d):
        # TensorFlow's SAME: the odd pixel comes after.
        stride = conv.stride[0]
        return max((-(-size // stride) - 1) * stride + conv.kernel_size[0] - size, 0) // 2
    padding = conv.padding[0]
    assert isinstance(padding, int)
    return padding


def _mean_multiplier(x: _Map, dtype: DType) -> float:
    num_pixels = x.shape[0] * x.shape[1]
    scale = x.scale.scale if dtype is DType.U8 and x.scale else 1.0
    return scale / num_pixels


def _channels_last(weight: NDArray[Any]) -> NDArray[Any]:
    # [N, C, k, k] -> [N, k, k, C]; of a depthwise one C is 1.
    return np.ascontiguousarray(weight.transpose(0, 2, 3, 1))


def _float64(values: Tensor | None) -> quantize.Array:
    assert values is not None
    return values.detach().numpy().astype(np.float64)


def _float32(values: Tensor | None) -> NDArray[np.float32]:
    assert values is not None
    return values.detach().numpy().astype("<f4")
