"""The contract of all runtimes, and open_runtime: a directory -> a Runtime."""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from efficientnet.formats.artifact import (
    MANIFEST_FILE,
    ArtifactError,
    ArtifactManifest,
    read_manifest,
)
from efficientnet.images.preprocess_spec import PreprocessSpec
from efficientnet.machine.atomic import dangling_link_hint
from efficientnet.machine.environment import num_usable_cores
from efficientnet.machine.processor import has_vnni
from efficientnet.runtimes.names import RUNTIMES

# Device of a Binding: weights of 8 bits, which need sums of 32.
VNNI = "VNNI"


@dataclass(frozen=True)
class ProgramInfo:
    """What a runtime executes."""

    program_sha256: str
    variant: str
    runtime: str
    precision: str
    preprocess: PreprocessSpec
    class_names: tuple[str, ...]
    data: str
    """What the network was trained on: `digits` or a folder."""
    max_batch_size: int | None
    """Most images in a call; None = as many as memory holds."""
    flops_per_image: int
    weight_bytes: int


def info_of_artifact(manifest: ArtifactManifest) -> ProgramInfo:
    """Take from a manifest what a runtime tells of its program."""
    return ProgramInfo(
        program_sha256=manifest.program_sha256,
        variant=manifest.variant,
        runtime=manifest.runtime,
        precision=manifest.precision,
        preprocess=manifest.preprocess,
        class_names=manifest.class_names,
        data=manifest.data,
        max_batch_size=manifest.input.batch.max,
        flops_per_image=manifest.flops_per_image,
        weight_bytes=manifest.weight_bytes,
    )


class Runtime(Protocol):
    """Executes one program; not for several threads at once unless a runtime says so."""

    info: ProgramInfo

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map preprocessed float32 images [N, 3, H, W] to float32 logits [N, num_classes].

        Any strides will do. Synchronous: the logits are in host memory on return and belong to the
        caller.

        Raises:
            ValueError: wrong shape or dtype, more images than max_batch_size, or a pixel that is
                NaN or infinite.
        """
        ...


def infer_beside(runtime: Runtime) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Return what answers as `infer` does while other work wants the processor's cores.

    Threads that share an image wait for each other at every layer, and wait long where one of them
    has to wait for a core. The native engine gives each image a thread; of other runtimes it is
    `infer` itself.
    """
    return getattr(runtime, "infer_beside", runtime.infer)


def takes_pixels(runtime: Runtime) -> bool:
    """Whether `infer` also takes what is not normalized yet, uint8 [N, H, W, 3].

    The native engine does, whose first layer has the normalization in its weights, so that no float
    image is made; in int8 the answers are the same in every bit.
    """
    return getattr(runtime, "takes_pixels", False)


def check_images(images: NDArray[np.float32], info: ProgramInfo) -> None:
    """Raise the ValueError that Runtime.infer speaks of."""
    size = info.preprocess.image_size
    if images.dtype != np.float32 or images.ndim != 4 or images.shape[1:] != (3, size, size):
        raise ValueError(
            f"images are {images.dtype} {list(images.shape)}, "
            f"expected float32 [N, 3, {size}, {size}] as efficientnet.images.preprocess makes them"
        )
    if info.max_batch_size is not None and not 1 <= len(images) <= info.max_batch_size:
        raise ValueError(
            f"a batch of {len(images)} images, the program takes 1 to {info.max_batch_size}; "
            "split the batch or export with a larger maximum: --batch 1 1 N"
        )
    # Quantised programs round NaN to a number and answer with ordinary logits. One pass that makes
    # no mask takes 0.6 of the time: NaN and infinities outlive additions. Numbers may overflow
    # in them, which the mask tells. (Not np.dot: it starts threads.)
    if not np.isfinite(np.einsum("nchw->", images)) and not np.isfinite(images).all():
        bad = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3))).tolist()
        raise ValueError(
            f"images {bad} of {len(images)} have pixels that are NaN or infinite: no answer would "
            "mean anything; look at what made them"
        )


def open_runtime(
    path: str | Path, num_threads: int | None = None, may_spin: bool = True
) -> Runtime:
    """Open an artifact (manifest.json) or a checkpoint (checkpoint.json: the eager float32 model).

    The files are read here and never again: what was opened answers, and `info` tells of it, even
    when another program takes the directory's place.

    Do not fork after a call: the child has none of the threads that the eager model's and
    AOTInductor's calls wait for, and its first call hangs. Start processes with multiprocessing's
    `spawn`, and open the program in each.

    Args:
        path: the directory.
        num_threads: CPU threads of a call; None = one per usable core.
        may_spin: whether ONNX Runtime's threads wait for work in a loop. That makes a call shorter
            where nothing else computes, and takes cores from what does elsewhere; the other
            runtimes sleep anyway.

    Raises:
        ArtifactError: neither, damaged, never checked, built for another machine, or its runtime is
            not installed.
        CheckpointError: a damaged checkpoint.
    """
    directory = Path(path)
    if (directory / MANIFEST_FILE).is_file():
        return open_program(directory, read_manifest(directory), num_threads, may_spin)
    if (directory / "checkpoint.json").is_file():
        threads = num_threads or num_usable_cores()
        return _import_runtime("torch", directory).open_directory(directory, threads)
    raise ArtifactError(
        f"{directory} holds neither a {MANIFEST_FILE} (artifact) nor a checkpoint.json (checkpoint)"
        f"{dangling_link_hint(directory)}"
    )


def open_program(
    directory: Path,
    manifest: ArtifactManifest,
    num_threads: int | None = None,
    may_spin: bool = True,
) -> Runtime:
    """Open the program that a manifest describes, checked or not; see open_runtime."""
    name = manifest.runtime
    if name not in RUNTIMES:
        raise ArtifactError(
            f"{directory} is for the runtime '{name}', this program knows: {', '.join(RUNTIMES)}"
        )
    threads = num_threads or num_usable_cores()
    module = _import_runtime(name, directory)
    if name == "onnxruntime":
        return module.open_program(directory, manifest, threads, may_spin)
    return module.open_program(directory, manifest, threads)


def require_processor(directory: Path, manifest: ArtifactManifest) -> None:
    """Check that a program for the CPU computes on this one what it did when it was checked."""
    if manifest.binding is not None and manifest.binding.device == VNNI and not has_vnni():
        raise ArtifactError(
            f"{directory} has int8 weights of 8 bits for a processor with VNNI, and this one has "
            "none: sums would overflow and the answers be wrong; run here: "
            f"'{manifest.binding.rebuild}'"
        )


def smallest_that_takes(batch_size: int, sizes: Iterable[int]) -> int | None:
    """Return the smallest of the sizes that holds a batch; None when all are smaller."""
    return min((size for size in sizes if size >= batch_size), default=None)


def _import_runtime(name: str, directory: Path) -> Any:
    try:
        return importlib.import_module(RUNTIMES[name].module)
    # A library without its driver fails with an OSError.
    except (ImportError, OSError) as error:
        raise ArtifactError(
            f"{directory} needs the runtime '{name}', which cannot be imported here ({error}); "
            "run 'make setup', or install the extra of pyproject.toml that holds it"
        ) from error
