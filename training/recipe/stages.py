"""Progressive learning with adaptive regularisation: Algorithm 1 of Tan and Le 2021."""

import random
from dataclasses import dataclass, replace

from training.recipe.config import ProgressiveConfig


@dataclass(frozen=True)
class Stage:
    """What stays the same for a share of the steps."""

    index: int
    """0-based."""
    image_size: int
    """Pixels."""
    randaugment_magnitude: float
    mixup_alpha: float
    cutmix_alpha: float
    dropout_rate: float


def plan_stages(config: ProgressiveConfig, seed: int = 0) -> tuple[Stage, ...]:
    """Interpolate image size and regularisation together, from first to last stage.

    paper: linearly in i / (M - 1); a single stage has the last values. released: sizes in
    (i + 1) / M, so that the first size is never trained at, and dropout does not rise
    (google/automl, efficientnetv2/main_tf2.py). fixed: one stage. random: paper's stages shuffled
    by the seed. Fractional sizes are truncated, as in the released code (the paper does not say).
    """
    num_stages = config.num_stages

    def value(pair: tuple[float, float], index: int) -> float:
        first, last = pair
        if index == num_stages - 1:
            return last
        return first + (last - first) * index / (num_stages - 1)

    def image_size(index: int) -> int:
        first, last = config.image_size
        if config.schedule == "released":
            return int(first + (last - first) * (index + 1) / num_stages)
        return int(value(config.image_size, index))

    stages = [
        Stage(
            index=index,
            image_size=image_size(index),
            randaugment_magnitude=value(config.randaugment_magnitude, index),
            mixup_alpha=value(config.mixup_alpha, index),
            cutmix_alpha=value(config.cutmix_alpha, index),
            dropout_rate=(
                config.dropout_rate[1]
                if config.schedule == "released"
                else value(config.dropout_rate, index)
            ),
        )
        for index in range(num_stages)
    ]
    if config.schedule == "fixed":
        return (replace(stages[-1], index=0),)
    if config.schedule == "random":
        random.Random(f"stages {seed}").shuffle(stages)
        stages = [replace(stage, index=index) for index, stage in enumerate(stages)]
    return tuple(stages)


def stage_index(step: int, num_steps: int, num_stages: int) -> int:
    """Return the stage of an optimizer step: each stage has num_steps / num_stages of them."""
    return step * num_stages // num_steps
