"""Paths on the command line -> the programs to measure, all of them checked before any work."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from efficientnet.formats.artifact import MANIFEST_FILE, ArtifactError, read_artifact
from efficientnet.formats.checkpoint import RECORD_FILE, newest_checkpoint, read_checkpoint
from efficientnet.images.datasets import Dataset, load_held_out
from efficientnet.images.preprocess_spec import PreprocessSpec
from efficientnet.machine.atomic import dangling_link_hint
from efficientnet.network.variants import VariantSpec, spec_of
from efficientnet.precision import Precision
from efficientnet.runtimes.names import RUNTIMES

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Program:
    """What an artifact's manifest or a checkpoint's record says of the program."""

    path: Path
    program_sha256: str
    checkpoint_sha256: str
    """Of the weights that the program was made of."""
    variant: str
    architecture: VariantSpec | None
    runtime: str
    precision: Precision
    preprocess: PreprocessSpec
    class_names: tuple[str, ...]
    data: str
    max_batch_size: int | None
    runs_on_gpu: bool

    @property
    def spec(self) -> VariantSpec:
        """The network's table of stages."""
        return spec_of(self.variant, self.architecture)

    @property
    def identity(self) -> dict[str, Any]:
        """What LatencyRecord and AccuracyRecord have alike."""
        return {
            "program_sha256": self.program_sha256,
            "checkpoint_sha256": self.checkpoint_sha256,
            "variant": self.variant,
            "runtime": self.runtime,
            "precision": self.precision,
            "image_size": self.preprocess.image_size,
            "preprocess_sha256": self.preprocess.sha256,
        }


def read_programs(
    paths: Sequence[Path], runs: Path = Path("runs"), artifacts: Path = Path("artifacts")
) -> list[Program]:
    """Read and check each path; without any, the newest checkpoint and its artifacts, logged."""
    if paths:
        return [read_program(path) for path in paths]
    checkpoint = read_program(_relative(newest_checkpoint(runs)))
    found = _artifacts_of(checkpoint.checkpoint_sha256, artifacts)
    log.info("checkpoint %s (of the newest complete run)", checkpoint.path)
    for path in found:
        log.info("artifact %s (made of it)", path)
    if not found:
        log.info("no artifact of it under %s: make one with 'python export/ort.py'", artifacts)
    return [checkpoint, *(read_program(path) for path in found)]


def read_program(path: Path) -> Program:
    """Read an artifact or a checkpoint directory and check its hash."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; expected an artifact directory like artifacts/v2-s/"
            "onnxruntime-fp32 or a checkpoint directory like runs/<recipe>-<time>/checkpoint"
            f"{dangling_link_hint(path)}"
        )
    if (path / MANIFEST_FILE).is_file():
        manifest = read_artifact(path)
        if manifest.runtime not in RUNTIMES:
            raise ArtifactError(
                f"{path} is for the runtime '{manifest.runtime}', "
                f"this program knows: {', '.join(RUNTIMES)}"
            )
        return Program(
            path=path,
            program_sha256=manifest.program_sha256,
            checkpoint_sha256=manifest.checkpoint_sha256,
            variant=manifest.variant,
            architecture=manifest.architecture,
            runtime=manifest.runtime,
            precision=manifest.precision,
            preprocess=manifest.preprocess,
            class_names=manifest.class_names,
            data=manifest.data,
            max_batch_size=manifest.input.batch.max,
            runs_on_gpu=manifest.build.target_device != "cpu",
        )
    if (path / RECORD_FILE).is_file():
        record = read_checkpoint(path)
        return Program(
            path=path,
            program_sha256=record.weights_sha256,
            checkpoint_sha256=record.weights_sha256,
            variant=record.variant,
            architecture=record.architecture,
            runtime="torch",
            precision="fp32",
            preprocess=record.preprocess,
            class_names=record.class_names,
            data=record.data,
            max_batch_size=None,
            runs_on_gpu=False,
        )
    raise ArtifactError(
        f"{path} is neither an artifact nor a checkpoint: "
        f"there is no {MANIFEST_FILE} and no {RECORD_FILE} in it"
    )


def images_for(program: Program, data: str | None, needs_labels: bool = False) -> Dataset:
    """Load the data the program was trained on, or `data`, with labels that are its classes.

    Raises:
        FileNotFoundError: it is not there; the message names --data.
        DatasetError: other classes, no labels where they are needed, or a command that only the
            program's file names.
    """
    try:
        return load_held_out(program.data, data, program.class_names, needs_labels)
    except FileNotFoundError as error:
        advice = "" if data else f" ({program.path} was trained on it; if it has moved, add --data)"
        raise FileNotFoundError(f"{error}{advice}") from None


def require_writable(path: Path, flag: str) -> None:
    """Find out before the work, not after it, that a file cannot be written."""
    was_there = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        if not was_there:
            path.unlink()
    except OSError as error:
        raise OSError(
            f"cannot write {path}: {error.strerror}; choose another place with {flag}"
        ) from None


class _Parent(BaseModel):
    checkpoint_sha256: str


def _artifacts_of(checkpoint_sha256: str, artifacts: Path) -> list[Path]:
    found: list[Path] = []
    for manifest in sorted(artifacts.glob(f"*/*/{MANIFEST_FILE}")):
        # Not one that is being built, and not the link to the default a second time.
        if manifest.parent.name.startswith(".") or manifest.parent.is_symlink():
            continue
        try:
            parent = _Parent.model_validate_json(manifest.read_bytes())
        except ValidationError:
            log.info("%s is left out: its %s cannot be read", manifest.parent, MANIFEST_FILE)
            continue
        if parent.checkpoint_sha256 == checkpoint_sha256:
            found.append(manifest.parent)
    return found


def _relative(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
