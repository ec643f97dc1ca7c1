"""Processes that tests start: forks of one that has the libraries loaded, and how they do."""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import psutil

_ONE_AT_A_TIME = threading.Lock()
CONTEXT = multiprocessing.get_context("forkserver")


@cache
def _server(preloaded: str) -> forkserver.ForkServer:
    server = forkserver.ForkServer()
    server.set_forkserver_preload([preloaded])
    with pytest.MonkeyPatch.context() as patch:
        # The server does not get pytest's path, and passes over a name that it does not find.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        server.ensure_running()
    return server


def fork(target: Callable[..., object], *args: object, preloaded: str = "preloaded") -> BaseProcess:
    """Call a function in a fork of a process that has loaded the libraries, and has no threads.

    Args:
        target: can be pickled.
        args: of it, likewise.
        preloaded: the module that loads them.
    """
    process = CONTEXT.Process(target=target, args=args)
    # multiprocessing knows of one such server.
    with _ONE_AT_A_TIME, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            forkserver, "connect_to_new_process", _server(preloaded).connect_to_new_process
        )
        process.start()
    return process


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
    while not (holds := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return holds


def service_at(port: int) -> "psutil.Process":
    """Find the supervisor of a service that this process has started, if only as a fork's fork."""
    import psutil

    for process in psutil.Process().children(recursive=True):  # parents first
        if port in _listening_ports(process):
            return process
    raise LookupError(f"no process of ours listens on port {port}")


def listening_ports(pid: int) -> set[int]:
    """List the TCP ports that a process and all that it started listen on."""
    import psutil

    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return set().union(*map(_listening_ports, processes))


def _listening_ports(process: "psutil.Process") -> set[int]:
    connections = process.net_connections("tcp")
    return {c.laddr.port for c in connections if c.status == "LISTEN"}
