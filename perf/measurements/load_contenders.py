"""An artifact -> programs that classify pictures: the service, and plain loops without HTTP."""

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from efficientnet import PROJECT_ROOT
from efficientnet.errors import PipelineError
from efficientnet.images.preprocess import preprocess
from efficientnet.machine.children import obey_parent
from efficientnet.runtimes import open_runtime

HOST = "127.0.0.1"
READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 40.0
NUM_LOG_LINES = 20


class LoadError(PipelineError):
    """A program that could not be measured."""


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


class PlainLoop:
    """A process that decodes, preprocesses and infers, picture after picture.

    Args:
        artifact: what infers.
        pictures: encoded.
        num_threads: of a call.
    """

    def __init__(self, artifact: Path, pictures: Sequence[bytes], num_threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_loop, args=(theirs, artifact, list(pictures), num_threads), daemon=True
        )
        self._process.start()
        theirs.close()

    def __enter__(self) -> "PlainLoop":
        """Wait until the program is open."""
        self.answer()
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def begin(self, seconds: float, batch_size: int) -> None:
        """Let it work for some seconds."""
        self._connection.send((seconds, batch_size))

    def answer(self) -> list[float]:
        """Wait; return the seconds of each batch.

        Raises:
            LoadError: the process died.
        """
        try:
            return self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            raise LoadError(f"the plain loop ended with code {code}; see above") from None


def _loop(connection: Connection, artifact: Path, pictures: list[bytes], num_threads: int) -> None:
    obey_parent()
    runtime = open_runtime(artifact, num_threads)
    spec = runtime.info.preprocess
    position = 0

    def classify(batch_size: int) -> None:
        nonlocal position
        images = []
        for _ in range(batch_size):
            images.append(preprocess(pictures[position % len(pictures)], spec))
            position += 1
        runtime.infer(np.stack(images))

    classify(1)
    connection.send([])
    while True:
        try:
            seconds, batch_size = connection.recv()
        except EOFError:
            return
        classify(batch_size)  # the first call of another size takes longer
        times: list[float] = []
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            begin = time.perf_counter()
            classify(batch_size)
            times.append(time.perf_counter() - begin)
        connection.send(times)
