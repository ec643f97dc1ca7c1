"""Stages of a request -> how long each took, as the header Server-Timing."""

import time
from typing import Literal, get_args

Stage = Literal["decode", "preprocess", "queue", "infer"]

HEADER = "Server-Timing"


class StageTimes:
    """A clock that starts now, of one picture; those of a batch are added up."""

    def __init__(self) -> None:
        self.seconds: dict[Stage, float] = dict.fromkeys(get_args(Stage), 0.0)
        self.laps: list[tuple[Stage, float, float]] = []
        """Stages as they came, with start and end by time.perf_counter."""
        self._started = self._since = time.perf_counter()

    def end(self, stage: Stage, ago_s: float = 0.0) -> None:
        """Count the time since the last call, or the start, to this stage.

        Args:
            stage: which has ended.
            ago_s: seconds for which the next one has been going on, as another process tells.
        """
        now = max(self._since, time.perf_counter() - ago_s)
        self.seconds[stage] += now - self._since
        self.laps.append((stage, self._since, now))
        self._since = now

    def add(self, other: "StageTimes") -> None:
        """Count what another took as well."""
        for stage, seconds in other.seconds.items():
            self.seconds[stage] += seconds
        self._since = max(self._since, other._since)

    @property
    def total_s(self) -> float:
        """Time from the start to the last stage's end."""
        return self._since - self._started

    def header(self) -> str:
        """Return the header's text, in milliseconds."""
        return ", ".join(f"{name};dur={1000 * s:.2f}" for name, s in self.seconds.items())
