"""A native artifact -> the project's own CPU engine, on the best kernels that the processor has."""

from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efficientnet.formats.artifact import (
    ArtifactError,
    ArtifactManifest,
    read_pages,
)
from efficientnet.runtimes.native.engine import PORTABLE, Engine, levels
from efficientnet.runtimes.protocol import ProgramInfo, check_images, info_of_artifact

# Layers and tensors of the program -> nodes of the ONNX graph of the same network.
NAMES_FILE = "names.json"


class NativeRuntime:
    """Runs model.native. Calls from several threads take turns."""

    takes_pixels = True
    """See runtimes.protocol.takes_pixels."""

    def __init__(self, program: mmap, info: ProgramInfo, num_threads: int) -> None:
        assert info.max_batch_size is not None
        self.info = info
        self._engine = Engine(program, num_threads, info.max_batch_size)

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """See Runtime.infer."""
        return self._infer(images, is_alone=True)

    def infer_beside(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """See runtimes.protocol.infer_beside."""
        return self._infer(images, is_alone=False)

    def _infer(self, images: NDArray[Any], is_alone: bool) -> NDArray[np.float32]:
        if images.dtype != np.uint8:  # of which none is NaN
            check_images(images, self.info)
        return self._engine.infer(images, is_alone)


def require_kernels(what: object, is_reference: bool) -> None:
    """Check that the engine is here, and fast on this processor where it must be."""
    if levels()[0] == PORTABLE and not is_reference:
        raise ArtifactError(
            f"{what} is for processors with VNNI or AMX, and this one has neither; other runtimes "
            "are faster here: python export/ov.py, python export/ort.py. The native engine's "
            "portable kernels give the same answers many times slower, for artifacts of "
            "'python export/native.py --reference'"
        )


def open_timed(program: Path, num_threads: int) -> Engine:
    """Open a program file that tells the times of its layers."""
    return Engine(program, num_threads, keeps_times=True)


def open_program(directory: Path, manifest: ArtifactManifest, num_threads: int) -> NativeRuntime:
    """Open a native artifact."""
    require_kernels(directory, is_reference=manifest.binding is None)
    program = read_pages(directory, manifest, manifest.program_file)
    return NativeRuntime(program, info_of_artifact(manifest), num_threads)
