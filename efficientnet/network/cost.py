"""Variant, image size, batch, precision -> multiply-adds, parameters and bytes of each layer.

Multiply-adds are counted as in the papers (there called FLOPs): convolutions and the classifier;
biases, batch norm, activations, pooling and gates cost nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from efficientnet.network.variants import StageSpec, VariantSpec
from efficientnet.precision import BYTES_PER_VALUE, Precision


class Cost(NamedTuple):
    """What adds up over layers, for one call."""

    multiply_adds: int
    num_parameters: int
    """Trained ones."""
    num_statistics: int
    """Running means and variances of batch norm."""
    weight_bytes: int
    """Read once a call, batch norm folded into the convolutions."""
    activation_bytes: int
    """Maps read and written, when each convolution reads its input and writes its output once and
    everything between two convolutions happens on the way."""

    @property
    def flops(self) -> int:
        """Floating-point operations: two for each multiply-add."""
        return 2 * self.multiply_adds


@dataclass(frozen=True)
class LayerCost:
    """One convolution, squeeze-excite, residual addition or the classifier."""

    name: str
    """Of the module in model.py."""
    stage: int
    """0 = stem, 1.. = stages of blocks, the last = head and classifier."""
    operator: str
    """As people write it: conv 3x3, depthwise 5x5, squeeze-excite, add, linear."""
    in_channels: int
    out_channels: int
    output_size: int
    """Height and width, pixels."""
    cost: Cost


@dataclass(frozen=True)
class DevicePeak:
    """What a device can do at most in one precision."""

    operations_per_s: float
    """Multiplications and additions: two for a multiply-add."""
    bytes_per_s: float
    """To and from memory."""
    source: str
    """Data sheet, or how it was measured."""


def layer_costs(
    spec: VariantSpec,
    image_size: int,
    batch_size: int = 1,
    precision: Precision = "fp32",
    num_classes: int = 1000,
) -> list[LayerCost]:
    """List the layers of a network in the order in which they run."""
    if image_size < 1 or batch_size < 1:
        raise ValueError(
            f"image_size is {image_size} and batch_size {batch_size}, expected at least 1"
        )
    walk = _Walk(batch_size, BYTES_PER_VALUE[precision], image_size)
    walk.convolution("features.0.0", 3, spec.stem_channels, 3, stride=2)
    channels = spec.stem_channels
    for walk.stage, stage in enumerate(spec.stages, start=1):
        for index in range(stage.num_layers):
            name = f"features.{walk.stage}.{index}"
            _block(walk, name, stage, channels, stride=stage.stride if index == 0 else 1)
            channels = stage.out_channels
    walk.stage = len(spec.stages) + 1
    walk.convolution(f"features.{walk.stage}.0", channels, spec.head_channels, 1)
    walk.classifier("classifier.1", spec.head_channels, num_classes)
    return walk.layers


def total_cost(layers: Sequence[LayerCost]) -> Cost:
    """Add up layers."""
    return Cost(*(sum(values) for values in zip(*(layer.cost for layer in layers), strict=True)))


def network_cost(
    spec: VariantSpec,
    image_size: int,
    batch_size: int = 1,
    precision: Precision = "fp32",
    num_classes: int = 1000,
) -> Cost:
    """Add up all layers of a network; see layer_costs."""
    return total_cost(layer_costs(spec, image_size, batch_size, precision, num_classes))


def latency_floor_ms(cost: Cost, peak: DevicePeak) -> float:
    """Return the time below which a call cannot take: computing or moving, whichever is longer.

    Only the weights must be moved: maps may stay in a cache from one layer to the next. So may the
    weights of a small network from one call to the next, whose computing then takes longer.
    """
    compute_s = cost.flops / peak.operations_per_s
    return 1e3 * max(compute_s, cost.weight_bytes / peak.bytes_per_s)


def _block(walk: "_Walk", name: str, stage: StageSpec, in_channels: int, stride: int) -> None:
    # The same modules under the same names as in model.py; a test compares them.
    expanded, out_channels = in_channels * stage.expand_ratio, stage.out_channels
    prefix, kernel_size, index = f"{name}.block", stage.kernel_size, 0
    if stage.operator == "fused_mbconv" and stage.expand_ratio == 1:
        walk.convolution(f"{prefix}.0.0", in_channels, out_channels, kernel_size, stride)
    elif stage.operator == "fused_mbconv":
        walk.convolution(f"{prefix}.0.0", in_channels, expanded, kernel_size, stride)
        walk.convolution(f"{prefix}.1.0", expanded, out_channels, 1)
    else:
        if stage.expand_ratio != 1:
            walk.convolution(f"{prefix}.0.0", in_channels, expanded, 1)
            index = 1
        walk.convolution(f"{prefix}.{index}.0", expanded, expanded, kernel_size, stride, expanded)
        if stage.squeeze_ratio is not None:
            index += 1
            squeezed = squeeze_channels(in_channels, stage.squeeze_ratio)
            walk.squeeze_excite(f"{prefix}.{index}", expanded, squeezed)
        walk.convolution(f"{prefix}.{index + 1}.0", expanded, out_channels, 1)
    if stride == 1 and in_channels == out_channels:
        walk.addition(name, out_channels)


def squeeze_channels(in_channels: int, squeeze_ratio: float) -> int:
    """Return the channels between squeeze-excite's two layers: of the block's input, at least 1."""
    return max(1, int(in_channels * squeeze_ratio))


class _Walk:
    # Follows the size of the maps from layer to layer.
    def __init__(self, batch_size: int, value_bytes: int, image_size: int) -> None:
        self.layers: list[LayerCost] = []
        self.stage = 0
        self._batch_size = batch_size
        self._value_bytes = value_bytes
        self._size = image_size

    def convolution(
        self,
        name: str,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
    ) -> None:
        read = in_channels * self._size**2
        # Either padding gives every stride-th position.
        self._size = -(-self._size // stride)
        num_positions = self._size**2
        num_weights = kernel_size**2 * in_channels // groups * out_channels
        kind = "depthwise" if groups > 1 else "conv"
        self._add(
            name,
            f"{kind} {kernel_size}x{kernel_size}",
            (in_channels, out_channels),
            multiply_adds=num_positions * num_weights,
            num_parameters=num_weights + 2 * out_channels,
            num_statistics=2 * out_channels,
            num_folded=num_weights + out_channels,
            num_moved=read + out_channels * num_positions,
        )

    def squeeze_excite(self, name: str, channels: int, squeezed: int) -> None:
        num_parameters = 2 * channels * squeezed + squeezed + channels
        self._add(
            name,
            "squeeze-excite",
            (channels, channels),
            multiply_adds=2 * channels * squeezed,
            num_parameters=num_parameters,
            num_folded=num_parameters,
            # The means and the gates: the map itself passes once, from convolution to convolution.
            num_moved=2 * channels,
        )

    def addition(self, name: str, channels: int) -> None:
        # The sum is written where the convolution would have written its output.
        self._add(name, "add", (channels, channels), num_moved=channels * self._size**2)

    def classifier(self, name: str, in_channels: int, num_classes: int) -> None:
        num_parameters = in_channels * num_classes + num_classes
        # The head's map is averaged while it is read.
        read = in_channels * self._size**2
        self._size = 1
        self._add(
            name,
            "linear",
            (in_channels, num_classes),
            multiply_adds=in_channels * num_classes,
            num_parameters=num_parameters,
            num_folded=num_parameters,
            num_moved=read + num_classes,
        )

    def _add(
        self,
        name: str,
        operator: str,
        channels: tuple[int, int],
        num_moved: int,
        multiply_adds: int = 0,
        num_parameters: int = 0,
        num_statistics: int = 0,
        num_folded: int = 0,
    ) -> None:
        cost = Cost(
            self._batch_size * multiply_adds,
            num_parameters,
            num_statistics,
            num_folded * self._value_bytes,
            self._batch_size * num_moved * self._value_bytes,
        )
        self.layers.append(LayerCost(name, self.stage, operator, *channels, self._size, cost))
