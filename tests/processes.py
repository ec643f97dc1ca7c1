"""Looking after processes that tests start."""

import time
from collections.abc import Callable
from pathlib import Path

import psutil


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


def listening_ports(pid: int) -> set[int]:
    """List the TCP ports that a process and all that it started listen on."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return {
        connection.laddr.port
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
