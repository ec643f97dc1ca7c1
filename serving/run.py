"""An artifact -> a running service: checks what can go wrong, then becomes `bentoml serve`.

    python serving/run.py
    python serving/run.py --artifact artifacts/tiny/onnxruntime-fp32 --port 3001

The page is at /, the API's description at /docs, the metrics at /metrics. Ctrl-C stops it.
"""

import errno
import ipaddress
import logging
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from efficientnet import PROJECT_ROOT
from efficientnet.command import parse_flags, run_command
from efficientnet.errors import PipelineError, require_names
from efficientnet.formats.artifact import ArtifactError, read_artifact
from efficientnet.runtimes import Runtime, open_runtime
from serving.settings import ARTIFACT_VARIABLE, read_settings

SERVICE = "serving.service:Classifier"

# What a service writes while it runs, mostly metrics, fits in this.
NEEDED_DISK_BYTES = 1_000_000

# BentoML itself would wait a day for a client that never finishes its upload.
GRACE_S = 10

log = logging.getLogger(__name__)


class ServeError(PipelineError):
    """A service that cannot be started here."""


@dataclass(frozen=True)
class ServeConfig:
    """What is served, and where."""

    artifact: Path | None = None
    """Artifact directory; None = $CLASSIFIER_ARTIFACT or artifacts/v2-s/onnxruntime-fp32."""

    host: str = "127.0.0.1"
    """IP address to listen on: 127.0.0.1 for this machine only, 0.0.0.0 for everyone who can reach
    it. There is no password."""

    port: int = 3000
    """TCP port, 1 to 65535."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 1 <= self.port <= 65535:
            raise ValueError(f"--port is {self.port}, expected 1 to 65535")
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            raise ValueError(
                f"--host is '{self.host}', expected an IP address: "
                "127.0.0.1 for this machine only, or 0.0.0.0 for all its networks"
            ) from None


def main(config: ServeConfig) -> NoReturn:
    """Check artifact, runtime, port and disk, and replace this process by the service.

    Raises:
        ArtifactError: missing, damaged, not ours, its runtime is not installed, or it has another
            number of outputs than of names.
        ServeError: the port is taken.
        OSError: the disk is full.
    """
    settings = read_settings(os.environ)
    artifact = config.artifact.absolute() if config.artifact else settings.artifact
    manifest = read_artifact(artifact)
    check_outputs(open_runtime(artifact, settings.num_threads))
    check_port(config.host, config.port)
    environment = {
        "BENTOML_DO_NOT_TRACK": "True",
        "BENTOML_HOME": str(_own_bentoml_home(config.port)),
        **os.environ,
        ARTIFACT_VARIABLE: str(artifact),
    }
    _check_disk(Path(environment["BENTOML_HOME"]))
    log.info(
        "serve %s, %s %s: %s", manifest.variant, manifest.runtime, manifest.precision, artifact
    )
    address = address_of(config.host, config.port)
    log.info("page     %s/", address)
    log.info("API      %s/docs", address)
    log.info("metrics  %s/metrics", address)
    command = [sys.executable, "-m", "bentoml", "serve", SERVICE]
    command += ["--host", config.host, "--port", str(config.port)]
    command += ["--timeout-graceful-shutdown", str(GRACE_S)]
    os.chdir(PROJECT_ROOT)
    os.execve(sys.executable, command, environment)


def check_outputs(runtime: Runtime) -> None:
    """Raise an ArtifactError unless the program gives a logit for each name of the manifest."""
    info = runtime.info
    size = info.preprocess.image_size
    logits = runtime.infer(np.zeros((1, 3, size, size), dtype=np.float32))
    try:
        require_names(info.class_names, logits.shape[1])
    except ValueError as error:
        raise ArtifactError(f"the manifest does not fit its program: {error}") from None


def check_port(host: str, port: int) -> None:
    """Raise a ServeError when nothing can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As the service itself will: connections that were closed a moment ago do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ServeError(
                    f"port {port} is taken by another program; stop that program, "
                    f"or use another port: make serve PORT={port + 1}, "
                    f"or --port {port + 1}"
                ) from None
            raise ServeError(f"cannot listen on {host} port {port}: {error.strerror}") from None


def address_of(host: str, port: int) -> str:
    """Return the address that a browser on this machine takes."""
    host = {"0.0.0.0": "localhost", "::": "localhost", "127.0.0.1": "localhost"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _own_bentoml_home(port: int) -> Path:
    # A starting service empties the metrics folder of its BentoML home, so two services with the
    # same one would lose metrics. A port has one service.
    #
    # In memory where there is such a file system: metrics are memory-mapped files, and a worker
    # that writes to one when the disk has become full is killed, again and again.
    shared_memory = Path("/dev/shm")
    if os.access(shared_memory, os.W_OK):
        home = shared_memory / f"efficientnet-{os.getuid()}"
        home.mkdir(mode=0o700, exist_ok=True)
        if home.stat().st_uid == os.getuid():
            return home / f"serve-{port}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "efficientnet" / f"serve-{port}"


def _check_disk(home: Path) -> None:
    home.mkdir(parents=True, exist_ok=True)
    probe = home / f"probe-{os.getpid()}"
    try:
        probe.write_bytes(bytes(NEEDED_DISK_BYTES))
    finally:
        probe.unlink(missing_ok=True)


if __name__ == "__main__":
    run_command(lambda: parse_flags(ServeConfig, __doc__), main)
