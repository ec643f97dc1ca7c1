"""Values by seed -> their mean, deviation, and the margin of the mean."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from efficientnet.reporting.tables import NOTHING

MARGIN = (
    "Differences, of times too, are taken seed by seed. Their margin, in brackets, is half of the "
    "95 % confidence interval of their mean (Student's t): what is not larger cannot be told from "
    "none."
)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over the seeds."""

    mean: float
    std: float | None
    """None with one seed."""
    num_seeds: int

    @property
    def margin(self) -> float | None:
        """Half of the 95 % confidence interval of the mean (Student's t); None with one seed."""
        if self.std is None:
            return None
        quantile = float(stats.t.ppf(0.975, self.num_seeds - 1))
        return quantile * self.std / math.sqrt(self.num_seeds)

    def text(self, decimals: int = 1) -> str:
        """Write mean and deviation."""
        deviation = "" if self.std is None else f" ± {self.std:.{decimals}f}"
        return f"{self.mean:,.{decimals}f}{deviation}"

    def with_margin(self, digits: str) -> str:
        """Write the mean, with its sign if the format has one, and in brackets its margin."""
        margin = NOTHING if self.margin is None else f"{self.margin:{digits.lstrip('+')}}"
        return f"{self.mean:{digits}} ({margin})"


def spread(values: Sequence[float]) -> Spread:
    """Return mean and sample standard deviation."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), std, len(values))
