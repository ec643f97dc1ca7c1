"""What can be set when the best program within a budget is asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from efficientnet.command import JsonFlags, require_positive


@dataclass(frozen=True)
class ChooseConfig(JsonFlags):
    """What is asked for."""

    result_file = Path("reports/choice.json")

    budget_ms: float
    """Longest time of a call at batch 1, milliseconds."""

    min_top1: float | None = None
    """Least share of held-out images classified rightly, 0 to 1; None = whatever is best."""

    percentile: Literal["50", "90", "99"] = "90"
    """Of the calls, that must be within the budget."""

    data: str | None = None
    """Images whose accuracy counts, by their name or the first digits of their SHA-256; None =
    those of all records, which must be the same."""

    include_unverified: bool = False
    """Also take programs whose accuracy was not measured, after all others."""

    seconds: float = 10.0
    """Measured time of the fresh run, without warm-up; 0 = none, and the answer says so."""

    latency: Path = Path("reports/latency.jsonl")
    """Records of perf/latency.py, which the fresh run is appended to."""

    accuracy: Path = Path("reports/accuracy.jsonl")
    """Records of perf/accuracy.py."""

    def __post_init__(self) -> None:
        require_positive(self, "budget_ms")
        if self.min_top1 is not None and not 0 <= self.min_top1 <= 1:
            raise ValueError(
                f"--min-top1 is {self.min_top1:g}, expected a share of 0 to 1: 0.9 is 90 %"
            )
        if not 0 <= self.seconds < float("inf"):
            raise ValueError(f"--seconds is {self.seconds:g}, expected at least 0")
