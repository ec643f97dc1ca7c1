"""VariantSpec -> the network, float32 images [N, 3, H, W] -> logits [N, num_classes].

Blocks as in Tan and Le 2019, section 4 (MBConv), and Tan and Le 2021, figure 2 (Fused-MBConv).
Parameter names equal torchvision's (torchvision/models/efficientnet.py).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear, pad, relu6, silu

from efficientnet.network.cost import squeeze_channels
from efficientnet.network.variants import Activation, NetworkOptions, StageSpec, VariantSpec


class SamePadConv2d(nn.Conv2d):
    """Convolution padded as TensorFlow's SAME: by the size of what comes in."""

    def forward(self, input: Tensor) -> Tensor:
        """Map [N, in, H, W] to [N, out, ceil(H / stride), ceil(W / stride)]."""
        top, bottom = self._margins(input.shape[2])
        left, right = self._margins(input.shape[3])
        if top == bottom and left == right:
            return self._convolve(input, (top, left))
        return self._convolve(pad(input, (left, right, top, bottom)), 0)

    def _convolve(self, input: Tensor, padding: int | tuple[int, int]) -> Tensor:
        # It has a bias once batch norm is folded into it.
        return conv2d(
            input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups
        )

    def _margins(self, size: int) -> tuple[int, int]:
        # Pixels before and after, of which the odd one comes after.
        kernel_size, stride = self.kernel_size[0], self.stride[0]
        num_outputs = (size + stride - 1) // stride
        total = max((num_outputs - 1) * stride + kernel_size - size, 0)
        return total // 2, total - total // 2


class SiLU(nn.Module):
    """x * sigmoid(x), in place unless gradients are asked for.

    For them autograd keeps the input, which an operation in place would have to copy first.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map a tensor to one of the same shape."""
        return silu(x, inplace=not x.requires_grad)


class ReLU6(nn.Module):
    """min(max(x, 0), 6), in place: autograd needs its output only."""

    def forward(self, x: Tensor) -> Tensor:
        """Map a tensor to one of the same shape."""
        return relu6(x, inplace=True)


ACTIVATIONS: dict[Activation, type[nn.Module]] = {"silu": SiLU, "relu6": ReLU6}


class ConvNormAct(nn.Sequential):
    """Convolution without bias -> batch norm -> activation (or nothing)."""

    def __init__(
        self,
        options: NetworkOptions,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        activation: Activation | None = None,
    ) -> None:
        # With stride 1 and an odd kernel both paddings are the same.
        is_same = options.padding == "same" and stride > 1
        conv = (SamePadConv2d if is_same else nn.Conv2d)(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=0 if is_same else (kernel_size - 1) // 2,
            groups=groups,
            bias=False,
        )
        norm = nn.BatchNorm2d(out_channels, options.batch_norm_epsilon, options.batch_norm_momentum)
        super().__init__(conv, norm, *([ACTIVATIONS[activation]()] if activation else []))


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate in (0, 1) computed from the mean of all channels."""

    def __init__(self, channels: int, squeeze_channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeeze_channels, 1)
        self.fc2 = nn.Conv2d(squeeze_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape; without gradients `x` itself is scaled."""
        mean = x.mean((2, 3))  # [N, C]
        # Convolutions in the published layouts, but of one pixel: as matrix products they take a
        # third of the time on a CPU (18 against 57 us for 480 channels, batch 1).
        gate = linear(mean, self.fc1.weight.flatten(1), self.fc1.bias)
        gate = linear(silu(gate, inplace=True), self.fc2.weight.flatten(1), self.fc2.bias)
        gate = gate.sigmoid()[:, :, None, None]  # [N, C, 1, 1]
        return x * gate if x.requires_grad else x.mul_(gate)


class StochasticDepth(nn.Module):
    """While training, drop the residual branch of each image with probability `rate`.

    Huang et al. 2016, "Deep Networks with Stochastic Depth", linear decay rule. What is kept is
    scaled by 1 / (1 - rate), so that evaluation needs no scaling.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        if not self.training or self.rate == 0.0:
            return x
        keep = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(1.0 - self.rate)
        return x * (keep / (1.0 - self.rate))


class Dropout(nn.Module):
    """While training, zero each value with probability `rate`, which may change at any time.

    The rate is a tensor, not a number as in torch's: a compiled network takes a new one without
    being compiled again, and a GPU is not waited for.
    """

    rate: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        # Not a weight: no file holds it, so it is on the CPU even when weights are on `meta`.
        self.register_buffer("rate", torch.tensor(rate, device="cpu"), persistent=False)

    def set_rate(self, rate: float) -> None:
        """Take another rate, 0 <= rate < 1."""
        self.rate.fill_(rate)

    def forward(self, x: Tensor) -> Tensor:
        """Map a tensor to one of the same shape."""
        if not self.training:
            return x
        keep = torch.rand_like(x) >= self.rate
        return x * keep / (1.0 - self.rate)


class ResidualBlock(nn.Module):
    """Layers, and around them the addition of what came in where the shapes allow it."""

    def __init__(
        self,
        options: NetworkOptions,
        spec: StageSpec,
        in_channels: int,
        stride: int,
        stochastic_depth_rate: float,
        activation: Activation,
    ) -> None:
        super().__init__()
        self.block = nn.Sequential(*self._layers(options, spec, in_channels, stride, activation))
        self.stochastic_depth = StochasticDepth(stochastic_depth_rate)
        self.has_residual = stride == 1 and in_channels == spec.out_channels

    def _layers(
        self, options: NetworkOptions, spec: StageSpec, channels: int, stride: int, act: Activation
    ) -> list[nn.Module]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in, H, W] to [N, out, H / stride, W / stride]."""
        out = self.block(x)
        return self.stochastic_depth(out).add_(x) if self.has_residual else out


