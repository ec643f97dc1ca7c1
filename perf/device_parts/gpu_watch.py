"""nvidia-smi, asked all the while -> clocks, temperature and what held the clocks down."""

import shutil
import subprocess
import threading
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import IO, NamedTuple

from perf.device_parts.records import GpuState

INTERVAL_MS = 200

# The second is what drivers before 535 call the first.
REASON_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")

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
    max_sm_clock_mhz: float | None
    temperature_c: float | None
    power_w: float | None
    reasons: int


class GpuWatch:
    """What nvidia-smi has told so far."""

    def __init__(self) -> None:
        self._samples: list[Sample] = []

    def collect(self, lines: IO[str]) -> None:
        """Read answers until there are no more."""
        for line in lines:
            self._samples.append(parse(line, time.monotonic()))

    def since(self, begin: float) -> GpuState | None:
        """Sum up what was told since a moment of time.monotonic; None if nothing was."""
        samples = [sample for sample in self._samples if sample.moment >= begin]
        if not samples:
            return None
        clocks = [s.sm_clock_mhz for s in samples if s.sm_clock_mhz is not None]
        reasons = 0
        for sample in samples:
            reasons |= sample.reasons
        return GpuState(
            num_samples=len(samples),
            sm_clock_mhz=(min(clocks), max(clocks)) if clocks else None,
            max_sm_clock_mhz=samples[-1].max_sm_clock_mhz,
            max_temperature_c=_largest(s.temperature_c for s in samples),
            max_power_w=_largest(s.power_w for s in samples),
            slowed_by=tuple(name for bit, name in SLOWED_BY.items() if reasons & bit),
        )


@contextmanager
def watch_gpu() -> Generator[GpuWatch]:
    """Ask nvidia-smi five times a second; where it is not, nothing is told."""
    watch = GpuWatch()
    command = _command()
    if command is None:
        yield watch
        return
    process = subprocess.Popen(
        [*command, f"--loop-ms={INTERVAL_MS}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    thread = threading.Thread(target=watch.collect, args=(process.stdout,), daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        process.kill()
        process.wait()
        thread.join()
        process.stdout.close()


def parse(line: str, moment: float) -> Sample:
    """Read one line of nvidia-smi's answer."""
    *numbers, reasons = (field.strip() for field in line.split(","))
    values = [_number(text) for text in numbers]
    mask = int(reasons, 16) if reasons.startswith("0x") else 0
    clock, max_clock, temperature, power = (*values, None, None, None, None)[:4]
    return Sample(moment, clock, max_clock, temperature, power, mask)


def _command() -> list[str] | None:
    if shutil.which("nvidia-smi") is None:
        return None
    for reasons in REASON_FIELDS:
        fields = f"clocks.sm,clocks.max.sm,temperature.gpu,power.draw,{reasons}"
        command = ["nvidia-smi", "--id=0", f"--query-gpu={fields}"]
        command.append("--format=csv,noheader,nounits")
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return command
    return None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A], [Not Supported]
        return None


def _largest(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)
