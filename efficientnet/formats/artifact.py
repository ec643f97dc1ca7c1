"""An exported network on disk: one program file and manifest.json, which says all about it.

artifacts/<variant>/<runtime>-<precision>/
"""

import hashlib
import mmap
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from efficientnet.errors import PipelineError, first_problem, require_names, require_version
from efficientnet.images.preprocess_spec import PreprocessSpec, require_sha256
from efficientnet.machine.atomic import (
    dangling_link_hint,
    replaced_directory,
    sha256_of_file,
    write_text,
)
from efficientnet.machine.environment import EnvironmentRecord
from efficientnet.network.variants import VariantSpec
from efficientnet.precision import Precision

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"

# Of a file that is hashed while it is read.
READ_BYTES = 1 << 21


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


class StaticProgram(_Frozen):
    """One of several files of a program, each for calls of one batch size."""

    batch_size: int = Field(ge=1)
    file: str


class Binding(_Frozen):
    """What a program was built for and runs on alone; it is refused elsewhere."""

    library: str
    """Python package, e.g. tensorrt."""
    version: str
    compute_capability: str | None
    """Of the GPU, e.g. 9.0; None where the program takes any that the library does."""
    device: str
    """Name of the GPU, or of the instruction set of a CPU."""
    rebuild: str
    """Command that makes it again on another machine."""


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
    max_mean_logit_error: float | None = None
    """Of int8 and fp8, whose largest error says little."""
    min_top1_agreement: float = Field(ge=0, le=1)
    flip_margin: float = 0.0
    """Another top-1 class counts where the reference's two best logits differ by more than this."""


class ParityRecord(_Frozen):
    """Agreement with the eager float32 model on real held-out images."""

    num_images: int
    max_abs_logit_error: float
    mean_abs_logit_error: float
    top1_agreement: float = Field(ge=0, le=1)
    """Share of images with the same top-1 class, or one that is as good within flip_margin."""
    num_flips: int = 0
    """Images with another top-1 class, whatever the margin."""
    tolerances: ParityTolerances


class BlockCost(_Frozen):
    """What quantising one block alone does to the logits."""

    block: str
    """Name of the module in model.py."""
    logit_error: float
    """Root of the mean squared change, relative to the standard deviation of the logits."""


class QuantizationRecord(_Frozen):
    """How ranges were chosen, and which blocks stay in a higher precision."""

    method: str
    num_calibration_images: int
    calibration_sha256: str
    """Of calibration.json, which holds the images' hashes."""
    kept_precision: Precision
    """Of what is not quantised."""
    kept_blocks: tuple[str, ...]
    """For accuracy."""
    float_layers: tuple[str, ...] = ()
    """For speed: layers and blocks that this machine computes faster so."""
    ranking: tuple[BlockCost, ...] = ()
    """All blocks, the costliest first; empty where nothing had to be kept."""
    max_drop: float = 0.005
    """What the accuracy gate lets pass, a fraction of the images."""
    num_gate_images: int | None = 2000
    """Held-out images that it takes at most; None = all."""


class AccuracyGate(_Frozen):
    """Top-1 lost against the eager float32 model, on the same held-out images."""

    num_images: int
    reference_top1: float = Field(ge=0, le=1)
    top1: float = Field(ge=0, le=1)
    drop: float
    """Fraction of the images; negative where the artifact is better."""
    drop_low: float
    drop_high: float
    """95 % confidence interval of the drop, paired (Agresti and Min 2005)."""
    max_drop: float
    dataset_sha256: str
    is_labelled: bool = True
    """Whether an answer is right by the image's label; if not, by the eager model's own answer, and
    only images are counted that it is sure of."""


class ArtifactManifest(_Frozen):
    """manifest.json."""

    format_version: int = FORMAT_VERSION
    variant: str
    architecture: VariantSpec | None = None
    """The table of stages of a variant that is not built in; None = it is."""
    runtime: str
    precision: Precision
    provider: str | None = None
    """ONNX Runtime's execution provider; None for other runtimes, and for its CPU provider."""
    program_file: str
    program_sha256: str
    other_files: dict[str, str] = {}
    """The program's other files -> their SHA-256."""
    static_programs: tuple[StaticProgram, ...] = ()
    """Where there is a file for each batch size, program_file among them; else empty."""
    static_batches: tuple[int, ...] = ()
    """Sizes that a program of one file is prepared for with fixed shapes when it is opened."""
    streamed_batches: tuple[int, ...] = ()
    """Sizes that are answered image by image, by as many streams of one thread as there are
    threads: that was faster than one call where it was exported."""
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
    binding: Binding | None = None
    """None where the program runs on any machine that has the runtime."""
    quantization: QuantizationRecord | None = None
    gate: AccuracyGate | None = None
    """Of quantised programs."""
    parity: ParityRecord | None
    """None: built on a machine that cannot run it, not checked yet, and refused until it is."""
    size_bytes: int
    flops_per_image: int
    """Floating-point operations of convolutions and classifier: two for each multiply-add."""
    weight_bytes: int

    @property
    def is_for_time_only(self) -> bool:
        """Whether it was allowed to lose all of the network's answers: it was made to be timed."""
        return self.quantization is not None and self.quantization.max_drop >= 1

    @property
    def prepared_sizes(self) -> tuple[int, ...]:
        """Batch sizes that are computed in ways of their own, ascending."""
        files = (program.batch_size for program in self.static_programs)
        return tuple(sorted({*files, *self.static_batches, *self.streamed_batches}))

    @model_validator(mode="after")
    def _check_preprocess(self) -> Self:
        require_sha256(self.preprocess, self.preprocess_sha256)
        return self

    @model_validator(mode="after")
    def _check_class_names(self) -> Self:
        require_names(self.class_names, *self.output.shape)
        return self


