"""An artifact -> programs that classify pictures: the service, and plain loops without HTTP."""

import itertools
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from efficientnet import PROJECT_ROOT
from efficientnet.errors import PipelineError
from efficientnet.images.preprocess import preprocess
from efficientnet.machine.environment import num_usable_cores
from efficientnet.measuring.clock import TimedCall
from efficientnet.measuring.machine_use import CpuUse
from efficientnet.runtimes import open_runtime
from perf.service_load.http_client import HOST

READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 40.0
NUM_LOG_LINES = 20


class LoadError(PipelineError):
    """A service that could not be measured."""


@dataclass(frozen=True)
class RunningService:
    """A service that is ready."""

    process: "subprocess.Popen[bytes]"
    """The supervisor of its workers."""
    port: int

    @property
    def address(self) -> str:
        """Where it answers."""
        return f"http://{HOST}:{self.port}"


@contextmanager
def running_service(artifact: Path, *flags: str, **settings: str) -> Generator[RunningService]:
    """Give a ready service.

    Args:
        artifact: what is served.
        flags: of serving/run.py.
        settings: environment variables of the service.

    Raises:
        LoadError: it ended, or did not get ready.
    """
    command = [str(PROJECT_ROOT / "serving" / "run.py"), "--artifact", str(artifact)]
    command += [*flags, "--host", HOST, "--port"]
    with (
        tempfile.TemporaryDirectory(prefix="efficientnet-load-") as home,
        _running(
            lambda port: [*command, str(port)], "/readyz", BENTOML_HOME=home, **settings
        ) as it,
    ):
        yield it


@contextmanager
def running_peer(
    name: str, artifact: Path, batch: int, packages: Path | None
) -> Generator[RunningService]:
    """Give a ready service of perf/peers.

    Args:
        name: of its file, without `_server`.
        artifact: what is served.
        batch: most images in a call, of a peer that has batches.
        packages: folder of what it needs beside our own packages; None = nothing.

    Raises:
        LoadError: it ended, as it does when its package is missing, or did not get ready.
    """
    script = PROJECT_ROOT / "perf" / "peers" / f"{name}_server.py"
    last = [str(batch)] if name == "litserve" else []
    paths = [*([str(packages.absolute())] if packages else []), str(PROJECT_ROOT)]
    settings = {"PYTHONPATH": os.pathsep.join(paths)}
    # numpy's threads would fight with those of the processes, of which there is one a core.
    settings |= {"OPENBLAS_NUM_THREADS": "1"}
    with _running(
        lambda port: [str(script), str(artifact), str(port), str(num_usable_cores()), *last],
        "/health",
        **settings,
    ) as it:
        yield it


@contextmanager
def _running(
    command: Callable[[int], Sequence[str]], ready_path: str, **settings: str
) -> Generator[RunningService]:
    with tempfile.TemporaryDirectory(prefix="efficientnet-load-") as scratch:
        log_path = Path(scratch) / "service.log"
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port = probe.getsockname()[1]
        with log_path.open("wb") as log_file:
            service = subprocess.Popen(
                [sys.executable, *command(port)],
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **settings},
                start_new_session=True,
            )
        try:
            _wait_until_ready(service, f"http://{HOST}:{port}{ready_path}", log_path)
            yield RunningService(service, port)
        finally:
            _stop(service)


def _stop(service: "subprocess.Popen[bytes]") -> None:
    # Its processes too: LitServe's are not its own only, and do not end with it when it is killed.
    processes = [psutil.Process(service.pid)] if service.poll() is None else []
    processes += [child for process in processes for child in process.children(recursive=True)]
    service.terminate()
    _, alive = psutil.wait_procs(processes, STOP_TIMEOUT_S)
    for process in alive:
        process.kill()
    service.wait()


def _wait_until_ready(service: "subprocess.Popen[bytes]", address: str, log_path: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and service.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    lines = log_path.read_text(errors="replace").splitlines()[-NUM_LOG_LINES:]
    raise LoadError("\n".join(("the service did not get ready; its log ends:", *lines)))


@dataclass(frozen=True)
class LoopTurn:
    """What a plain loop did."""

    samples_ms: tuple[float, ...]
    """Of each batch."""
    images_per_s: float
    cores_busy_elsewhere: float | None


class PlainLoop:
    """Decodes, preprocesses and infers, picture after picture; the subject of a Contender.

    Args:
        artifact: what infers.
        pictures: encoded.
        num_threads: of a call.
    """

    def __init__(self, artifact: Path, pictures: Sequence[bytes], num_threads: int) -> None:
        self._runtime = open_runtime(artifact, num_threads)
        self._pictures = itertools.cycle(pictures)

    def turn(self, batch_size: int, seconds: float) -> LoopTurn:
        """Work for some seconds."""
        spec = self._runtime.info.preprocess

        def classify() -> object:
            batch = itertools.islice(self._pictures, batch_size)
            return self._runtime.infer(np.stack([preprocess(data, spec) for data in batch]))

        timed, before = TimedCall(classify), CpuUse.now()
        turn = timed.turn(seconds)
        return LoopTurn(
            turn.samples_ms,
            batch_size * len(turn.samples_ms) / turn.elapsed_s,
            before.cores_busy_elsewhere(),
        )
