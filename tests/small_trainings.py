"""The small trainings that several test files share."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from efficientnet.images import datasets
from efficientnet.images.preprocess_spec import PreprocessSpec
from efficientnet.network.variants import VARIANTS, NetworkOptions
from training.learning.distributed import Ranks
from training.learning.state import TrainState, new_state
from training.learning.step import TrainStep
from training.recipe.config import TrainConfig
from training.recipe.recipes import digits_recipe
from training.running.metrics import EpochMetrics

SPEC = PreprocessSpec(
    image_size=32,
    interpolation="bicubic",
    crop_fraction=None,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)

TINY = VARIANTS["tiny"]
# A block of each kind.
SMALLEST = replace(
    TINY, name="smallest", stages=(TINY.stages[0], replace(TINY.stages[2], num_layers=1))
)


NUM_FEW_DIGITS = 450


def cut_digits(count: int, patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Leave so many digits of all: four of five are trained on, and each takes its time."""
    names, images = datasets.digit_images()
    patch(datasets, "digit_images", lambda: (names, images[:count]))


def small_run(output: Path, **changes: object) -> TrainConfig:
    """Return a recipe of 3 epochs of 5 steps, in stages of 16, 20 and 24 pixels, called `run`.

    With a batch size of 64 it is that of NUM_FEW_DIGITS.
    """
    recipe = replace(digits_recipe("tiny"), epochs=3, batch_size=256, output=output, name="run")
    progressive = replace(recipe.progressive, image_size=(16, 24), num_stages=3)
    return replace(recipe, progressive=progressive, eval_image_size=24, **changes)


def with_stages(recipe: TrainConfig, num_stages: int) -> TrainConfig:
    """Return a recipe with another number of stages."""
    return replace(recipe, progressive=replace(recipe.progressive, num_stages=num_stages))


def epoch_metrics(number: int, **changes: object) -> EpochMetrics:
    """Return what an epoch of 11 steps may have come to."""
    values: dict[str, object] = {
        "epoch": number,
        "step": 11 * number,
        "stage": 1,
        "image_size": 32,
        "learning_rate": 0.01,
        "train_loss": 1.0,
        "val_loss": 0.5,
        "top1": 0.5,
        "top5": 0.99,
        "images_per_s": 160.0,
        "elapsed_s": 40.0 * number,
    }
    return EpochMetrics.model_validate(values | changes)


def step_of(
    recipe: TrainConfig, device: str = "cpu", num_classes: int = 10
) -> tuple[TrainState, TrainStep]:
    """Return a new state in training mode, and what takes its steps."""
    state = new_state(recipe, NetworkOptions(), num_classes, torch.device(device))
    state.model.train()
    ranks = Ranks(0, 1, state.device)
    return state, TrainStep(state, recipe, ranks, num_classes, SPEC)
