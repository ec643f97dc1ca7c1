"""An artifact -> a running service, which changes to it and loses no request.

    python serving/change.py --to artifacts/v2-s/openvino-int8
    python serving/change.py --to artifacts/lite0/default --port 3001

The service was started with --allow-change, by the same user of the same machine. It checks the
artifact, serves it by new workers, and ends the old ones when they have answered what they had:
then this command ends, and its last line on stdout is the SHA-256 that every answer names. Whatever
is wrong with the artifact, or Ctrl-C before the new workers are ready, changes nothing.
"""

from dataclasses import dataclass
from pathlib import Path

from efficientnet.command import parse_flags, run_command
from serving.control import ask, control_path


@dataclass(frozen=True)
class ChangeConfig:
    """What is served from now on, and where."""

    to: Path
    """Artifact directory."""

    port: int = 3000
    """TCP port of the service."""


def main(config: ChangeConfig) -> str:
    """Change the artifact and return its SHA-256.

    Raises:
        ControlError: see serving.control.ask.
    """
    return ask(control_path(config.port), config.to.absolute())


if __name__ == "__main__":
    run_command(lambda: parse_flags(ChangeConfig, __doc__), main)
