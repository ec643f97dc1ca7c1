"""The values chosen for each variant, with their source; and which recipe fits which data.

V2-S, M and L: Tan and Le 2021 (arXiv 2104.00298 v3), section 4 and Table 6. V1: Tan and Le 2019
(arXiv 1905.11946), section 5.2. Where the papers are silent the released code decides
(google/automl, efficientnetv2).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from efficientnet.network.variants import VARIANTS, VariantSpec, get_variant
from training.recipe.config import OptimizerConfig, ProgressiveConfig, Schedule, TrainConfig

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


# A built-in variant's name, or the table of one that is not built in.
Variant = str | VariantSpec


def imagenet_recipe(variant: Variant, schedule: Schedule = "paper") -> TrainConfig:
    """Return the recipe for training from scratch on ImageNet and its like.

    V1 and V2-B train at one size with AutoAugment, whatever the schedule. Below 320 px evaluation
    cuts out the centre, from there on it squashes, as the released code does.
    """
    spec = table_of(variant)
    eval_size = spec.eval_image_size
    is_progressive = spec.name in PAPER_PROGRESSIVE
    values = RELEASED_PROGRESSIVE if schedule == "released" else PAPER_PROGRESSIVE
    progressive = values.get(spec.name) or PAPER_PROGRESSIVE.get(spec.name)
    if progressive is None:
        progressive = one_size(spec.train_image_size, spec.dropout_rate, schedule)
    return TrainConfig(
        variant=spec.name,
        architecture=None if isinstance(variant, str) else variant,
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


def table_of(variant: Variant) -> VariantSpec:
    """Return the table of stages."""
    return get_variant(variant) if isinstance(variant, str) else variant


def one_size(
    size: int, dropout: float, schedule: Schedule, magnitude: float = 0
) -> ProgressiveConfig:
    """Return no progression: the same values throughout."""
    return ProgressiveConfig(
        *((size, size), (magnitude, magnitude), (0, 0), (dropout, dropout)),
        num_stages=1,
        schedule=schedule,
    )


def pretrain_recipe(variant: Variant, schedule: Schedule = "paper") -> TrainConfig:
    """Return the recipe for ImageNet-21k: 60 epochs at 224 px, hardly any regularisation.

    Tan and Le 2021, section 5.2, and the released code's imagenet21k settings.
    """
    return replace(
        imagenet_recipe(variant, schedule),
        recipe="pretrain",
        progressive=one_size(224, 0, schedule),
        optimizer=replace(PAPER_OPTIMIZER, learning_rate=0.008, schedule="cosine", warmup_epochs=1),
        epochs=60,
        eval_image_size=224,
        crop_fraction=0.875,
        autoaugment=False,
        label_smoothing=0.0,
        stochastic_depth_rate=0.0,
    )


def finetune_recipe(variant: Variant, schedule: Schedule = "paper") -> TrainConfig:
    """Return the recipe from ImageNet-21k weights to ImageNet-1k: 15 epochs at the evaluation size.

    Tan and Le 2021, section 5.2: cosine. The released code keeps the rate constant.
    """
    spec = table_of(variant)
    return replace(
        imagenet_recipe(variant, schedule),
        recipe="finetune",
        progressive=one_size(spec.eval_image_size, spec.dropout_rate, schedule),
        optimizer=replace(
            PAPER_OPTIMIZER,
            learning_rate=0.0005,  # 0.001 at the batch of 512
            schedule="constant" if schedule == "released" else "cosine",
            warmup_epochs=1,
            ema_decay=0.9996,
        ),
        epochs=15,
        batch_size=512,
        autoaugment=False,
        cutout=CUTOUT,
    )


def transfer_recipe(variant: Variant, schedule: Schedule = "paper") -> TrainConfig:
    """Return the recipe from ImageNet-1k weights to CIFAR, Flowers or Cars: 10,000 steps.

    Tan and Le 2021, section 5.3: batch 512, rate 0.001 with cosine, no weight decay, cutout. The
    released code takes its fine-tuning settings over: constant rate and weight decay 1e-5.
    """
    recipe = finetune_recipe(variant, schedule)
    if schedule != "released":
        recipe = replace(recipe, optimizer=replace(recipe.optimizer, weight_decay=0.0))
    return replace(recipe, recipe="transfer", steps=10_000)


def digits_recipe(variant: Variant, schedule: Schedule = "paper") -> TrainConfig:
    """Return the recipe for the embedded digits: minutes on two cores."""
    spec = table_of(variant)
    progressive = DIGITS_PROGRESSIVE.get(spec.name, DIGITS_PROGRESSIVE_DEFAULT)
    return TrainConfig(
        variant=spec.name,
        architecture=None if isinstance(variant, str) else variant,
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


@dataclass(frozen=True)
class RecipeFacts:
    """What a recipe that follows from the data is made of."""

    num_images: int
    """To train on."""
    num_classes: int
    image_size: int
    """Short side of the images, pixels: their median."""
    start_image_size: int | None = None
    """At which the weights to start from are used; None: the variant's, or no weights."""
    epochs: int | None = None
    """What was asked for, as the next three; None = to be chosen."""
    steps: int | None = None
    batch_size: int | None = None
    micro_batch_size: int | None = None


