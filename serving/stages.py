"""Stages of a request -> how long each took, as the header Server-Timing."""

import time
from typing import Literal, get_args

Stage = Literal["decode", "preprocess", "queue", "infer"]

HEADER = "Server-Timing"


class StageTimes:
    """A clock that starts now; the pictures of a batch are added up."""

    def __init__(self) -> None:
        self._seconds: dict[Stage, float] = dict.fromkeys(get_args(Stage), 0.0)
        self._since = time.perf_counter()

    def end(self, stage: Stage) -> None:
        """Count the time since the last call, or the start, to this stage."""
        now = time.perf_counter()
        self._seconds[stage] += now - self._since
        self._since = now

    def header(self) -> str:
        """Return the header's text, in milliseconds."""
        return ", ".join(f"{name};dur={1000 * s:.2f}" for name, s in self._seconds.items())
