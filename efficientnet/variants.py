"""Variant name -> its table of stages, as printed in the papers.

EfficientNetV2: Tan and Le 2021 (arXiv 2104.00298 v3), Table 4 for S; the released code
(google/automl, efficientnetv2/effnetv2_configs.py) for M, L and XL.
"""

import difflib
from dataclasses import dataclass
from typing import Literal

Operator = Literal["mbconv", "fused_mbconv"]


@dataclass(frozen=True)
class StageSpec:
    """One row of the architecture table: `num_layers` blocks, the first of which has the stride."""

    operator: Operator
    num_layers: int
    out_channels: int
    stride: int
    expand_ratio: int
    kernel_size: int = 3
    squeeze_ratio: float | None = None
    """Squeeze-excite channels as a fraction of the block's *input* channels; None = no
    squeeze-excite."""


@dataclass(frozen=True)
class VariantSpec:
    """An architecture size."""

    name: str
    stem_channels: int
    stages: tuple[StageSpec, ...]
    head_channels: int
    dropout_rate: float
    """Dropout before the classifier as released; a recipe may schedule another."""
    train_image_size: int
    eval_image_size: int


def _fused(num_layers: int, out_channels: int, stride: int, expand_ratio: int) -> StageSpec:
    return StageSpec("fused_mbconv", num_layers, out_channels, stride, expand_ratio)


def _mbconv(num_layers: int, out_channels: int, stride: int, expand_ratio: int) -> StageSpec:
    return StageSpec("mbconv", num_layers, out_channels, stride, expand_ratio, squeeze_ratio=0.25)


VARIANTS: dict[str, VariantSpec] = {
    spec.name: spec
    for spec in (
        VariantSpec(
            name="v2-s",
            stem_channels=24,
            stages=(
                _fused(2, 24, stride=1, expand_ratio=1),
                _fused(4, 48, stride=2, expand_ratio=4),
                _fused(4, 64, stride=2, expand_ratio=4),
                _mbconv(6, 128, stride=2, expand_ratio=4),
                _mbconv(9, 160, stride=1, expand_ratio=6),
                _mbconv(15, 256, stride=2, expand_ratio=6),
            ),
            head_channels=1280,
            dropout_rate=0.2,
            train_image_size=300,
            eval_image_size=384,
        ),
        VariantSpec(
            name="v2-m",
            stem_channels=24,
            stages=(
                _fused(3, 24, stride=1, expand_ratio=1),
                _fused(5, 48, stride=2, expand_ratio=4),
                _fused(5, 80, stride=2, expand_ratio=4),
                _mbconv(7, 160, stride=2, expand_ratio=4),
                _mbconv(14, 176, stride=1, expand_ratio=6),
                _mbconv(18, 304, stride=2, expand_ratio=6),
                _mbconv(5, 512, stride=1, expand_ratio=6),
            ),
            head_channels=1280,
            dropout_rate=0.3,
            train_image_size=384,
            eval_image_size=480,
        ),
        VariantSpec(
            name="v2-l",
            stem_channels=32,
            stages=(
                _fused(4, 32, stride=1, expand_ratio=1),
                _fused(7, 64, stride=2, expand_ratio=4),
                _fused(7, 96, stride=2, expand_ratio=4),
                _mbconv(10, 192, stride=2, expand_ratio=4),
                _mbconv(19, 224, stride=1, expand_ratio=6),
                _mbconv(25, 384, stride=2, expand_ratio=6),
                _mbconv(7, 640, stride=1, expand_ratio=6),
            ),
            head_channels=1280,
            dropout_rate=0.4,
            train_image_size=384,
            eval_image_size=480,
        ),
        # Not from the papers: every kind of block once or twice, small enough to train in a test.
        VariantSpec(
            name="tiny",
            stem_channels=8,
            stages=(
                _fused(1, 8, stride=1, expand_ratio=1),
                _fused(2, 16, stride=2, expand_ratio=4),
                _mbconv(2, 24, stride=2, expand_ratio=4),
                _mbconv(2, 32, stride=1, expand_ratio=6),
            ),
            head_channels=128,
            dropout_rate=0.1,
            train_image_size=32,
            eval_image_size=32,
        ),
    )
}


def get_variant(name: str) -> VariantSpec:
    """Return the variant called `name`.

    Raises:
        ValueError: there is no such variant; the message gives the nearest names.
    """
    if name not in VARIANTS:
        nearest = difflib.get_close_matches(name, VARIANTS, cutoff=0.0)
        raise ValueError(
            f"unknown variant {name!r}: the nearest are {', '.join(nearest)}; "
            f"all variants: {', '.join(VARIANTS)}"
        )
    return VARIANTS[name]