# Images from which on the papers' recipes are taken, whose values are for 1.28 million; below, few
# steps would be left of their batch of 4096.
MANY_IMAGES = 300_000
# ImageNet-21k's like: classes that are fine-tuned to others later.
MANY_CLASSES = 10_000

# A map of 2 x 2 pixels is the smallest whose neighbors' weights are trained.
SMALLEST_SIZE = 64
SMALLEST_FIRST_SIZE = 50

# AdamW's rate at a batch of 64, that of the digits; tried on 4 classes of CIFAR-10 (3,200 images).
# It grows with the root of the batch.
SMALL_LEARNING_RATE = 2e-3
SMALL_PASSES, SMALL_EPOCHS = 64_000, (20, 100)
TUNED_PASSES, TUNED_EPOCHS = 25_000, (8, 50)
# Of all steps.
WARMUP_SHARE, AVERAGED_SHARE = 0.05, 0.05


def small_recipe(variant: Variant, schedule: Schedule, facts: RecipeFacts) -> TrainConfig:
    """Return the recipe from scratch for hundreds to hundreds of thousands of images.

    Trained at the images' own size, up to the variant's. Batch, epochs, learning rate, warm-up and
    moving average follow from how many there are.
    """
    spec = table_of(variant)
    rounded = 32 * round(facts.image_size / 32)
    smallest = min(SMALLEST_SIZE, spec.eval_image_size)
    eval_size = min(max(rounded, smallest), spec.eval_image_size)
    last = min(eval_size, spec.train_image_size)
    first = max(last * 4 // 7, min(SMALLEST_FIRST_SIZE, last))
    recipe = _fit_to_steps(digits_recipe(variant, schedule), facts, SMALL_PASSES, SMALL_EPOCHS)
    return replace(
        recipe,
        recipe=SMALL_RECIPE,
        progressive=ProgressiveConfig(
            (first, last),
            (2, 5),
            (0, 0),
            (0.1, spec.dropout_rate),
            num_stages=min(4, recipe.steps or recipe.epochs),
            schedule=schedule,
        ),
        eval_image_size=eval_size,
        crop_fraction=1.0,
        min_crop_area=0.5,
        horizontal_flip=True,
    )


def small_finetune_recipe(variant: Variant, schedule: Schedule, facts: RecipeFacts) -> TrainConfig:
    """Return the recipe from trained weights for as many images, at the weights' own size."""
    spec = table_of(variant)
    size = facts.start_image_size or spec.eval_image_size
    recipe = _fit_to_steps(digits_recipe(variant, schedule), facts, TUNED_PASSES, TUNED_EPOCHS)
    return replace(
        recipe,
        recipe=SMALL_FINETUNE_RECIPE,
        progressive=one_size(size, spec.dropout_rate, schedule, magnitude=3),
        optimizer=replace(
            recipe.optimizer, learning_rate=recipe.optimizer.learning_rate / 4, weight_decay=0.01
        ),
        eval_image_size=size,
        crop_fraction=1.0,
        min_crop_area=0.35,
        horizontal_flip=True,
    )


def _fit_to_steps(
    recipe: TrainConfig, facts: RecipeFacts, num_passes: int, limits: tuple[int, int]
) -> TrainConfig:
    # 100 steps or more an epoch, but batches below 32 only where there are no 4 of them.
    most = min(max(facts.num_images // 100, 32), facts.num_images // 4, 256)
    batch_size = facts.batch_size or 2 ** (max(most, 2).bit_length() - 1)
    steps_per_epoch = max(facts.num_images // batch_size, 1)
    # So many that `num_passes` images are seen in all.
    epochs = min(max(num_passes // max(facts.num_images, 1), limits[0]), limits[1])
    epochs = facts.epochs or epochs
    num_steps = facts.steps or epochs * steps_per_epoch
    # The config's rate is that of a batch of 256, to which it is in proportion.
    rate = SMALL_LEARNING_RATE * (batch_size / 64) ** 0.5 * 256 / batch_size
    num_averaged = max(AVERAGED_SHARE * num_steps, 1)
    return replace(
        recipe,
        optimizer=replace(
            recipe.optimizer,
            learning_rate=float(f"{rate:.3g}"),
            warmup_epochs=float(f"{WARMUP_SHARE * num_steps / steps_per_epoch:.3g}"),
            ema_decay=min(float(f"{1 - 1 / (1 + num_averaged):.4g}"), PAPER_OPTIMIZER.ema_decay),
        ),
        epochs=epochs,
        steps=facts.steps,
        batch_size=batch_size,
        micro_batch_size=facts.micro_batch_size,
        batch_plan="memory" if facts.micro_batch_size is None else "fixed",
    )


def choose_recipe(facts: RecipeFacts, has_weights: bool) -> tuple[str, str]:
    """Return the recipe that fits the data, and why."""
    has_many = facts.num_images >= MANY_IMAGES
    if has_weights:
        recipe = "finetune" if has_many else SMALL_FINETUNE_RECIPE
    elif has_many:
        recipe = "pretrain" if facts.num_classes >= MANY_CLASSES else "imagenet"
    else:
        recipe = SMALL_RECIPE
    start = "--weights to start from" if has_weights else "no --weights to start from"
    side = "at least" if has_many else "fewer than"
    return recipe, (
        f"{facts.num_images:,} training images ({side} {MANY_IMAGES:,}) of {facts.num_classes:,} "
        f"classes, {facts.image_size} px, {start}"
    )


DIGITS_RECIPE = "digits"
SMALL_RECIPE, SMALL_FINETUNE_RECIPE = "small", "small-finetune"
RECIPES: dict[str, Callable[[Variant, Schedule], TrainConfig]] = {
    DIGITS_RECIPE: digits_recipe,
    "imagenet": imagenet_recipe,
    "pretrain": pretrain_recipe,
    "finetune": finetune_recipe,
    "transfer": transfer_recipe,
}


# Recipes whose values follow from the data.
FITTED_RECIPES: dict[str, Callable[[Variant, Schedule, RecipeFacts], TrainConfig]] = {
    SMALL_RECIPE: small_recipe,
    SMALL_FINETUNE_RECIPE: small_finetune_recipe,
}


def recipes_for(
    recipe: str,
    schedule: Schedule,
    facts: RecipeFacts | None = None,
    table: VariantSpec | None = None,
) -> dict[str, TrainConfig]:
    """Return a recipe's values for each variant; those of FITTED_RECIPES need the facts.

    With a table of stages they are for it alone.
    """
    variants: dict[str, Variant] = {name: name for name in VARIANTS}
    if table is not None:
        variants = {table.name: table}
    if recipe in FITTED_RECIPES and facts is not None:
        fitted = FITTED_RECIPES[recipe]
        return {name: fitted(variant, schedule, facts) for name, variant in variants.items()}
    if recipe not in RECIPES:
        names = ", ".join((*RECIPES, *FITTED_RECIPES))
        raise ValueError(f"no recipe {recipe!r}; there are {names}")
    return {name: RECIPES[recipe](variant, schedule) for name, variant in variants.items()}
