"""Variant name -> its table of stages, as printed in the papers.

EfficientNet (V1): Tan and Le 2019 (arXiv 1905.11946), table 1 for B0. EfficientNetV2: Tan and Le
2021 (arXiv 2104.00298 v3), table 4 for S; the released code (google/automl,
efficientnetv2/effnetv2_configs.py) for M, L, XL, B0 to B3, and for V1's scaling coefficients.
EfficientNet-Lite has no paper: tensorflow/tpu, models/official/efficientnet/lite.
"""

import difflib
import re
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from efficientnet.network.scaling import (
    V1_MIN_KEPT_CHANNELS,
    V2_MIN_KEPT_CHANNELS,
    CompoundScale,
    scale_channels,
    scale_layers,
)

Operator = Literal["mbconv", "fused_mbconv"]
Padding = Literal["same", "symmetric"]
Activation = Literal["silu", "relu6"]
ScalingRule = Literal["v1", "v2"]

# Of V2's rule: evaluation no larger, pixels; and the stages that get the layers instead (5 and 6 of
# V2-S).
MAX_SCALED_IMAGE_SIZE, NUM_LATE_STAGES = 480, 2


class NetworkOptions(BaseModel):
    """How the same tensors are computed with; stored in checkpoints, as weights fit one way only.

    The defaults of batch norm are Google's for V1 and V2 (paper: TensorFlow's momentum 0.99 is
    torch's 0.01; the released V2 code has 0.1).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    padding: Padding = "symmetric"
    """same: TensorFlow's, computed from the input's size, where the odd pixel goes to the bottom
    and right; symmetric: half the kernel on every side. They differ at stride 2 for even sizes."""
    batch_norm_epsilon: float = Field(default=1e-3, gt=0)
    batch_norm_momentum: float = Field(default=0.01, gt=0, le=1)
    """Weight of a new batch in the running statistics (torch's convention)."""


# Of a stage and of a network, so that a slip in a file does not ask for terabytes.
MAX_LAYERS, MAX_CHANNELS, MAX_EXPAND_RATIO, MAX_KERNEL_SIZE, MAX_STAGES = 100, 10_000, 16, 11, 30

# Folders of runs and artifacts are called so.
NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")


@dataclass(frozen=True)
class StageSpec:
    """One row of the architecture table: `num_layers` blocks, the first of which has the stride."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    operator: Operator
    num_layers: int
    out_channels: int
    stride: int
    expand_ratio: int
    kernel_size: int = 3
    squeeze_ratio: float | None = None
    """Squeeze-excite channels as a fraction of the block's *input* channels; None = no
    squeeze-excite."""

    def __post_init__(self) -> None:
        """Check the limits, and that no value contradicts another."""
        _require_range("num_layers", self.num_layers, MAX_LAYERS)
        _require_range("out_channels", self.out_channels, MAX_CHANNELS)
        _require_range("stride", self.stride, 2)
        _require_range("expand_ratio", self.expand_ratio, MAX_EXPAND_RATIO)
        _require_range("kernel_size", self.kernel_size, MAX_KERNEL_SIZE)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}, expected an odd one")
        if self.squeeze_ratio is None:
            return
        if not 0 < self.squeeze_ratio <= 1:
            raise ValueError(
                f"squeeze_ratio is {self.squeeze_ratio}, expected more than 0 and at most 1, or "
                "null for none"
            )
        if self.operator == "fused_mbconv":
            raise ValueError(
                f"operator is fused_mbconv and squeeze_ratio {self.squeeze_ratio}: Fused-MBConv "
                "has no squeeze-excite here; leave squeeze_ratio out, or take mbconv"
            )


@dataclass(frozen=True)
class PublishedResult:
    """What a paper reports for a variant; None where it reports nothing."""

    source: str
    top1: float
    """ImageNet, 0..1."""
    latency_ms: float | None = None
    """V100, FP16, batch 16 (V2's table 7)."""
    training_hours: float | None = None
    """On 32 TPU cores (V2's table 7)."""


@dataclass(frozen=True)
class VariantSpec:
    """An architecture size."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")

    name: str
    stem_channels: int
    stages: tuple[StageSpec, ...]
    head_channels: int
    dropout_rate: float
    """Dropout before the classifier as released; a recipe may schedule another."""
    train_image_size: int
    eval_image_size: int
    stochastic_depth_rate: float = 0.2
    """Drop rate that the last block approaches: survival 0.8 in both papers."""
    activation: Activation = "silu"
    """Of all convolutions but the projections; relu6 is SiLU's stand-in where 8 bits are wanted."""
    has_fixed_ends: bool = False
    """Whether scaling leaves stem, head and the number of layers of the first and last stage."""
    published: PublishedResult | None = None

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(
                f"name is {self.name!r}, expected up to 64 of a-z, 0-9, hyphens and dots, as "
                "folders are called after it"
            )
        _require_range("stages", len(self.stages), MAX_STAGES)
        for field in ("stem_channels", "head_channels"):
            _require_range(field, getattr(self, field), MAX_CHANNELS)
        for field in ("dropout_rate", "stochastic_depth_rate"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, expected 0 <= rate < 1")
        for field in ("train_image_size", "eval_image_size"):
            if not 16 <= getattr(self, field) <= 1024:
                raise ValueError(f"{field} is {getattr(self, field)}, expected 16 to 1024 pixels")

    @property
    def num_blocks(self) -> int:
        """Blocks of all stages."""
        return sum(stage.num_layers for stage in self.stages)


def _require_range(name: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise ValueError(f"{name} is {value}, expected 1 to {most}")


def _fused(num_layers: int, out_channels: int, stride: int, expand_ratio: int) -> StageSpec:
    return StageSpec("fused_mbconv", num_layers, out_channels, stride, expand_ratio)


def _mbconv(
    num_layers: int, out_channels: int, stride: int, expand_ratio: int, kernel_size: int = 3
) -> StageSpec:
    return StageSpec(
        "mbconv", num_layers, out_channels, stride, expand_ratio, kernel_size, squeeze_ratio=0.25
    )


def scale_variant(base: VariantSpec, width: float, depth: float, min_kept: float) -> VariantSpec:
    """Scale the channels and layers of `base`, stem and head included; sizes stay.

    What `base.has_fixed_ends` names stays, too.
    """

    def channels(count: int) -> int:
        return scale_channels(count, width, min_kept)

    fixed = {0, len(base.stages) - 1} if base.has_fixed_ends else set[int]()
    stages = tuple(
        replace(
            stage,
            num_layers=stage.num_layers if i in fixed else scale_layers(stage.num_layers, depth),
            out_channels=channels(stage.out_channels),
        )
        for i, stage in enumerate(base.stages)
    )
    scaled = replace(base, stages=stages)
    if base.has_fixed_ends:
        return scaled
    return replace(
        scaled,
        stem_channels=channels(base.stem_channels),
        head_channels=channels(base.head_channels),
    )


def scale_up(base: VariantSpec, scale: CompoundScale, rule: ScalingRule, name: str) -> VariantSpec:
    """Make a larger network of `base`, its image sizes included.

    v1: stem, stages, head and image grow together (Tan and Le 2019, section 3.3). v2 (Tan and Le
    2021, section 3.3): the head stays, the evaluation's size stops at 480 px, and more layers go
    into the late stages; how many, the paper does not say: here as many as make up for the pixels
    that the cap takes away, in the last two stages.
    """
    wanted = round(base.eval_image_size * scale.resolution)
    if rule == "v1":
        size, late_depth = wanted, scale.depth
        scaled = scale_variant(base, scale.width, scale.depth, V1_MIN_KEPT_CHANNELS)
    else:
        size = min(wanted, max(MAX_SCALED_IMAGE_SIZE, base.eval_image_size))
        late_depth = scale.depth * (wanted / size) ** 2
        scaled = scale_variant(base, scale.width, scale.depth, V2_MIN_KEPT_CHANNELS)
        scaled = replace(scaled, head_channels=base.head_channels)
    first_late = len(base.stages) - NUM_LATE_STAGES
    stages = tuple(
        replace(stage, num_layers=scale_layers(own.num_layers, late_depth))
        if rule == "v2" and index >= first_late
        else stage
        for index, (stage, own) in enumerate(zip(scaled.stages, base.stages, strict=True))
    )
    return replace(
        scaled,
        name=name,
        stages=stages,
        train_image_size=max(16, size * 4 // 5 // 16 * 16),
        eval_image_size=size,
        published=None,
    )


def _network(
    name: str,
    stem_channels: int,
    stages: tuple[StageSpec, ...],
    dropout_rate: float,
    sizes: tuple[int, int],
    published: PublishedResult | None = None,
    head_channels: int = 1280,
) -> VariantSpec:
    return VariantSpec(
        name, stem_channels, stages, head_channels, dropout_rate, *sizes, published=published
    )


# Name, width, depth, size in training and in evaluation, dropout, published.
_Row = tuple[str, float, float, int, int, float, PublishedResult | None]


def _scaled(base: VariantSpec, min_kept: float, rows: tuple[_Row, ...]) -> list[VariantSpec]:
    return [
        replace(
            scale_variant(base, width, depth, min_kept),
            name=name,
            dropout_rate=dropout,
            train_image_size=train_size,
            eval_image_size=eval_size,
            published=published,
        )
        for name, width, depth, train_size, eval_size, dropout, published in rows
    ]


_TABLE_2, _TABLE_3, _TABLE_7, _TABLE_11 = (
    "V1, table 2",
    "V2, table 3",
    "V2, table 7",
    "V2, table 11",
)

_V1_B0 = _network(
    "b0",
    32,
    (
        _mbconv(1, 16, stride=1, expand_ratio=1),
        _mbconv(2, 24, stride=2, expand_ratio=6),
        _mbconv(2, 40, stride=2, expand_ratio=6, kernel_size=5),
        _mbconv(3, 80, stride=2, expand_ratio=6),
        _mbconv(3, 112, stride=1, expand_ratio=6, kernel_size=5),
        _mbconv(4, 192, stride=2, expand_ratio=6, kernel_size=5),
        _mbconv(1, 320, stride=1, expand_ratio=6),
    ),
    dropout_rate=0.2,
    sizes=(176, 224),
)

# The train size is the released code's: 0.8 of the eval size, down to a multiple of 16.
_V1_ROWS: tuple[_Row, ...] = (
    ("b0", 1.0, 1.0, 176, 224, 0.2, PublishedResult(_TABLE_2, 0.771)),
    ("b1", 1.0, 1.1, 192, 240, 0.2, PublishedResult(_TABLE_2, 0.791)),
    ("b2", 1.1, 1.2, 208, 260, 0.3, PublishedResult(_TABLE_2, 0.801)),
    ("b3", 1.2, 1.4, 240, 300, 0.3, PublishedResult(_TABLE_7, 0.815, 19, 10)),
    ("b4", 1.4, 1.8, 304, 380, 0.4, PublishedResult(_TABLE_7, 0.829, 30, 21)),
    ("b5", 1.6, 2.2, 352, 456, 0.4, PublishedResult(_TABLE_7, 0.837, 60, 43)),
    ("b6", 1.8, 2.6, 416, 528, 0.5, PublishedResult(_TABLE_7, 0.843, 97, 75)),
    ("b7", 2.0, 3.1, 480, 600, 0.5, PublishedResult(_TABLE_7, 0.847, 170, 139)),
    # Of the released code; published weights are by Xie et al. 2020 (arXiv 1911.09665).
    ("b8", 2.2, 3.6, 528, 672, 0.5, None),
)

_LITE0 = replace(
    _V1_B0,
    name="lite0",
    stages=tuple(replace(stage, squeeze_ratio=None) for stage in _V1_B0.stages),
    activation="relu6",
    has_fixed_ends=True,
)

# The top-1 is that of float32.
_LITE_ROWS: tuple[_Row, ...] = (
    ("lite0", 1.0, 1.0, 224, 224, 0.2, PublishedResult("released code", 0.751)),
    ("lite1", 1.0, 1.1, 240, 240, 0.2, PublishedResult("released code", 0.767)),
    ("lite2", 1.1, 1.2, 260, 260, 0.3, PublishedResult("released code", 0.776)),
    ("lite3", 1.2, 1.4, 280, 280, 0.3, PublishedResult("released code", 0.798)),
    ("lite4", 1.4, 1.8, 300, 300, 0.3, PublishedResult("released code", 0.815)),
)

_V2_B0 = _network(
    "v2-b0",
    32,
    (
        _fused(1, 16, stride=1, expand_ratio=1),
        _fused(2, 32, stride=2, expand_ratio=4),
        _fused(2, 48, stride=2, expand_ratio=4),
        _mbconv(3, 96, stride=2, expand_ratio=4),
        _mbconv(5, 112, stride=1, expand_ratio=6),
        _mbconv(8, 192, stride=2, expand_ratio=6),
    ),
    dropout_rate=0.2,
    sizes=(192, 224),
)

_V2_B_ROWS: tuple[_Row, ...] = (
    ("v2-b0", 1.0, 1.0, 192, 224, 0.2, PublishedResult(_TABLE_11, 0.787)),
    ("v2-b1", 1.0, 1.1, 192, 240, 0.2, PublishedResult(_TABLE_11, 0.798)),
    ("v2-b2", 1.1, 1.2, 208, 260, 0.3, None),
    ("v2-b3", 1.2, 1.4, 240, 300, 0.3, PublishedResult(_TABLE_11, 0.821)),
)


def _fuse_first_stages(base: VariantSpec, num_stages: int, top1: float) -> VariantSpec:
    """Replace MBConv by Fused-MBConv in the first stages, as in V2's table 3.

    The paper does not say what becomes of the kernels and of squeeze-excite. Here the fused blocks
    have no squeeze-excite, the third stage's 5 x 5 kernel becomes 3 x 3 and the others stay: of the
    readings that were tried the only one within 3 % of every printed figure.
    """
    fused = tuple(
        replace(
            stage,
            operator="fused_mbconv",
            squeeze_ratio=None,
            kernel_size=3 if number == 3 else stage.kernel_size,
        )
        for number, stage in enumerate(base.stages[:num_stages], start=1)
    )
    return replace(
        base,
        name=f"{base.name}-fused-1-{num_stages}",
        stages=fused + base.stages[num_stages:],
        published=PublishedResult(_TABLE_3, top1),
    )


_V1 = _scaled(_V1_B0, V1_MIN_KEPT_CHANNELS, _V1_ROWS)
_B4 = _V1[4]

_SPECS = (
    *_V1,
    _fuse_first_stages(_B4, 3, top1=0.831),
    _fuse_first_stages(_B4, 5, top1=0.831),
    _fuse_first_stages(_B4, 7, top1=0.817),
    *_scaled(_LITE0, V1_MIN_KEPT_CHANNELS, _LITE_ROWS),
    *_scaled(_V2_B0, V2_MIN_KEPT_CHANNELS, _V2_B_ROWS),
    _network(
        "v2-s",
        24,
        (
            _fused(2, 24, stride=1, expand_ratio=1),
            _fused(4, 48, stride=2, expand_ratio=4),
            _fused(4, 64, stride=2, expand_ratio=4),
            _mbconv(6, 128, stride=2, expand_ratio=4),
            _mbconv(9, 160, stride=1, expand_ratio=6),
            _mbconv(15, 256, stride=2, expand_ratio=6),
        ),
        dropout_rate=0.2,
        sizes=(300, 384),
        published=PublishedResult(_TABLE_7, 0.839, 24, 7.1),
    ),
    _network(
        "v2-m",
        24,
        (
            _fused(3, 24, stride=1, expand_ratio=1),
            _fused(5, 48, stride=2, expand_ratio=4),
            _fused(5, 80, stride=2, expand_ratio=4),
            _mbconv(7, 160, stride=2, expand_ratio=4),
            _mbconv(14, 176, stride=1, expand_ratio=6),
            _mbconv(18, 304, stride=2, expand_ratio=6),
            _mbconv(5, 512, stride=1, expand_ratio=6),
        ),
        dropout_rate=0.3,
        sizes=(384, 480),
        published=PublishedResult(_TABLE_7, 0.851, 57, 13),
    ),
    _network(
        "v2-l",
        32,
        (
            _fused(4, 32, stride=1, expand_ratio=1),
            _fused(7, 64, stride=2, expand_ratio=4),
            _fused(7, 96, stride=2, expand_ratio=4),
            _mbconv(10, 192, stride=2, expand_ratio=4),
            _mbconv(19, 224, stride=1, expand_ratio=6),
            _mbconv(25, 384, stride=2, expand_ratio=6),
            _mbconv(7, 640, stride=1, expand_ratio=6),
        ),
        dropout_rate=0.4,
        sizes=(384, 480),
        published=PublishedResult(_TABLE_7, 0.857, 98, 24),
    ),
    _network(
        "v2-xl",
        32,
        (
            _fused(4, 32, stride=1, expand_ratio=1),
            _fused(8, 64, stride=2, expand_ratio=4),
            _fused(8, 96, stride=2, expand_ratio=4),
            _mbconv(16, 192, stride=2, expand_ratio=4),
            _mbconv(24, 256, stride=1, expand_ratio=6),
            _mbconv(32, 512, stride=2, expand_ratio=6),
            _mbconv(8, 640, stride=1, expand_ratio=6),
        ),
        dropout_rate=0.4,
        sizes=(384, 512),
        published=PublishedResult("V2, table 7, pre-trained on 21k", 0.873, None, 45),
    ),
    # Not from the papers: every kind of block once or twice, small enough to train in a test.
    _network(
        "tiny",
        8,
        (
            _fused(1, 8, stride=1, expand_ratio=1),
            _fused(2, 16, stride=2, expand_ratio=4),
            _mbconv(2, 24, stride=2, expand_ratio=4),
            _mbconv(2, 32, stride=1, expand_ratio=6),
        ),
        dropout_rate=0.1,
        sizes=(32, 32),
        head_channels=128,
    ),
)

VARIANTS: dict[str, VariantSpec] = {spec.name: spec for spec in _SPECS}


def get_variant(name: str) -> VariantSpec:
    """Return the variant called `name`."""
    if name not in VARIANTS:
        nearest = difflib.get_close_matches(name, VARIANTS, cutoff=0.0)
        raise ValueError(
            f"unknown variant {name!r}: the nearest are {', '.join(nearest)}; "
            f"all variants: {', '.join(VARIANTS)}"
        )
    return VARIANTS[name]


def spec_of(name: str, table: VariantSpec | None) -> VariantSpec:
    """Return `table`, the stages of a variant that is not built in, or the built-in variant."""
    if table is None:
        return get_variant(name)
    if table.name != name:
        raise ValueError(f"the table of stages is called {table.name!r}, the variant {name!r}")
    require_own_name(table)
    return table


def require_own_name(table: VariantSpec) -> None:
    """Raise a ValueError if a table of one's own is called like a built-in variant."""
    if table.name in VARIANTS:
        raise ValueError(
            f"a table of stages is called {table.name!r} like a built-in variant: give it another "
            "name"
        )
