"""What else the machine does: CPU time that other programs took, as far as the system tells."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

CPU_TIMES = Path("/proc/stat")


@dataclass(frozen=True)
class CpuUse:
    """CPU seconds so far of everything on the cores this process may use, and of the process."""

    clock_s: float
    busy_s: float | None
    """With the time that a hypervisor gave to others; None where the system does not tell."""
    own_s: float

    @classmethod
    def now(cls) -> Self:
        """Read the counters."""
        return cls(time.monotonic(), _busy_s(), time.process_time())

    def cores_busy_elsewhere(self) -> float | None:
        """Return how many cores other programs kept busy since, on average."""
        now = CpuUse.now()
        if now.busy_s is None or self.busy_s is None:
            return None
        elsewhere_s = (now.busy_s - self.busy_s) - (now.own_s - self.own_s)
        return max(0.0, elsewhere_s / (now.clock_s - self.clock_s))


def _busy_s() -> float | None:
    if not CPU_TIMES.exists() or not hasattr(os, "sched_getaffinity"):
        return None
    own_cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    busy = 0
    for line in CPU_TIMES.read_text().splitlines():
        name, *fields = line.split()
        if name in own_cores:
            # user, nice, system, (idle, iowait), irq, softirq, steal: see proc_stat(5).
            times = [int(field) for field in fields[:8]]
            busy += sum(times[:3]) + sum(times[5:])
    return busy / os.sysconf("SC_CLK_TCK")
