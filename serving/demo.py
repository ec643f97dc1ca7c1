"""An artifact -> one held-out picture classified over HTTP by a service that is stopped again.

    python serving/demo.py
    python serving/demo.py --artifact artifacts/tiny/onnxruntime-fp32 --report reports/report.md

The picture is left in reports/demo/, to be dropped on the page.
"""

import http.client
import json
import logging
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from pydantic import RootModel

from efficientnet import PROJECT_ROOT
from efficientnet.command import parse_flags, run_command
from efficientnet.errors import PipelineError
from efficientnet.formats.artifact import read_artifact
from efficientnet.images.datasets import Sample, choose_source, load_dataset
from serving.answers import Prediction, bars_of
from serving.settings import DEFAULT_ARTIFACT, read_settings

HOST = "127.0.0.1"
PICTURES_DIR = Path("reports") / "demo"
READY_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 20.0
REQUEST_TIMEOUT_S = 60.0
NUM_LOG_LINES = 20

log = logging.getLogger(__name__)

Predictions = RootModel[list[Prediction]]


class DemoError(PipelineError):
    """A service that did not start, answer or stop as it must."""


@dataclass(frozen=True)
class DemoConfig:
    """What is shown."""

    artifact: Path | None = None
    """Artifact directory; None = $CLASSIFIER_ARTIFACT or artifacts/v2-s/onnxruntime-fp32."""

    data: str | None = None
    """Folder or tar shards, as in training/run.py, of which a held-out picture is shown; None =
    what the artifact's network was trained on."""

    report: Path | None = None
    """Report to point to at the end; None = none."""


def main(config: DemoConfig) -> Predictions:
    """Start the service, let it classify a picture, stop it, and say what to do next.

    Raises:
        ArtifactError: missing, damaged, not ours, or its runtime is not installed.
        DatasetError: see choose_picture.
        DemoError: the service did not get ready, or refused the picture.
    """
    artifact = (config.artifact or read_settings(os.environ).artifact).absolute()
    sample, true_label = choose_picture(read_artifact(artifact).data, config.data)
    picture = PICTURES_DIR / sample.name.replace("/", "-")
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(sample.read())
    with running_service(artifact) as port:
        answer = classify_over_http(port, picture)
    log.info("")
    log.info("%s, a held-out picture of the class '%s':", picture, true_label)
    log.info("%s", bars_of(answer.root))
    log.info("")
    if config.report is not None and config.report.is_file():
        log.info("report         %s", config.report)
    log.info("serve it again %s", command_to_serve(artifact))
    log.info("and drop %s on the page it names", picture)
    return answer


def choose_picture(trained_on: str, data: str | None) -> tuple[Sample, str]:
    """Return a picture that training did not see, and the name of its class.

    Args:
        trained_on: the data that the manifest names.
        data: other data; None = what it was trained on.

    Raises:
        FileNotFoundError, DatasetError: see load_dataset and choose_source.
    """
    dataset = load_dataset(choose_source(trained_on, data))
    sample = dataset.val[0]
    # Sample photographs have no labels.
    return sample, dataset.class_names[sample.label] if dataset.class_names else "unknown"


def command_to_serve(artifact: Path) -> str:
    """Return the command line that serves an artifact."""
    if artifact == DEFAULT_ARTIFACT:
        return "make serve"
    program, script = (
        os.path.relpath(sys.executable),
        os.path.relpath(PROJECT_ROOT / "serving" / "run.py"),
    )
    return shlex.join([program, script, "--artifact", os.path.relpath(artifact)])


@contextmanager
def running_service(artifact: Path, log_path: Path | None = None) -> Generator[int]:
    """Give the port of a ready service; when the block ends, however it ends, nothing is left.

    Args:
        artifact: what is served.
        log_path: where the service writes its log; None = where it is removed afterwards.

    Raises:
        DemoError: the service ended or did not get ready; its last log lines are in the message.
    """
    with tempfile.TemporaryDirectory(prefix="efficientnet-demo-") as scratch:
        log_path = log_path or Path(scratch) / "service.log"
        port = free_port()
        command = [
            sys.executable,
            str(PROJECT_ROOT / "serving" / "run.py"),
            "--artifact",
            str(artifact),
        ]
        command += ["--host", HOST, "--port", str(port)]
        log.info("start the service on port %d", port)
        with log_path.open("wb") as log_file:
            service = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "BENTOML_HOME": scratch},
                # Ctrl-C is for this process, which then stops the service in an orderly way.
                start_new_session=True,
            )
        try:
            wait_until_ready(service, port, log_path)
            yield port
        finally:
            stop(service)


def free_port() -> int:
    """Return a TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def stop(service: subprocess.Popen[bytes]) -> None:
    """End the service and all processes it started, and wait until they are gone."""
    try:
        # Collected first: BentoML's workers are in sessions of their own, and forget their parent
        # when it dies.
        processes = [psutil.Process(service.pid)]
        processes += processes[0].children(recursive=True)
    except psutil.NoSuchProcess:
        processes = []
    service.terminate()
    _, alive = psutil.wait_procs(processes, STOP_TIMEOUT_S)
    for process in alive:
        process.kill()
    _, alive = psutil.wait_procs(alive, STOP_TIMEOUT_S)
    service.wait()
    if alive:
        raise DemoError(f"the service did not stop: processes {[p.pid for p in alive]} are left")


def classify_over_http(port: int, picture: Path) -> RootModel[list[Prediction]]:
    """Send a picture to POST /classify.

    Raises:
        DemoError: the service refused it.
    """
    boundary = uuid.uuid4().hex
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; '
        f'filename="{picture.name}"\r\nContent-Type: application/octet-stream\r\n\r\n'
    )
    body = head.encode() + picture.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
    connection = http.client.HTTPConnection(HOST, port, timeout=REQUEST_TIMEOUT_S)
    try:
        connection.request(
            "POST",
            "/classify",
            body,
            {"Content-Type": f"multipart/form-data; boundary={boundary}"},
        )
        response = connection.getresponse()
        text = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise DemoError(f"the service answered {response.status}: {text.decode(errors='replace')}")
    return Predictions.model_validate(json.loads(text))


def wait_until_ready(service: subprocess.Popen[bytes], port: int, log_path: Path) -> None:
    """Return when GET /readyz answers 200.

    Raises:
        DemoError: the service ended, or is not ready in time; the message ends with its log.
    """
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if service.poll() is not None:
            raise DemoError(f"the service ended at its start:\n{_last_lines(log_path)}")
        if _is_ready(port):
            return
        time.sleep(0.1)
    raise DemoError(
        f"the service was not ready after {READY_TIMEOUT_S:g} s:\n{_last_lines(log_path)}"
    )


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _last_lines(log_path: Path) -> str:
    lines = log_path.read_text(errors="replace").splitlines()
    return "\n".join(lines[-NUM_LOG_LINES:])


if __name__ == "__main__":
    run_command(lambda: parse_flags(DemoConfig, __doc__), main)
