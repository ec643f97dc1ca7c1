"""An artifact -> a bento, which holds it, the service, and the names of the packages they need.

    python serving/pack.py
    python serving/pack.py --artifact artifacts/lite0/default

The last line on stdout is the bento's tag, for `bentoml serve TAG` and `bentoml containerize TAG`.
"""

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from efficientnet import PROJECT_ROOT
from efficientnet.command import parse_flags, run_command
from efficientnet.errors import PipelineError
from efficientnet.formats.artifact import ArtifactManifest, read_artifact
from serving.settings import ARTIFACT_VARIABLE, DEFAULT_ARTIFACT, read_settings

SOURCES = ("serving", "efficientnet")
FILES = ("bentofile.yaml", "constraints.txt", "pyproject.toml")

# What the bentofile installs as the runtime, and what stands in its place; its own package, if any.
DEFAULT_PACKAGE = "onnxruntime"
PACKAGES = {"onnxruntime": DEFAULT_PACKAGE, "openvino": "openvino", "native": None}

log = logging.getLogger(__name__)


class PackError(PipelineError):
    """An artifact that cannot be packed, or a build that failed."""


@dataclass(frozen=True)
class PackConfig:
    """What is packed."""

    artifact: Path | None = None
    """Artifact directory; None = $CLASSIFIER_ARTIFACT or artifacts/v2-s/onnxruntime-fp32."""


def main(config: PackConfig) -> str:
    """Build the bento and return its tag.

    Raises:
        ArtifactError: missing, damaged, or not ours.
        PackError: its runtime is none that a bento can hold, or `bentoml build` failed.
    """
    artifact = (config.artifact or read_settings(os.environ).artifact).absolute()
    manifest = read_artifact(artifact)
    log.info("pack %s, %s %s: %s", manifest.variant, manifest.runtime, manifest.precision, artifact)
    with tempfile.TemporaryDirectory(prefix="efficientnet-bento-") as scratch:
        project = Path(scratch)
        for folder in SOURCES:
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(PROJECT_ROOT / folder, project / folder, ignore=ignore)
        for name in FILES:
            shutil.copy(PROJECT_ROOT / name, project)
        shutil.copytree(artifact, project / DEFAULT_ARTIFACT.relative_to(PROJECT_ROOT))
        bentofile = project / "bentofile.yaml"
        bentofile.write_text(with_packages(bentofile.read_text(), manifest))
        return build(project)


def with_packages(bentofile: str, manifest: ArtifactManifest) -> str:
    """Name the artifact's runtime in the place of ONNX Runtime, in the version that is tested.

    Raises:
        PackError: see main.
    """
    if manifest.runtime not in PACKAGES or manifest.provider is not None:
        raise PackError(
            f"the artifact is for {manifest.runtime} on a GPU; a bento of the kinds "
            f"{', '.join(PACKAGES)} for the processor can be packed here"
        )
    package = PACKAGES[manifest.runtime]
    constraints = (PROJECT_ROOT / "constraints.txt").read_text()
    pinned = re.search(rf"^{package}==\S+$", constraints, re.M)
    line = f"    - {pinned[0]}\n" if package and pinned else ""
    return re.sub(rf"^    - {DEFAULT_PACKAGE}==.*\n", line, bentofile, flags=re.M)


def build(project: Path) -> str:
    """Run `bentoml build` there and return the tag of what it made.

    Raises:
        PackError: it failed.
    """
    environment = {k: v for k, v in os.environ.items() if k != ARTIFACT_VARIABLE}
    # The copy's packages, and not those of the installed project.
    environment["PYTHONPATH"] = str(project)
    command = [sys.executable, "-m", "bentoml", "build", "--output", "tag"]
    done = subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise PackError(f"bentoml build failed:\n{done.stdout}{done.stderr}")
    tag = done.stdout.strip().splitlines()[-1].removeprefix("__tag__:")
    log.info("serve it   bentoml serve %s", tag)
    log.info("image      bentoml containerize %s", tag)
    return tag


if __name__ == "__main__":
    run_command(lambda: parse_flags(PackConfig, __doc__), main)
