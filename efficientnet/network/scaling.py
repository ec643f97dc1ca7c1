"""Compound scaling: how depth, width and resolution of a network grow together.

Tan and Le 2019 (arXiv 1905.11946), section 3.3: depth alpha^phi, width beta^phi, resolution
gamma^phi, where alpha * beta^2 * gamma^2 is about 2, so that each step of phi doubles the cost.
"""

import itertools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

# V1 adds a step of 8 where rounding down would lose more than a tenth of the channels; the code
# that V2-B0 to B3 come from does not (google/automl, efficientnetv2/effnetv2_model.py).
V1_MIN_KEPT_CHANNELS = 0.9
V2_MIN_KEPT_CHANNELS = 0.0
CHANNEL_STEP = 8


class CompoundScale(NamedTuple):
    """Multipliers of a base network."""

    depth: float
    """Of the layers of each stage."""
    width: float
    """Of the channels of each stage."""
    resolution: float
    """Of the image's height and width."""


class CompoundCoefficients(NamedTuple):
    """What a step of phi multiplies: depth by alpha, width by beta, resolution by gamma."""

    alpha: float
    beta: float
    gamma: float

    @property
    def cost(self) -> float:
        """Multiply-adds of one step over those of the base: alpha * beta^2 * gamma^2."""
        return self.alpha * self.beta**2 * self.gamma**2


class CompoundFit(NamedTuple):
    """Result of fit_compound_coefficients."""

    best: CompoundCoefficients
    score: float
    tried: dict[CompoundCoefficients, float]
    """The score of each point of the grid."""


PAPER_COEFFICIENTS = CompoundCoefficients(1.2, 1.1, 1.15)


def compound_scale(
    phi: float, coefficients: CompoundCoefficients = PAPER_COEFFICIENTS
) -> CompoundScale:
    """Return depth, width and resolution for a budget of about 2^phi times the base's.

    The published B1 to B7 are close to it but not on it: variants.py has their own numbers.
    """
    if not math.isfinite(phi):
        raise ValueError(f"phi is {phi}, expected a finite number")
    alpha, beta, gamma = coefficients
    return CompoundScale(alpha**phi, beta**phi, gamma**phi)


def fit_compound_coefficients(
    score: Callable[[CompoundScale], float],
    goal: Literal["max", "min"] = "max",
    step: float = 0.05,
    target_cost: float = 2.0,
    tolerance: float = 0.1,
) -> CompoundFit:
    """Search a small grid for alpha, beta and gamma (section 3.3, step 1, with phi = 1).

    Args:
        score: of the base network scaled by these multipliers: an accuracy, or a cost.
        goal: max for an accuracy, min for a cost.
        step: between the grid's values, which start at 1.
        target_cost: what alpha * beta^2 * gamma^2 should be.
        tolerance: how far from it a point may be (the paper's own is at 1.92).

    Raises:
        ValueError: no point of the grid is within the tolerance, or a score is not a number.
    """
    if not step > 0 or not tolerance >= 0 or not target_cost >= 1:
        raise ValueError(
            f"step is {step}, tolerance {tolerance}, target_cost {target_cost}; expected a step "
            "above 0, a tolerance of at least 0 and a target of at least 1"
        )
    num_values = math.floor((target_cost + tolerance - 1) / step) + 1
    # Rounded: 1 + 3 * 0.05 would be 1.1500000000000001.
    values = [round(1 + index * step, 9) for index in range(num_values)]
    grid = [CompoundCoefficients(*point) for point in itertools.product(values, repeat=3)]
    near = [point for point in grid if abs(point.cost - target_cost) <= tolerance]
    if not near:
        raise ValueError(
            f"no alpha, beta, gamma in steps of {step} has a cost within {tolerance} of "
            f"{target_cost}; take a smaller step or a larger tolerance"
        )
    tried: dict[CompoundCoefficients, float] = {}
    for point in near:
        tried[point] = score(compound_scale(1, point))
        if math.isnan(tried[point]):
            raise ValueError(f"the score of {point} is not a number")
    sign = 1 if goal == "max" else -1
    # Among equals the one that keeps to the budget best.
    best = max(near, key=lambda point: (sign * tried[point], -abs(point.cost - target_cost)))
    return CompoundFit(best, tried[best], tried)


def scale_channels(channels: int, width: float, min_kept: float) -> int:
    """Multiply by `width` and round to the nearest multiple of 8, at least 8.

    A result below `min_kept` of the unrounded one is raised by 8.
    """
    if width == 1.0:
        return channels
    exact = channels * width
    rounded = max(CHANNEL_STEP, int(exact + CHANNEL_STEP / 2) // CHANNEL_STEP * CHANNEL_STEP)
    return rounded + CHANNEL_STEP if rounded < min_kept * exact else rounded


def scale_layers(num_layers: int, depth: float) -> int:
    """Multiply by `depth` and round up."""
    return math.ceil(num_layers * depth)
