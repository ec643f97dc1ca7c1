"""A torch-tensorrt artifact -> its engines inside torch, on the GPU, replayed as CUDA graphs.

torch-tensorrt comes without type information that a checker here could read, since it cannot be
imported without a GPU: `Any` stands for its module and for nothing else.
"""

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import torch

from efficientnet.formats.artifact import (
    ArtifactError,
    ArtifactManifest,
    BatchRange,
    ProgramFile,
    read_program,
)
from efficientnet.machine.gpu import current_gpu
from efficientnet.runtimes import binding as bindings
from efficientnet.runtimes.cuda_graphs import CudaGraphRuntime, Program

PACKAGE = "torch_tensorrt"

# torch-tensorrt puts TensorRT or TensorRT-RTX there, whichever it is built for.
TENSORRT = "tensorrt"


def open_program(directory: Path, manifest: ArtifactManifest, num_threads: int) -> CudaGraphRuntime:
    """Open a torch-tensorrt artifact on the machine that it was built for."""
    binding = bindings.require_binding(directory, manifest.binding, "export/torch_trt.py")
    # The library asks the driver when it is imported, so the GPU comes first.
    bindings.require_gpu(directory, binding, current_gpu())
    torch_tensorrt = bindings.import_bound(directory, PACKAGE, binding, import_torch_tensorrt)
    bindings.require_version(directory, binding, version_of(torch_tensorrt))
    files = {p.batch_size: p.file for p in manifest.static_programs}
    static = {
        size: load(torch_tensorrt, read_program(directory, manifest, file))
        for size, file in files.items()
    }
    torch.set_num_threads(num_threads)
    if static:
        return CudaGraphRuntime(static, None, manifest)
    # An engine inside torch has one execution context, whose state each call of another size
    # changes under the graphs that were captured before (NVIDIA/TensorRT issue 3798).
    open_any = partial(
        load, torch_tensorrt, read_program(directory, manifest, manifest.program_file)
    )
    return CudaGraphRuntime({}, open_any, manifest, captured_sizes(manifest.input.batch))


def captured_sizes(batch: BatchRange) -> tuple[int, ...]:
    """Return the sizes that a program for a range is opened for: its ends, powers of two between.

    Each is a copy of the weights.
    """
    powers = (2**exponent for exponent in range(batch.max.bit_length()))
    between = (power for power in powers if batch.min < power < batch.max)
    return tuple(sorted({batch.min, *between, batch.max}))


def import_torch_tensorrt() -> Any:
    """Import the library; there must be a GPU."""
    return importlib.import_module(PACKAGE)


def version_of(torch_tensorrt: Any) -> str:
    """Write all versions that a saved program depends on."""
    tensorrt: Any = importlib.import_module(TENSORRT)
    return (
        f"{torch_tensorrt.__version__} with torch {torch.__version__} and TensorRT "
        f"{tensorrt.__version__}"
    )


def load(torch_tensorrt: Any, file: ProgramFile) -> Program:
    """Load a saved program."""
    try:
        with file.opened() as path:
            return torch_tensorrt.load(path).module()
    # It tries two formats and says ValueError when neither fits.
    except (RuntimeError, ValueError) as error:
        raise ArtifactError(
            f"torch-tensorrt {torch_tensorrt.__version__} cannot load {file.path}: {error}; make "
            "it again with 'python export/torch_trt.py'"
        ) from error
