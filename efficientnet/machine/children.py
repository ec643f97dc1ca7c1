"""Processes that a command starts end when it ends, however that happens."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing.util import Finalize
from typing import Any

from efficientnet.errors import PipelineError

# Of prctl.h.
PR_SET_PDEATHSIG = 1

# For a command to remove what it has half made; then it is killed.
SECONDS_TO_END = 3.0

_kills_children: int | None = None


def obey_parent() -> None:
    """Make this process one that ends with its parent, and that no signal ends but SIGKILL.

    Ctrl-C, and the SIGTERM of a batch system, reach all processes of a command; only the first one
    decides what they mean.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent is not None and os.getppid() != parent.pid:  # It died before the line above.
            os._exit(1)


def kill_children_at_exit() -> None:
    """Have this process kill those that it started with multiprocessing before it ends.

    multiprocessing itself asks them by SIGTERM, which `obey_parent` ignores, and waits without end:
    so it does for the workers of a loader that is still open because an exception holds it.
    """
    global _kills_children
    if _kills_children != os.getpid():  # A fork does not inherit it.
        _kills_children = os.getpid()
        Finalize(None, _kill_children, exitpriority=0)


def _kill_children() -> None:
    if threading.current_thread() is threading.main_thread():
        # torch's handler raises when a loader's worker was killed.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()


def output_of(
    name: str,
    command: Sequence[object],
    error: type[PipelineError],
    limit_s: float | None = None,
    **options: Any,
) -> str:
    """Run a command; return its stdout. What went wrong is an `error` of one line."""
    words = list(map(str, command))
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=limit_s, **options
        )
    except OSError as problem:
        raise error(f"{name} cannot be run: {problem}") from None
    except subprocess.TimeoutExpired:
        raise error(f"{name} has not ended in {limit_s:.0f} s") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise error(f"{name} failed: {said.splitlines()[-1].removeprefix('error: ')}")
    return done.stdout


def stop_command(process: "subprocess.Popen[str]") -> None:
    """Ask a command to end, kill it if it does not, and wait until it is gone."""
    process.terminate()
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