@contextmanager
def new_artifact_directory(directory: Path) -> Generator[Path]:
    """Give a directory to build in, which becomes `directory` when the block ends well."""
    require_replaceable(directory)
    with replaced_directory(directory) as fresh:
        yield fresh
        if not (fresh / MANIFEST_FILE).is_file():
            raise ArtifactError(
                f"nothing was built for {directory}: no {MANIFEST_FILE} was written"
            )


def require_replaceable(directory: Path) -> None:
    """Check that an artifact may take this place: nothing is there, or an older one."""
    manifest = directory / MANIFEST_FILE
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise ArtifactError(
            f"{directory} is a link or a file, and an artifact is a directory: give another "
            "--output, or remove it"
        )
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    # Other programs have a manifest.json, too.
    if not manifest.is_file() or b'"program_sha256"' not in manifest.read_bytes():
        raise ArtifactError(
            f"{directory} is not empty and not an artifact of ours (no {MANIFEST_FILE} of one in "
            "it), and would be replaced with all that is in it: give another --output, or empty it"
        )


def write_manifest(directory: Path, manifest: ArtifactManifest) -> None:
    """Write manifest.json, the last file of an artifact."""
    manifest = manifest.model_copy(update={"preprocess_sha256": manifest.preprocess.sha256})
    write_text(directory / MANIFEST_FILE, manifest.model_dump_json(indent=2) + "\n")


@dataclass(frozen=True)
class ProgramFile:
    """A file of a program as it was read, whatever stands at its path since."""

    path: Path
    """For messages."""
    data: bytes

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file that has no manifest yet; others are read by read_program."""
        return cls(path, path.read_bytes())

    @contextmanager
    def opened(self) -> Generator[str]:
        """Give a path to the bytes in memory, for a library that reads from paths alone."""
        with os.fdopen(os.memfd_create(self.path.name), "wb") as file:
            file.write(self.data)
            file.flush()
            yield f"/proc/self/fd/{file.fileno()}"


def read_artifact(directory: Path, allow_unchecked: bool = False) -> ArtifactManifest:
    """Read manifest.json and check that the program is the one it speaks of.

    A program that was never compared with its model is accepted with `allow_unchecked` only.

    Raises:
        ArtifactError: no artifact there, another format, damaged, or not checked.
    """
    manifest = read_manifest(directory, allow_unchecked)
    for name, sha256 in _hashes(manifest).items():
        _require_hash(_file_of(directory, name), sha256_of_file(directory / name), sha256)
    return manifest


def read_program(directory: Path, manifest: ArtifactManifest, name: str) -> ProgramFile:
    """Read a file of the program, once: what was checked is what a runtime gets."""
    file = ProgramFile.read(_file_of(directory, name))
    _require_hash(file.path, hashlib.sha256(file.data).hexdigest(), _hashes(manifest)[name])
    return file


def read_pages(directory: Path, manifest: ArtifactManifest, name: str) -> mmap.mmap:
    """Do as read_program, into private pages, which a runtime can give back as it goes.

    They are of 2 MB where the system has them, a tenth of the time; hashed while they are read.
    """
    path = _file_of(directory, name)
    digest = hashlib.sha256()
    # A thread pool would do, too: it takes 1 MB of memory more, in all that open an artifact.
    read: SimpleQueue[memoryview | None] = SimpleQueue()

    def hash_what_is_read() -> None:
        for part in iter(read.get, None):
            digest.update(part)

    hashing = Thread(target=hash_what_is_read)
    hashing.start()
    try:
        with path.open("rb", buffering=0) as file:
            size = max(1, os.fstat(file.fileno()).st_size)
            pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):
                pages.madvise(mmap.MADV_HUGEPAGE)
            at, view = 0, memoryview(pages)
            while count := file.readinto(view[at : at + READ_BYTES]):
                read.put(view[at : at + count])
                at += count
    finally:
        read.put(None)
        hashing.join()
    _require_hash(path, digest.hexdigest(), _hashes(manifest)[name])
    return pages


def _hashes(manifest: ArtifactManifest) -> dict[str, str]:
    return {manifest.program_file: manifest.program_sha256, **manifest.other_files}


def _file_of(directory: Path, name: str) -> Path:
    path = directory / name
    if path.parent != directory or not path.is_file():
        raise ArtifactError(f"{directory} has no program {name}: it is not whole")
    return path


def _require_hash(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise ArtifactError(
            f"{path} is damaged: its SHA-256 is {found[:12]}, {MANIFEST_FILE} says "
            f"{expected[:12]}; export the checkpoint again, or open it again if that was done "
            "meanwhile"
        )


def read_manifest(directory: Path, allow_unchecked: bool = False) -> ArtifactManifest:
    """Read manifest.json alone; see read_artifact."""
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise ArtifactError(
            f"{directory} is not an artifact: there is no {MANIFEST_FILE} in it; "
            f"make one with 'python export/ort.py'{dangling_link_hint(directory)}"
        )
    text = path.read_text(encoding="utf-8", errors="replace")
    require_version(text, FORMAT_VERSION, path, "export the checkpoint again", ArtifactError)
    try:
        manifest = ArtifactManifest.model_validate_json(text)
    except ValidationError as error:
        raise ArtifactError(f"{path} is damaged or not ours: {first_problem(error)}") from None
    if manifest.parity is None and not allow_unchecked:
        raise ArtifactError(
            f"{directory} was built where it could not run, and was never compared with its model: "
            f"run 'python export/parity.py {directory}' on the machine it is for"
        )
    return manifest
