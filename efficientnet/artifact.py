"""An exported network on disk: one program file and manifest.json, which says all about it.

artifacts/<variant>/<runtime>-<precision>/
"""

import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from efficientnet.atomic import replaced_directory, sha256_of_file, write_text
from efficientnet.environment import EnvironmentRecord
from efficientnet.errors import PipelineError, first_problem
from efficientnet.precision import Precision
from efficientnet.preprocess import PreprocessSpec, require_sha256

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"


class ArtifactError(PipelineError):
    """An artifact that is missing, damaged, of another format, or asked for what it cannot do."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BatchRange(_Frozen):
    """Images per call that the program takes; `opt` is what it was built for."""

    min: int = Field(ge=1)
    opt: int
    max: int


class InputSpec(_Frozen):
    """The program's input, after preprocessing."""

    name: str
    dtype: Literal["float32"]
    layout: Literal["NCHW"]
    shape: tuple[int, int, int]
    """Channels, height, width."""
    batch: BatchRange


class OutputSpec(_Frozen):
    """The program's output: logits, not probabilities."""

    name: str
    dtype: Literal["float32"]
    shape: tuple[int]
    """Number of classes."""


class BuildRecord(_Frozen):
    """How the program was made."""

    environment: EnvironmentRecord
    opset: int | None
    target_device: str
    compute_capability: str | None
    seconds: float


class ParityTolerances(_Frozen):
    """What an artifact must keep to, or it is refused."""

    max_abs_logit_error: float
    min_top1_agreement: float = Field(ge=0, le=1)


class ParityRecord(_Frozen):
    """Agreement with the eager float32 model on real held-out images."""

    num_images: int
    max_abs_logit_error: float
    mean_abs_logit_error: float
    top1_agreement: float = Field(ge=0, le=1)
    tolerances: ParityTolerances


class ArtifactManifest(_Frozen):
    """manifest.json."""

    format_version: int = FORMAT_VERSION
    variant: str
    runtime: str
    precision: Precision
    program_file: str
    program_sha256: str
    checkpoint_sha256: str
    """SHA-256 of the checkpoint's weights."""
    input: InputSpec
    output: OutputSpec
    preprocess: PreprocessSpec
    preprocess_sha256: str = ""
    """Of `preprocess`, so that a change by hand is found; filled in when it is written."""
    class_names: tuple[str, ...]
    data: str
    """What the network was trained on; accuracy and benchmarks take its val images."""
    build: BuildRecord
    parity: ParityRecord
    size_bytes: int
    flops_per_image: int
    """Floating-point operations of convolutions and classifier: two for each multiply-add."""
    weight_bytes: int

    @model_validator(mode="after")
    def _check_preprocess(self) -> Self:
        require_sha256(self.preprocess, self.preprocess_sha256)
        return self


@contextmanager
def new_artifact_directory(directory: Path) -> Generator[Path]:
    """Give a directory to build in, which becomes `directory` when the block ends without an error.

    Raises:
        ArtifactError: the block wrote no manifest.
    """
    with replaced_directory(directory) as fresh:
        yield fresh
        if not (fresh / MANIFEST_FILE).is_file():
            raise ArtifactError(
                f"nothing was built for {directory}: no {MANIFEST_FILE} was written"
            )


def write_manifest(directory: Path, manifest: ArtifactManifest) -> None:
    """Write manifest.json, the last file of an artifact."""
    manifest = manifest.model_copy(update={"preprocess_sha256": manifest.preprocess.sha256})
    write_text(directory / MANIFEST_FILE, manifest.model_dump_json(indent=2) + "\n")


def read_artifact(directory: Path) -> ArtifactManifest:
    """Read manifest.json and check that the program is the one it speaks of.

    Raises:
        ArtifactError: no artifact there, another format, or damaged.
    """
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise ArtifactError(
            f"{directory} is not an artifact: there is no {MANIFEST_FILE} in it; "
            "make one with 'python export/ort.py'"
        )
    text = path.read_text(encoding="utf-8", errors="replace")
    found = re.search(r'"format_version"\s*:\s*(-?\d+)', text)
    if found and int(found.group(1)) != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {found.group(1)}, this program reads {FORMAT_VERSION}; "
            "export the checkpoint again"
        )
    try:
        manifest = ArtifactManifest.model_validate_json(text)
    except ValidationError as error:
        raise ArtifactError(f"{path} is damaged or not ours: {first_problem(error)}") from None
    program = directory / manifest.program_file
    if program.parent != directory or not program.is_file():
        raise ArtifactError(f"{directory} has no program {manifest.program_file}: it is not whole")
    found_sha256 = sha256_of_file(program)
    if found_sha256 != manifest.program_sha256:
        raise ArtifactError(
            f"{program} is damaged: its SHA-256 is {found_sha256[:12]}, "
            f"{MANIFEST_FILE} says {manifest.program_sha256[:12]}; export the checkpoint again"
        )
    return manifest
