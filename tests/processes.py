"""Looking after processes that tests start."""

import time
from collections.abc import Callable
from pathlib import Path


def process_exists(pid: int) -> bool:
    """Tell whether a process does anything any more: one that nobody has waited for does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def child_pids(pid: int) -> list[int]:
    """List the processes that a process has started."""
    pids: list[int] = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(
                line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line
            )
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields["PPid"].strip() == str(pid):
            pids.append(int(status.parent.name))
    return pids


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    """Wait for a condition; return whether it came true."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()
