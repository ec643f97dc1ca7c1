"""Random programs for the native engine: layers of every kind, with odd shapes."""

from pathlib import Path
from typing import Any

import numpy as np

from efficientnet.runtimes.native.program_file import (
    Activation,
    DType,
    Kind,
    Program,
    ProgramView,
    read_program_file,
    to_bf16,
)
from export.native_format.native_quantization import (
    MapScale,
    curve_to,
    gate_multiplier,
    line_to,
    quantize_weights,
    relu6,
    scale_of_map,
    silu,
)

FUNCTIONS = {Activation.SILU: silu, Activation.RELU6: relu6}
NUM_CLASSES = 7


class Chain:
    """Adds layers to a program, each reading the map before it."""

    def __init__(
        self, rng: np.random.Generator, shape: tuple[int, int], dtype: DType, is_wild: bool = False
    ) -> None:
        """Start with the image.

        Args:
            rng: draws all weights.
            shape: height and width of the image.
            dtype: of its map.
            is_wild: whether u8 layers get any numbers that the file may hold, by which every
                saturation happens, and not such as an export would choose.
        """
        self.rng, self.is_wild, self.dtype = rng, is_wild, dtype
        self.program = Program(NUM_CLASSES)
        self.scales: list[MapScale | None] = []
        middle = 0.0 if dtype is DType.U8 else 120.0
        scales = np.array([[50.0] * 3, [120 - middle] * 3, [1.0] * 3, [-middle] * 3], "<f4")
        padding = np.array([118, 120, 121] if dtype is DType.U8 else [0] * 3, "<i4")
        self.current = self._tensor((*shape, 3), dtype, MapScale(1.0, 0))
        self.program.add_layer(Kind.INPUT, output=self.current, scales=scales, table=padding)
        # The first layer brings pixels to values around one.
        self._gain = 1 / 60

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the map so far."""
        record = self.program.tensors[self.current]
        return int(record["height"]), int(record["width"]), int(record["channels"])

    def convolution(
        self,
        channels: int | None,
        kernel: int,
        stride: int = 1,
        activation: Activation = Activation.NONE,
        residual: int = -1,
        is_same: bool = False,
    ) -> None:
        """Add a convolution, depthwise where no channels are given."""
        height, width, inputs = self.shape
        is_depthwise = channels is None
        outputs = inputs if channels is None else channels
        weight_shape = (outputs, 1 if is_depthwise else inputs, kernel, kernel)
        std = self._gain / np.sqrt(np.prod(weight_shape[1:]) / 2)
        weight, bias = self.rng.normal(0, std, weight_shape), self.rng.normal(0, 0.3, outputs)
        self._gain = 1.0
        shape = -(-height // stride), -(-width // stride), outputs
        fields: dict[str, Any] = {"kernel": kernel, "stride": stride, "activation": activation}
        fields |= {
            name: _before(side, kernel, stride, is_same)
            for name, side in (("pad_top", height), ("pad_left", width))
        }
        scale: MapScale | None = None
        if self.dtype is DType.BF16:
            last = to_bf16(weight.transpose(0, 2, 3, 1).astype(np.float32))
            fields |= {"weights": last, "bias": bias.astype("<f4")}
        else:
            scale = self._scale(activation)
            fields |= self._quantized(weight, bias, activation, residual, scale)
        source = self.current
        self.current = self._tensor(shape, self.dtype, scale)
        self.program.add_layer(
            Kind.DEPTHWISE if is_depthwise else Kind.CONV,
            input=source,
            output=self.current,
            residual=residual,
            **fields,
        )

    def squeeze_excite(self, squeezed: int) -> None:
        """Add a scaling by gates."""
        height, width, channels = self.shape
        source_scale = self.scales[self.current]
        fields: dict[str, Any] = {"multiplier": 1.0}
        scale, own = None, 1.0
        if self.dtype is DType.U8:
            assert source_scale is not None
            zero_point = int(self.rng.integers(0, 60))
            scale = MapScale(source_scale.scale * float(self.rng.uniform(0.02, 1.5)), zero_point)
            shift, multiplier = gate_multiplier(source_scale, scale)
            fields |= {"fraction_bits": shift, "multiplier": multiplier}
            own = source_scale.scale
        squeeze, excite = self.rng.normal(0, channels**-0.5, (2, squeezed, channels))
        source = self.current
        self.current = self._tensor((height, width, channels), self.dtype, scale)
        self.program.add_layer(
            Kind.SQUEEZE_EXCITE,
            input=source,
            output=self.current,
            mean_multiplier=own / (height * width),
            squeeze_channels=squeezed,
            squeeze_weights=to_bf16(squeeze),
            squeeze_bias=self.rng.normal(0, 1, squeezed).astype("<f4"),
            excite_weights=to_bf16(4 * excite),
            excite_bias=self.rng.normal(0, 1, channels).astype("<f4"),
            **fields,
        )

    def convert(self, scale: MapScale | None = None) -> None:
        """Go over to the other type, 8 bits of a scale if one is given."""
        source, source_scale = self.current, self.scales[self.current]
        self.dtype = DType.BF16 if self.dtype is DType.U8 else DType.U8
        if self.dtype is DType.U8:
            scale = scale or MapScale(0.021, 31)
            multiplier = 1 / scale.scale
        else:
            assert source_scale is not None
            multiplier = source_scale.scale
        self.current = self._tensor(self.shape, self.dtype, scale)
        self.program.add_layer(
            Kind.CONVERT, input=source, output=self.current, multiplier=multiplier
        )

    def write(self, path: Path) -> ProgramView:
        """Add the classifier and write the file."""
        height, width, channels = self.shape
        scale = self.scales[self.current]
        own = scale.scale if scale and self.dtype is DType.U8 else 1.0
        self.program.add_layer(
            Kind.CLASSIFIER,
            input=self.current,
            mean_multiplier=own / (height * width),
            weights=to_bf16(self.rng.normal(0, 1, (NUM_CLASSES, channels))),
            bias=self.rng.normal(0, 1, NUM_CLASSES).astype("<f4"),
        )
        self.program.write(path)
        return read_program_file(path)

    def _tensor(self, shape: tuple[int, int, int], dtype: DType, scale: MapScale | None) -> int:
        self.scales.append(scale)
        is_u8 = dtype is DType.U8 and scale is not None
        return self.program.add_tensor(
            shape, dtype, scale.scale if is_u8 else 0.0, scale.zero_point if is_u8 else 0
        )

    def _scale(self, activation: Activation) -> MapScale:
        if self.is_wild:
            return MapScale(0.01, int(self.rng.integers(0, 256)))
        low, high = {
            Activation.NONE: (-3.0, 2.5),
            Activation.SILU: (-0.28, 2.5),
            Activation.RELU6: (0.0, 2.5),
        }[activation]
        return scale_of_map((low * self.rng.uniform(0.5, 1), high * self.rng.uniform(0.3, 2)))

    def _quantized(
        self,
        weight: np.ndarray,
        bias: np.ndarray,
        activation: Activation,
        residual: int,
        scale: MapScale,
    ) -> dict[str, Any]:
        source = self.scales[self.current]
        assert source is not None
        rest = self.scales[residual] if residual >= 0 else None
        quantized = quantize_weights(weight, bias, source)
        has_table = activation is not Activation.NONE
        if has_table:
            ending, unit = curve_to(FUNCTIONS[activation], 8.0, scale, rest), 8 / 32768
        else:
            ending = line_to(scale, rest)
            unit = scale.scale / 2**ending.fraction_bits
        fields: dict[str, Any] = {
            "weights": quantized.weights.transpose(0, 2, 3, 1),
            "bias": quantized.bias.astype("<i4"),
            "scales": (quantized.scales * source.scale / unit).astype("<f4"),
            "fraction_bits": ending.fraction_bits,
            "output_offset": ending.output_offset,
            "residual_multiplier": ending.residual_multiplier,
        }
        if ending.table is not None:
            fields["table"] = ending.table
        if self.is_wild:
            fields |= self._any_numbers(quantized.weights.shape, has_table)
        return fields

    def _any_numbers(self, shape: tuple[int, ...], has_table: bool) -> dict[str, Any]:
        draw = self.rng.integers
        weights = draw(-128, 128, (shape[0], *shape[2:], shape[1])).astype(np.int8)
        fields: dict[str, Any] = {
            "weights": weights,
            "bias": draw(-(10**6), 10**6, shape[0]).astype("<i4"),
            # Up to about four times what 16 bits hold.
            "scales": 2 * 10 ** self.rng.uniform(-3, 0.6, shape[0]) / np.prod(shape[1:]) ** 0.5,
            "fraction_bits": int(draw(0, 8)),
            "output_offset": int(draw(-32767, 32768)),
            "residual_multiplier": int(draw(0, 32768)),
        }
        fields["scales"] = fields["scales"].astype("<f4")
        if has_table:
            fields["table"] = draw(-32767, 32768, (2, 64)).astype("<i2")
        return fields


def random_chain(
    rng: np.random.Generator, dtype: DType, is_wild: bool = False, has_converts: bool = False
) -> Chain:
    """Chain some blocks of networks, of 1 to 70 channels and 1 to 40 pixels."""
    shape = int(rng.integers(1, 41)), int(rng.integers(1, 41))
    chain = Chain(rng, shape, dtype, is_wild)
    activation = Activation.RELU6 if rng.random() < 0.25 else Activation.SILU
    is_same = bool(rng.random() < 0.5)

    def channels() -> int:
        return int(rng.integers(1, 71))

    chain.convolution(channels(), 3, int(rng.integers(1, 3)), activation, is_same=is_same)
    for _ in range(int(rng.integers(2, 5))):
        came_in, (_, _, inputs) = chain.current, chain.shape
        stride, kernel = int(rng.choice([1, 1, 2])), int(rng.choice([3, 5]))
        has_residual = stride == 1 and rng.random() < 0.7
        outputs = inputs if has_residual else channels()
        residual = came_in if has_residual else -1
        expanded = channels()
        kinds = ["mbconv", "mbconv", "fused", "single"] + ["convert"] * has_converts
        block = rng.choice(kinds)
        if block == "mbconv":
            if rng.random() < 0.8:
                chain.convolution(expanded, 1, activation=activation)
            chain.convolution(None, kernel, stride, activation, is_same=is_same)
            if rng.random() < 0.7:
                chain.squeeze_excite(int(rng.integers(1, 20)))
            chain.convolution(outputs, 1, residual=residual)
        elif block == "fused":
            chain.convolution(expanded, 3, stride, activation, is_same=is_same)
            chain.convolution(outputs, 1, residual=residual)
        elif block == "single":
            chain.convolution(outputs, 3, stride, activation, residual, is_same)
        else:
            chain.convert()
            chain.convolution(channels(), int(rng.choice([1, 3])), activation=activation)
            chain.convert()
    chain.convolution(channels(), 1, activation=activation)
    return chain


def _before(side: int, kernel: int, stride: int, is_same: bool) -> int:
    if not is_same:
        return kernel // 2
    return max((-(-side // stride) - 1) * stride + kernel - side, 0) // 2
