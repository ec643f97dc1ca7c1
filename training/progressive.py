"""Progressive learning with adaptive regularisation: Algorithm 1 of Tan and Le 2021."""

from dataclasses import dataclass

from training.config import ProgressiveConfig


@dataclass(frozen=True)
class Stage:
    """What stays the same for a share of the steps."""

    index: int
    """0-based."""
    image_size: int
    """Pixels."""
    randaugment_magnitude: float
    mixup_alpha: float
    dropout_rate: float


def plan_stages(config: ProgressiveConfig) -> tuple[Stage, ...]:
    """Interpolate image size and regularisation together, linearly from first to last stage.

    The paper divides by M - 1; a single stage has the last values. Fractional sizes are truncated,
    as in the released code (the paper does not say).
    """

    def value(pair: tuple[float, float], index: int) -> float:
        first, last = pair
        if config.num_stages == 1:
            return last
        return first + (last - first) * index / (config.num_stages - 1)

    return tuple(
        Stage(
            index=index,
            image_size=int(value(config.image_size, index)),
            randaugment_magnitude=value(config.randaugment_magnitude, index),
            mixup_alpha=value(config.mixup_alpha, index),
            dropout_rate=value(config.dropout_rate, index),
        )
        for index in range(config.num_stages)
    )


def stage_index(step: int, num_steps: int, num_stages: int) -> int:
    """Return the stage of an optimizer step: each stage has num_steps / num_stages of them."""
    return step * num_stages // num_steps
