"""An AOTInductor artifact -> code compiled for this processor, or for this GPU as CUDA graphs."""

import os
import tempfile
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from efficientnet.formats.artifact import (
    ArtifactError,
    ArtifactManifest,
    Binding,
    ProgramFile,
    read_program,
)
from efficientnet.machine.denormals import flushed_denormals
from efficientnet.machine.gpu import current_gpu
from efficientnet.precision import Precision
from efficientnet.runtimes.binding import require_binding, require_gpu, require_version
from efficientnet.runtimes.cuda_graphs import CudaGraphRuntime, Program
from efficientnet.runtimes.protocol import check_images, info_of_artifact, smallest_that_takes

# The name that torch gives to the only model of a package.
MODEL_NAME = "model"

# A processor with none of these computes in float32 and rounds: several times slower than fp32.
CPU_EXTENSIONS: dict[Precision, tuple[str, ...]] = {
    "bf16": ("avx512_bf16", "amx_bf16"),
    "fp16": ("avx512_fp16", "amx_fp16"),
}


# Of the environment variable that is changed meanwhile.
_unpacking = Lock()


class AotiRuntime:
    """Runs compiled programs on the CPU; not for several threads at once.

    `static` programs are for one batch size each, and a batch is filled up to the next of them;
    without any, `any_size` takes all.
    """

    def __init__(
        self, static: Mapping[int, Program], any_size: Program | None, manifest: ArtifactManifest
    ) -> None:
        self.info = info_of_artifact(manifest)
        self._static = static
        self._any_size = any_size

    @flushed_denormals()
    @torch.inference_mode()
    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """See Runtime.infer."""
        check_images(images, self.info)
        num_images = len(images)
        size = smallest_that_takes(num_images, self._static) or num_images
        program = self._static.get(size, self._any_size)
        assert program is not None
        if size > num_images:
            images = np.concatenate(
                [images, np.zeros((size - num_images, *images.shape[1:]), np.float32)]
            )
        # Compiled code takes the strides that it was compiled for as given.
        logits = program(torch.from_numpy(np.require(images, requirements=["C", "W"]))).numpy()
        return logits if size == num_images else logits[:num_images].copy()


def open_program(
    directory: Path, manifest: ArtifactManifest, num_threads: int
) -> AotiRuntime | CudaGraphRuntime:
    """Open an AOTInductor artifact; sets the number of threads of the whole process."""
    binding = require_binding(directory, manifest.binding, "export/aoti.py")
    require_version(directory, binding, torch.__version__)
    if binding.compute_capability is None:
        require_same_processor(directory, binding, manifest.precision)
    else:
        require_gpu(directory, binding, current_gpu())
    torch.set_num_threads(num_threads)
    is_captured = binding.compute_capability is not None
    files = {p.batch_size: p.file for p in manifest.static_programs}
    static = {
        size: load_package(read_program(directory, manifest, file), is_captured)
        for size, file in files.items()
    }
    if static:
        return (CudaGraphRuntime if is_captured else AotiRuntime)(static, None, manifest)
    any_size = load_package(read_program(directory, manifest, manifest.program_file), is_captured)
    if is_captured:
        # Its calls keep nothing: one program may be in several graphs.
        return CudaGraphRuntime(static, lambda: any_size, manifest)
    return AotiRuntime(static, any_size, manifest)


def load_package(file: ProgramFile, is_captured: bool) -> Program:
    """Load a compiled package; locks and events would get into CUDA graphs of its calls."""
    # `torch._inductor.aoti_load_package` is this and a comparison of processors, for which it runs
    # the C++ compiler (8 s and more) and fills inductor's cache: a service has neither. The
    # comparison is require_same_processor here.
    loader_class: Any = torch._C._aoti.AOTIModelPackageLoader  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with file.opened() as path, unpacking_folder(is_kept=is_captured):
            loader: Any = loader_class(path, MODEL_NAME, is_captured, 1, -1)
    except (RuntimeError, OSError) as error:
        raise ArtifactError(
            f"torch {torch.__version__} cannot load {file.path}: "
            f"{str(error).partition(chr(10))[0]}; it is unpacked for that: let TMPDIR name a "
            f"folder that has {len(file.data) / 1e6:.0f} MB free and may hold programs (is not "
            "mounted noexec), or export the checkpoint again here"
        ) from error

    def program(images: Tensor) -> Tensor:
        (logits,) = loader.boxed_run([images])
        return logits

    return program


@contextmanager
def unpacking_folder(is_kept: bool) -> Generator[None]:
    """Let torch unpack a package into a folder that is gone once the package is loaded.

    Left to itself, torch removes what it unpacked when the program is dropped, which a killed
    process never does. A library that is loaded needs its file no more; but programs for a GPU read
    kernels when they are first called, so theirs `is_kept`.
    """
    with _unpacking, ExitStack() as stack:
        folder = (
            tempfile.gettempdir()
            if is_kept
            else stack.enter_context(tempfile.TemporaryDirectory(prefix="aoti-"))
        )
        before = os.environ.get("TMPDIR")
        # The only way to tell torch's C++ code.
        os.environ["TMPDIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = before


def missing_extensions(precision: Precision) -> str | None:
    """Say what this processor has not that a precision needs; None when it computes in it."""
    wanted = CPU_EXTENSIONS.get(precision, ())
    found = torch.cpu.get_capabilities()
    if not wanted or any(found.get(name) for name in wanted):
        return None
    return " or ".join(wanted)


def require_same_processor(directory: Path, binding: Binding, precision: Precision) -> None:
    """Check that a program was compiled for this processor's instructions."""
    found = torch.backends.cpu.get_cpu_capability()
    if binding.device != found:
        raise ArtifactError(
            f"{directory} was compiled for processors with {binding.device}, this one has {found}: "
            f"run '{binding.rebuild}' here"
        )
    missing = missing_extensions(precision)
    if missing is not None:
        raise ArtifactError(
            f"{directory} computes in {precision}, for which this processor has no instructions "
            f"({missing}): export in fp32 here"
        )
