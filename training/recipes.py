"""The values chosen for each variant, with their source: a recipe for folders, one for the digits.

V2-S, M and L: Tan and Le 2021 (arXiv 2104.00298 v3), section 4 and Table 6. V1: Tan and Le 2019
(arXiv 1905.11946), section 5.2. Where the papers are silent the released code decides
(google/automl, efficientnetv2).
"""

from pathlib import Path

from efficientnet.variants import VARIANTS, VariantSpec
from training.config import OptimizerConfig, ProgressiveConfig, TrainConfig

# Table 6: RandAugment magnitude, Mixup alpha and dropout of the last stage.
PAPER_PROGRESSIVE = {
    "v2-s": ProgressiveConfig((128, 300), (5, 15), (0, 0), (0.1, 0.3)),
    "v2-m": ProgressiveConfig((128, 380), (5, 20), (0, 0.2), (0.1, 0.4)),
    "v2-l": ProgressiveConfig((128, 380), (5, 25), (0, 0.4), (0.1, 0.5)),
    # Not in the table: the released code's last values, with L's first ones.
    "v2-xl": ProgressiveConfig((128, 384), (5, 20), (0, 0.5), (0.1, 0.4)),
    "tiny": ProgressiveConfig((16, 32), (5, 10), (0, 0.1), (0.1, 0.2)),
}

# The paper's optimizer line; warm-up length and the exclusion of biases and norms as released.
PAPER_OPTIMIZER = OptimizerConfig(
    name="rmsprop",
    learning_rate=0.016,  # 0.256 at the paper's batch of 4096
    schedule="exponential",
    warmup_epochs=5,
    weight_decay=1e-5,
    ema_decay=0.9999,
)

# Chosen here, for 1,437 images of 8 x 8 pixels and a CPU: top-1 is what they were chosen by.
DIGITS_PROGRESSIVE = {
    "tiny": ProgressiveConfig((16, 32), (3, 6), (0, 0.1), (0.0, 0.1)),
}
# From 50 px on the last stages see maps of 4 and 2 pixels as at 64 px, and what a stage has learned
# holds at the next size: 82 % of the held-out digits after half of the epochs. From 40 px (maps of
# 3 and 2) it was 29 %, from 32 px (a map of 1, so that eight of nine depthwise weights are never
# trained) worse than guessing; and a step costs almost the same, since the weights set its time.
DIGITS_PROGRESSIVE_DEFAULT = ProgressiveConfig((50, 64), (3, 6), (0, 0.1), (0.1, 0.2))


def paper_recipe(variant: str) -> TrainConfig:
    """Return the paper's recipe for ImageNet-like folders.

    V1 and V2-B train at one size with AutoAugment. Below 320 px evaluation cuts out the centre,
    from there on it squashes, as the released code does.
    """
    spec = VARIANTS[variant]
    eval_size = spec.eval_image_size
    is_progressive = variant in PAPER_PROGRESSIVE
    return TrainConfig(
        variant=variant,
        progressive=PAPER_PROGRESSIVE[variant] if is_progressive else one_size(spec),
        optimizer=PAPER_OPTIMIZER,
        epochs=350,
        batch_size=4096,
        micro_batch_size=32,
        eval_image_size=eval_size,
        crop_fraction=eval_size / (eval_size + 32) if eval_size < 320 else None,
        interpolation="bilinear",
        min_crop_area=0.05,
        horizontal_flip=True,
        num_randaugment_layers=2,
        autoaugment=not is_progressive,
        label_smoothing=0.1,
        stochastic_depth_rate=spec.stochastic_depth_rate,
        batch_norm_momentum=0.01,
    )


def one_size(spec: VariantSpec) -> ProgressiveConfig:
    """Return no progression: the variant's own train size and dropout throughout."""
    size, dropout = spec.train_image_size, spec.dropout_rate
    return ProgressiveConfig((size, size), (0, 0), (0, 0), (dropout, dropout), num_stages=1)


def digits_recipe(variant: str) -> TrainConfig:
    """Return the recipe for the embedded digits: minutes on two cores."""
    progressive = DIGITS_PROGRESSIVE.get(variant, DIGITS_PROGRESSIVE_DEFAULT)
    return TrainConfig(
        variant=variant,
        progressive=progressive,
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=8e-3,
            schedule="cosine",
            warmup_epochs=1,
            weight_decay=0.05,
            ema_decay=0.96,
        ),
        epochs=11,
        batch_size=64,
        eval_image_size=progressive.image_size[1],
        crop_fraction=None,
        interpolation="bicubic",
        min_crop_area=0.8,
        horizontal_flip=False,
        num_randaugment_layers=1,
        autoaugment=False,
        label_smoothing=0.1,
        stochastic_depth_rate=0.1,
        # A run of a few hundred steps: the paper's 0.01 would still hold the initial statistics.
        batch_norm_momentum=0.1,
    )


def recipes_for(data: Path | None) -> dict[str, TrainConfig]:
    """Return the recipe of each variant: the paper's for a folder, a short one for the digits."""
    make = digits_recipe if data is None else paper_recipe
    return {variant: make(variant) for variant in VARIANTS}
