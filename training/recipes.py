"""The values chosen for each variant, with their source: from scratch, pre-train, transfer, digits.

V2-S, M and L: Tan and Le 2021 (arXiv 2104.00298 v3), section 4 and Table 6. V1: Tan and Le 2019
(arXiv 1905.11946), section 5.2. Where the papers are silent the released code decides
(google/automl, efficientnetv2).
"""

from collections.abc import Callable
from dataclasses import replace

from efficientnet.variants import VARIANTS, VariantSpec
from training.config import OptimizerConfig, ProgressiveConfig, Schedule, TrainConfig

# Table 6: RandAugment magnitude, Mixup alpha and dropout of the last stage.
PAPER_PROGRESSIVE = {
    "v2-s": ProgressiveConfig((128, 300), (5, 15), (0, 0), (0.1, 0.3)),
    "v2-m": ProgressiveConfig((128, 380), (5, 20), (0, 0.2), (0.1, 0.4)),
    "v2-l": ProgressiveConfig((128, 380), (5, 25), (0, 0.4), (0.1, 0.5)),
    # Not in the table: the released code's last values, with L's first ones.
    "v2-xl": ProgressiveConfig((128, 384), (5, 20), (0, 0.5), (0.1, 0.4)),
    "tiny": ProgressiveConfig((16, 32), (5, 10), (0, 0.1), (0.1, 0.2)),
}

# What the code that was published does (google/automl, efficientnetv2/effnetv2_configs.py): other
# last values than Table 6, CutMix with Mixup's alpha, and a dropout that does not rise.
RELEASED_PROGRESSIVE = {
    variant: ProgressiveConfig(
        (128, size),
        (5, magnitude),
        (0, alpha),
        (dropout, dropout),
        cutmix_alpha=(0, alpha),
        schedule="released",
    )
    for variant, size, magnitude, alpha, dropout in (
        ("v2-s", 300, 10, 0, 0.2),
        ("v2-m", 384, 15, 0.2, 0.3),
        ("v2-l", 384, 20, 0.5, 0.4),
        ("v2-xl", 384, 20, 0.5, 0.4),
    )
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

# DeVries and Taylor 2017: 16 of CIFAR-10's 32 pixels.
CUTOUT = 0.5

# Chosen here, for 1,437 images of 8 x 8 pixels and a CPU: top-1 is what they were chosen by.
DIGITS_PROGRESSIVE = {
    "tiny": ProgressiveConfig((16, 32), (3, 6), (0, 0.1), (0.0, 0.1)),
}
# From 50 px on the last stages see maps of 4 and 2 pixels as at 64 px, and what a stage has learned
# holds at the next size: 82 % of the held-out digits after half of the epochs. From 40 px (maps of
# 3 and 2) it was 29 %, from 32 px (a map of 1, so that eight of nine depthwise weights are never
# trained) worse than guessing; and a step costs almost the same, since the weights set its time.
DIGITS_PROGRESSIVE_DEFAULT = ProgressiveConfig((50, 64), (3, 6), (0, 0.1), (0.1, 0.2))


def imagenet_recipe(variant: str, schedule: Schedule = "paper") -> TrainConfig:
    """Return the recipe for training from scratch on ImageNet and its like.

    V1 and V2-B train at one size with AutoAugment, whatever the schedule. Below 320 px evaluation
    cuts out the centre, from there on it squashes, as the released code does.
    """
    spec = VARIANTS[variant]
    eval_size = spec.eval_image_size
    is_progressive = variant in PAPER_PROGRESSIVE
    values = RELEASED_PROGRESSIVE if schedule == "released" else PAPER_PROGRESSIVE
    progressive = values.get(variant, PAPER_PROGRESSIVE.get(variant, one_size(spec)))
    return TrainConfig(
        variant=variant,
        recipe="imagenet",
        progressive=replace(progressive, schedule=schedule),
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


def pretrain_recipe(variant: str, schedule: Schedule = "paper") -> TrainConfig:
    """Return the recipe for ImageNet-21k: 60 epochs at 224 px, hardly any regularisation.

    Tan and Le 2021, section 5.2, and the released code's imagenet21k settings.
    """
    return replace(
        imagenet_recipe(variant, schedule),
        recipe="pretrain",
        progressive=ProgressiveConfig(
            (224, 224), (0, 0), (0, 0), (0, 0), num_stages=1, schedule=schedule
        ),
        optimizer=replace(PAPER_OPTIMIZER, learning_rate=0.008, schedule="cosine", warmup_epochs=1),
        epochs=60,
        eval_image_size=224,
        crop_fraction=0.875,
        autoaugment=False,
        label_smoothing=0.0,
        stochastic_depth_rate=0.0,
    )


def finetune_recipe(variant: str, schedule: Schedule = "paper") -> TrainConfig:
    """Return the recipe from ImageNet-21k weights to ImageNet-1k: 15 epochs at the evaluation size.

    Tan and Le 2021, section 5.2: cosine. The released code keeps the rate constant.
    """
    recipe, spec = imagenet_recipe(variant, schedule), VARIANTS[variant]
    size, dropout = spec.eval_image_size, spec.dropout_rate
    return replace(
        recipe,
        recipe="finetune",
        progressive=ProgressiveConfig(
            (size, size), (0, 0), (0, 0), (dropout, dropout), num_stages=1, schedule=schedule
        ),
        optimizer=OptimizerConfig(
            name="rmsprop",
            learning_rate=0.0005,  # 0.001 at the batch of 512
            schedule="constant" if schedule == "released" else "cosine",
            warmup_epochs=1,
            weight_decay=1e-5,
            ema_decay=0.9996,
        ),
        epochs=15,
        batch_size=512,
        autoaugment=False,
        cutout=CUTOUT,
    )


def transfer_recipe(variant: str, schedule: Schedule = "paper") -> TrainConfig:
    """Return the recipe from ImageNet-1k weights to CIFAR, Flowers or Cars: 10,000 steps.

    Tan and Le 2021, section 5.3: batch 512, rate 0.001 with cosine, no weight decay, cutout. The
    released code takes its fine-tuning settings over: constant rate and weight decay 1e-5.
    """
    recipe = finetune_recipe(variant, schedule)
    is_released = schedule == "released"
    return replace(
        recipe,
        recipe="transfer",
        steps=10_000,
        optimizer=replace(
            recipe.optimizer,
            weight_decay=1e-5 if is_released else 0.0,
        ),
    )


def digits_recipe(variant: str, schedule: Schedule = "paper") -> TrainConfig:
    """Return the recipe for the embedded digits: minutes on two cores."""
    progressive = DIGITS_PROGRESSIVE.get(variant, DIGITS_PROGRESSIVE_DEFAULT)
    return TrainConfig(
        variant=variant,
        recipe=DIGITS_RECIPE,
        progressive=replace(progressive, schedule=schedule),
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


DIGITS_RECIPE = "digits"
RECIPES: dict[str, Callable[[str, Schedule], TrainConfig]] = {
    DIGITS_RECIPE: digits_recipe,
    "imagenet": imagenet_recipe,
    "pretrain": pretrain_recipe,
    "finetune": finetune_recipe,
    "transfer": transfer_recipe,
}


def recipes_for(recipe: str, schedule: Schedule) -> dict[str, TrainConfig]:
    """Return a recipe's values for each variant.

    Raises:
        ValueError: there is no recipe of this name.
    """
    if recipe not in RECIPES:
        raise ValueError(f"no recipe {recipe!r}; there are {', '.join(RECIPES)}")
    return {variant: RECIPES[recipe](variant, schedule) for variant in VARIANTS}
