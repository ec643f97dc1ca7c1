"""An artifact -> programs that classify pictures: the service, and plain loops without HTTP."""

import itertools
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from efficientnet import PROJECT_ROOT
from efficientnet.errors import PipelineError
from efficientnet.images.preprocess import preprocess
from efficientnet.measuring.clock import TimedCall
from efficientnet.measuring.machine_use import CpuUse
from efficientnet.runtimes import open_runtime

HOST = "127.0.0.1"
READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 40.0
NUM_LOG_LINES = 20


class LoadError(PipelineError):
    """A service that could not be measured."""


@contextmanager
def running_service(artifact: Path, **settings: str) -> Generator[str]:
    """Give the address of a ready service.

    Args:
        artifact: what is served.
        settings: environment variables of the service.

    Raises:
        LoadError: it ended, or did not get ready.
    """
    with tempfile.TemporaryDirectory(prefix="efficientnet-load-") as scratch:
        log_path = Path(scratch) / "service.log"
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port = probe.getsockname()[1]
        command = [sys.executable, str(PROJECT_ROOT / "serving" / "run.py")]
        command += ["--artifact", str(artifact), "--host", HOST, "--port", str(port)]
        environment = {**os.environ, "BENTOML_HOME": scratch, **settings}
        with log_path.open("wb") as log_file:
            service = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        try:
            _wait_until_ready(service, port, log_path)
            yield f"http://{HOST}:{port}"
        finally:
            service.terminate()
            try:
                service.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                service.kill()
                service.wait()


def _wait_until_ready(service: "subprocess.Popen[bytes]", port: int, log_path: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and service.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/readyz", timeout=5):
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
