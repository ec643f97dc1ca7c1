"""VariantSpec -> the network, float32 images [N, 3, H, W] -> logits [N, num_classes].

Blocks as in Tan and Le 2019, section 4 (MBConv), and Tan and Le 2021, figure 2 (Fused-MBConv).
Parameter names equal torchvision's (torchvision/models/efficientnet.py), so that published weights
need no key map.
"""

import copy
import math

import torch
from torch import Tensor, nn

from efficientnet.variants import StageSpec, VariantSpec

# Google's value for all of EfficientNet, V1 and V2; torch's own default is 1e-5.
BATCH_NORM_EPSILON = 1e-3


class ConvNormAct(nn.Sequential):
    """Convolution without bias -> batch norm -> SiLU (or nothing), padded by half the kernel."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        has_activation: bool = True,
    ) -> None:
        conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=(kernel_size - 1) // 2,
            groups=groups,
            bias=False,
        )
        norm = nn.BatchNorm2d(out_channels, eps=BATCH_NORM_EPSILON)
        super().__init__(conv, norm, *([nn.SiLU(inplace=True)] if has_activation else []))


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate in (0, 1) computed from the mean of all channels."""

    def __init__(self, channels: int, squeeze_channels: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeeze_channels, 1)
        self.activation = nn.SiLU(inplace=True)
        self.fc2 = nn.Conv2d(squeeze_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        gate = self.avgpool(x)  # [N, C, 1, 1]
        gate = self.fc2(self.activation(self.fc1(gate)))
        return x * gate.sigmoid()


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


class MBConv(nn.Module):
    """1x1 expansion -> depthwise convolution -> squeeze-excite -> 1x1 projection."""

    def __init__(
        self, spec: StageSpec, in_channels: int, stride: int, stochastic_depth_rate: float
    ) -> None:
        super().__init__()
        expanded = in_channels * spec.expand_ratio
        layers: list[nn.Module] = []
        if spec.expand_ratio != 1:
            layers.append(ConvNormAct(in_channels, expanded, 1))
        layers.append(ConvNormAct(expanded, expanded, spec.kernel_size, stride, groups=expanded))
        if spec.squeeze_ratio is not None:
            layers.append(SqueezeExcite(expanded, max(1, int(in_channels * spec.squeeze_ratio))))
        layers.append(ConvNormAct(expanded, spec.out_channels, 1, has_activation=False))
        self.block = nn.Sequential(*layers)
        self.stochastic_depth = StochasticDepth(stochastic_depth_rate)
        self.has_residual = stride == 1 and in_channels == spec.out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in, H, W] to [N, out, H / stride, W / stride]."""
        out = self.block(x)
        return x + self.stochastic_depth(out) if self.has_residual else out


class FusedMBConv(nn.Module):
    """Full convolution in place of expansion and depthwise -> 1x1 projection.

    With an expand ratio of 1 there is a single convolution, and its activation stays.
    """

    def __init__(
        self, spec: StageSpec, in_channels: int, stride: int, stochastic_depth_rate: float
    ) -> None:
        super().__init__()
        expanded = in_channels * spec.expand_ratio
        if spec.expand_ratio == 1:
            layers = [ConvNormAct(in_channels, spec.out_channels, spec.kernel_size, stride)]
        else:
            layers = [
                ConvNormAct(in_channels, expanded, spec.kernel_size, stride),
                ConvNormAct(expanded, spec.out_channels, 1, has_activation=False),
            ]
        self.block = nn.Sequential(*layers)
        self.stochastic_depth = StochasticDepth(stochastic_depth_rate)
        self.has_residual = stride == 1 and in_channels == spec.out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in, H, W] to [N, out, H / stride, W / stride]."""
        out = self.block(x)
        return x + self.stochastic_depth(out) if self.has_residual else out


BLOCKS = {"mbconv": MBConv, "fused_mbconv": FusedMBConv}


class EfficientNet(nn.Module):
    """Stem -> stages of blocks -> 1x1 head -> mean -> dropout -> classifier.

    Args:
        spec: the table of stages.
        num_classes: length of the logits.
        stochastic_depth_rate: drop rate that block i of N approaches as rate * i / N; training
        only.
    """

    def __init__(
        self, spec: VariantSpec, num_classes: int, stochastic_depth_rate: float = 0.0
    ) -> None:
        super().__init__()
        num_blocks = sum(stage.num_layers for stage in spec.stages)
        channels, block_index = spec.stem_channels, 0
        layers: list[nn.Module] = [ConvNormAct(3, channels, 3, stride=2)]
        for stage in spec.stages:
            blocks: list[nn.Module] = []
            for layer in range(stage.num_layers):
                rate = stochastic_depth_rate * block_index / num_blocks
                stride = stage.stride if layer == 0 else 1
                blocks.append(BLOCKS[stage.operator](stage, channels, stride, rate))
                channels, block_index = stage.out_channels, block_index + 1
            layers.append(nn.Sequential(*blocks))
        layers.append(ConvNormAct(channels, spec.head_channels, 1))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Dropout(spec.dropout_rate), nn.Linear(spec.head_channels, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to logits [N, num_classes]."""
        x = self.features(x)
        x = self.avgpool(x).flatten(1)  # [N, head_channels]
        return self.classifier(x)


def build_model(
    spec: VariantSpec, num_classes: int, stochastic_depth_rate: float = 0.0
) -> EfficientNet:
    """Build a network with Google's initial weights, drawn from torch's global generator.

    Convolutions are normal with variance 2 / fan_out, where the fan-out of a depthwise kernel
    counts one channel (google/automl, efficientnetv2/effnetv2_model.py); torchvision counts them
    all.
    """
    model = EfficientNet(spec, num_classes, stochastic_depth_rate)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            # Google's fan-out rule is made for 1000 classes; with 10 it starts with logits of +-6,
            # and the digits were at 36 % after three epochs instead of 77 %.
            bound = 1.0 / math.sqrt(max(module.out_features, 1000))
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)
    return model


def count_multiply_adds(model: nn.Module, image_size: int) -> int:
    """Count the multiply-adds of the convolutions and the classifier for one square image.

    Biases, batch norm, activations and pooling count as nothing, as in the papers. Nothing is
    computed: a copy without memory is traced.
    """
    model = copy.deepcopy(model).to("meta").eval()
    total = 0

    def count(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            per_output = math.prod(module.kernel_size) * module.in_channels // module.groups
        else:
            assert isinstance(module, nn.Linear)
            per_output = module.in_features
        total += output.numel() * per_output

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.empty(1, 3, image_size, image_size, device="meta"))
    return total
