"""nvidia-smi, asked all the while -> clocks, temperature and what held the clocks down."""

import shutil
import subprocess
import threading
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from typing import NamedTuple

from perf.device_parts.records import GpuState

COMMAND = (
    *("nvidia-smi", "--id=0", "--format=csv,noheader,nounits", "--loop-ms=200"),
    "--query-gpu=clocks.sm,temperature.gpu,clocks_event_reasons.active",
)

# nvml.h; that it is idle, or follows an application's clocks, holds nothing down.
SLOWED_BY = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "temperature (software)",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}


class Sample(NamedTuple):
    """One answer; None where the device does not tell."""

    moment: float
    sm_clock_mhz: float | None
    temperature_c: float | None
    reasons: int


class GpuWatch:
    """What nvidia-smi has told so far."""

    def __init__(self) -> None:
        self._samples: list[Sample] = []

    def collect(self, lines: Iterable[str]) -> None:
        """Read answers until there are no more."""
        for line in lines:
            # [N/A] and the like are no numbers; neither is an error's text.
            values = [_number(field.strip()) for field in line.split(",")]
            clock, temperature, reasons, *_ = (*values, None, None, None)
            sample = Sample(time.monotonic(), clock, temperature, int(reasons or 0))
            self._samples.append(sample)

    def since(self, begin: float) -> GpuState | None:
        """Sum up what was told since a moment of time.monotonic; None if nothing was."""
        samples = [sample for sample in self._samples if sample.moment >= begin]
        if not samples:
            return None
        clocks = [s.sm_clock_mhz for s in samples if s.sm_clock_mhz is not None]
        temperatures = [s.temperature_c for s in samples if s.temperature_c is not None]
        slowed_by = (
            name
            for bit, name in SLOWED_BY.items()
            if any(sample.reasons & bit for sample in samples)
        )
        return GpuState(
            sm_clock_mhz=(min(clocks), max(clocks)) if clocks else None,
            max_temperature_c=max(temperatures, default=None),
            slowed_by=tuple(slowed_by),
        )


@contextmanager
def watch_gpu() -> Generator[GpuWatch]:
    """Ask nvidia-smi five times a second; where it is not, nothing is told."""
    watch = GpuWatch()
    if shutil.which(COMMAND[0]) is None:
        yield watch
        return
    with subprocess.Popen(
        COMMAND, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        thread = threading.Thread(target=watch.collect, args=(process.stdout,), daemon=True)
        thread.start()
        try:
            yield watch
        finally:
            process.kill()
            thread.join()


def _number(text: str) -> float | None:
    with suppress(ValueError):
        return int(text, 16) if text.startswith("0x") else float(text)
    return None
