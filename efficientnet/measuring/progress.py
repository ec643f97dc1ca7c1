"""Planned work -> a bar on a terminal, a line now and then elsewhere, both on stderr."""

import logging
import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0

log = logging.getLogger(__name__)


class Progress:
    """Tells what is being done and how long the rest will take at the speed so far.

    `planned` is counted in any unit; a unit that is named is shown as done of planned.
    """

    def __init__(self, planned: float, unit: str | None = None) -> None:
        self._planned = planned
        self._unit = unit
        self._done = 0.0
        self._started = time.monotonic()
        self._next_line = self._started + (0 if unit is None else SECONDS_BETWEEN_LINES)
        self._bar = tqdm(
            total=planned,
            disable=not sys.stderr.isatty(),
            leave=False,
            bar_format="{desc} |{bar}| {percentage:.0f} %, {remaining} left",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def begin(self, text: str) -> None:
        """Say what comes now."""
        if self._unit is not None:
            text = f"{text}: {self._done:,.0f} of {self._planned:,.0f} {self._unit}"
        self._bar.set_description_str(text)
        now = time.monotonic()
        if self._bar.disable and now >= self._next_line:
            self._next_line = now + SECONDS_BETWEEN_LINES
            left = ""
            if self._done > 0:
                rest_s = (self._planned - self._done) * (now - self._started) / self._done
                left = f", {_duration(rest_s)} left"
            log.info("%s%s", text, left)

    def done(self, amount: float) -> None:
        """Count a part of what was planned as done."""
        self._done += amount
        self._bar.update(amount)

    def write(self, text: str) -> None:
        """Write lines above the bar."""
        with tqdm.external_write_mode(file=sys.stderr):
            log.info("%s", text)


def _duration(seconds: float) -> str:
    seconds = round(max(seconds, 0))
    return f"{seconds} s" if seconds < 120 else f"{round(seconds / 60)} min"
