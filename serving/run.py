"""An artifact -> a running service: checks what can go wrong, then becomes the supervisor.

    python serving/run.py
    python serving/run.py --artifact artifacts/tiny/onnxruntime-fp32 --port 3001
    python serving/run.py --allow-change    # of the artifact while it runs, by serving/change.py

The page is at /, the API's description at /docs, the metrics at /metrics. Ctrl-C stops it.
"""

import ipaddress
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from efficientnet import PROJECT_ROOT
from efficientnet.command import parse_flags, run_command
from efficientnet.formats.artifact import read_artifact
from serving.control import own_folder
from serving.settings import (
    ARTIFACT_SHA256_VARIABLE,
    ARTIFACT_VARIABLE,
    PROCESS_ENVIRONMENT,
    read_settings,
)
from serving.supervisor import ServeError, listening_socket

# What a service writes while it runs, mostly metrics, fits in this.
NEEDED_DISK_BYTES = 1_000_000

log = logging.getLogger(__name__)


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

    allow_change: bool = False
    """Let this user of this machine change the artifact while the service runs, by
    serving/change.py; on Linux."""

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
    """Check artifact, port and disk, and replace this process by the service.

    Raises:
        ArtifactError: missing, damaged, or not ours.
        ServeError: the port is taken, or settings contradict each other.
        OSError: the disk is full.
    """
    settings = read_settings(os.environ)
    if config.allow_change and settings.artifact_sha256:
        raise ServeError(
            f"{ARTIFACT_SHA256_VARIABLE} allows one artifact, and --allow-change any: "
            "unset the one, or leave out the other"
        )
    artifact = config.artifact.absolute() if config.artifact else settings.artifact
    manifest = read_artifact(artifact)
    listening_socket(config.host, config.port).close()
    environment = {
        **PROCESS_ENVIRONMENT,
        # A starting service empties the metrics folder of its BentoML home, so two services with
        # the same one would lose metrics. A port has one service.
        "BENTOML_HOME": str(own_folder() / f"serve-{config.port}"),
        **os.environ,
        ARTIFACT_VARIABLE: str(artifact),
    }
    home = Path(environment["BENTOML_HOME"])
    _check_disk(home)
    environment["PROMETHEUS_MULTIPROC_DIR"] = str(home / f"metrics-{config.port}")
    log.info(
        "serve %s, %s %s: %s", manifest.variant, manifest.runtime, manifest.precision, artifact
    )
    address = address_of(config.host, config.port)
    log.info("page     %s/", address)
    log.info("API      %s/docs", address)
    log.info("metrics  %s/metrics", address)
    command = [sys.executable, "-m", "serving.supervisor"]
    command += ["--host", config.host, "--port", str(config.port)]
    command += ["--allow-change"] if config.allow_change else []
    os.chdir(PROJECT_ROOT)
    os.execve(sys.executable, command, environment)


def address_of(host: str, port: int) -> str:
    """Return the address that a browser on this machine takes."""
    host = {"0.0.0.0": "localhost", "::": "localhost", "127.0.0.1": "localhost"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _check_disk(home: Path) -> None:
    home.mkdir(parents=True, exist_ok=True)
    probe = home / f"probe-{os.getpid()}"
    try:
        probe.write_bytes(bytes(NEEDED_DISK_BYTES))
    finally:
        probe.unlink(missing_ok=True)


if __name__ == "__main__":
    run_command(lambda: parse_flags(ServeConfig, __doc__), main)
