"""Counts and times -> how sure they are: intervals of shares and ratios, a test of pairs."""

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# 95 %, of the normal distribution.
NORMAL_QUANTILE = 1.959963984540054

# A build must not fail for one of twenty changes that change nothing.
BOOTSTRAP_CONFIDENCE = 0.99
NUM_DRAWS = 2000


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """Return where a share of 95 % confidence lies, 0..1 (Wilson 1927).

    Unlike the share plus or minus two standard errors it holds for few images, and near 0 and 1.

    Raises:
        ValueError: no images, or more hits than images.
    """
    if not 0 <= hits <= count or count < 1:
        raise ValueError(f"{hits} hits of {count} images, expected 0 to all of at least one")
    z, share = NORMAL_QUANTILE, hits / count
    middle = share + z * z / (2 * count)
    half = z * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    scale = 1 + z * z / count
    # Exactly 0 and 1 at the ends, where rounding would be a little off.
    low = 0.0 if hits == 0 else (middle - half) / scale
    high = 1.0 if hits == count else (middle + half) / scale
    return low, high


def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """Return how likely two programs of equal accuracy differ so much (McNemar 1947, exact).

    Of the images that only one of them classifies rightly: all others say nothing of it.
    """
    count = only_first + only_second
    fewer = min(only_first, only_second)
    # Whole numbers, which Python divides right where both are beyond floats.
    ways = sum(math.comb(count, k) for k in range(fewer + 1))
    return min(1.0, 2 * ways / 2**count)


@dataclass(frozen=True)
class RatioInterval:
    """A ratio of times, and where it lies with 99 % confidence."""

    ratio: float
    low: float
    high: float


def bootstrap_ratio(groups: Sequence[Sequence[float]]) -> RatioInterval:
    """Return the median of ratios and its interval, by resampling groups and what is in them.

    Args:
        groups: of each pair of processes, the ratio of each round. Rounds of the same processes are
            alike, so that drawing from all rounds at once would promise too much.
    """
    generator = random.Random(0)
    medians: list[float] = []
    for _ in range(NUM_DRAWS):
        drawn = generator.choices(groups, k=len(groups))
        medians.append(
            statistics.median(r for group in drawn for r in generator.choices(group, k=len(group)))
        )
    medians.sort()
    cut = round(NUM_DRAWS * (1 - BOOTSTRAP_CONFIDENCE) / 2)
    ratio = statistics.median(r for group in groups for r in group)
    return RatioInterval(ratio, medians[cut], medians[-1 - cut])