class MBConv(ResidualBlock):
    """1x1 expansion -> depthwise convolution -> squeeze-excite -> 1x1 projection."""

    def _layers(
        self, options: NetworkOptions, spec: StageSpec, channels: int, stride: int, act: Activation
    ) -> list[nn.Module]:
        expanded, size = channels * spec.expand_ratio, spec.kernel_size
        layers: list[nn.Module] = []
        if spec.expand_ratio != 1:
            layers.append(ConvNormAct(options, channels, expanded, 1, activation=act))
        layers.append(ConvNormAct(options, expanded, expanded, size, stride, expanded, act))
        if spec.squeeze_ratio is not None:
            squeezed = squeeze_channels(channels, spec.squeeze_ratio)
            layers.append(SqueezeExcite(expanded, squeezed))
        return [*layers, ConvNormAct(options, expanded, spec.out_channels, 1)]


class FusedMBConv(ResidualBlock):
    """Full convolution in place of expansion and depthwise -> 1x1 projection.

    With an expand ratio of 1 there is a single convolution, and its activation stays.
    """

    def _layers(
        self, options: NetworkOptions, spec: StageSpec, channels: int, stride: int, act: Activation
    ) -> list[nn.Module]:
        is_single, size = spec.expand_ratio == 1, spec.kernel_size
        expanded = spec.out_channels if is_single else channels * spec.expand_ratio
        first = ConvNormAct(options, channels, expanded, size, stride, activation=act)
        if is_single:
            return [first]
        return [first, ConvNormAct(options, expanded, spec.out_channels, 1)]


BLOCKS = {"mbconv": MBConv, "fused_mbconv": FusedMBConv}


class EfficientNet(nn.Module):
    """Stem -> stages of blocks -> 1x1 head -> mean -> dropout -> classifier.

    Of N blocks, block i drops with `stochastic_depth_rate` * i / N while training.
    """

    def __init__(
        self,
        spec: VariantSpec,
        num_classes: int,
        options: NetworkOptions,
        stochastic_depth_rate: float = 0.0,
    ) -> None:
        super().__init__()
        channels, block_index = spec.stem_channels, 0
        layers: list[nn.Module] = [
            ConvNormAct(options, 3, channels, 3, stride=2, activation=spec.activation)
        ]
        for stage in spec.stages:
            blocks: list[nn.Module] = []
            for layer in range(stage.num_layers):
                rate = stochastic_depth_rate * block_index / spec.num_blocks
                stride = stage.stride if layer == 0 else 1
                block = BLOCKS[stage.operator]
                blocks.append(block(options, stage, channels, stride, rate, spec.activation))
                channels, block_index = stage.out_channels, block_index + 1
            layers.append(nn.Sequential(*blocks))
        layers.append(
            ConvNormAct(options, channels, spec.head_channels, 1, activation=spec.activation)
        )
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            Dropout(spec.dropout_rate), nn.Linear(spec.head_channels, num_classes)
        )

    @property
    def num_classes(self) -> int:
        """Length of the logits."""
        layer = self.classifier[1]
        assert isinstance(layer, nn.Linear)
        return layer.out_features

    @property
    def dropout(self) -> Dropout:
        """The dropout before the classifier."""
        module = self.classifier[0]
        assert isinstance(module, Dropout)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to logits [N, num_classes]."""
        x = self.features(x)
        x = self.avgpool(x).flatten(1)  # [N, head_channels]
        return self.classifier(x)


def build_model(
    spec: VariantSpec,
    num_classes: int,
    stochastic_depth_rate: float = 0.0,
    options: NetworkOptions | None = None,
) -> EfficientNet:
    """Build a network with Google's initial weights, drawn from torch's global generator.

    Under `torch.device("meta")` it has no weights, and none are drawn.
    """
    model = EfficientNet(spec, num_classes, options or NetworkOptions(), stochastic_depth_rate)
    if next(model.parameters()).is_meta:
        return model  # torch would load its compiler to draw nothing: 2.6 s in a new process
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # The fan-out of a depthwise kernel counts one channel (google/automl,
            # efficientnetv2/effnetv2_model.py); torchvision counts them all.
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init_classifier(module)
    return model


def init_classifier(layer: nn.Linear) -> None:
    """Draw the classifier's initial weights: uniform in +-1 / sqrt(classes), bias 0."""
    # Google's fan-out rule is made for 1000 classes; with 10 it starts with logits of +-6, and the
    # digits were at 36 % after three epochs instead of 77 %.
    bound = 1.0 / math.sqrt(max(layer.out_features, 1000))
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.zeros_(layer.bias)
