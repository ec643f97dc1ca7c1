"""An ONNX artifact -> ONNX Runtime's CUDA or TensorRT provider, replayed as CUDA graphs."""

import importlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from efficientnet.formats.artifact import ArtifactError, ArtifactManifest, read_program
from efficientnet.runtimes.onnxruntime_sessions import PROVIDERS, open_session
from efficientnet.runtimes.protocol import ProgramInfo, check_images, smallest_that_takes

# Channels last, as tensor cores want it; float32 as it is written, not TF32, so that parity holds;
# the CUDA graph needs buffers that stay where they are, see _GpuSession.
CUDA_OPTIONS = {
    "prefer_nhwc": "1",
    "use_tf32": "0",
    "cudnn_conv_algo_search": "EXHAUSTIVE",
    "enable_cuda_graph": "1",
}
TENSORRT_OPTIONS = {"trt_timing_cache_enable": "1", "trt_cuda_graph_enable": "1"}

# The provider of onnxruntime-gpu 1.31 is linked to libnvinfer.so.10.
TENSORRT_MAJOR = "10"

log = logging.getLogger(__name__)


class OnnxGpuRuntime:
    """Runs model.onnx on a GPU: buffers on the device that stay, and a CUDA graph per batch size.

    A batch goes through the smallest of the prepared sizes that takes it, the rest is padding.
    Needs a session for each size, since a session captures one graph. May be called by several
    threads: ONNX Runtime keeps a graph for the thread that captured it, so one thread makes all
    calls.
    """

    def __init__(
        self, directory: Path, manifest: ArtifactManifest, info: ProgramInfo, num_threads: int
    ) -> None:
        self.info = info
        self._thread = ThreadPoolExecutor(1)
        self._by_size = self._thread.submit(
            _open_sessions, directory, manifest, info, num_threads
        ).result()

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """See Runtime.infer."""
        check_images(images, self.info)
        size = smallest_that_takes(len(images), self._by_size)
        assert size is not None
        return self._thread.submit(self._by_size[size].infer, images).result()


class _GpuSession:
    def __init__(self, session: ort.InferenceSession, info: ProgramInfo, batch_size: int) -> None:
        self._session = session
        size = info.preprocess.image_size
        self._host = np.zeros((batch_size, 3, size, size), np.float32)
        self._input = ort.OrtValue.ortvalue_from_numpy(self._host, "cuda", 0)
        output = np.zeros((batch_size, len(info.class_names)), np.float32)
        self._output = ort.OrtValue.ortvalue_from_numpy(output, "cuda", 0)
        self._binding: Any = self._session.io_binding()
        self._binding.bind_ortvalue_input(self._session.get_inputs()[0].name, self._input)
        self._binding.bind_ortvalue_output(self._session.get_outputs()[0].name, self._output)

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        self._host[: len(images)] = images
        self._input.update_inplace(self._host)
        self._session.run_with_iobinding(self._binding)
        return np.array(self._output.numpy()[: len(images)], dtype=np.float32)


def _open_sessions(
    directory: Path, manifest: ArtifactManifest, info: ProgramInfo, num_threads: int
) -> dict[int, _GpuSession]:
    provider = manifest.provider
    assert provider is not None
    program = read_program(directory, manifest, manifest.program_file)
    if provider == PROVIDERS["tensorrt"]:
        require_tensorrt(directory)
    by_size: dict[int, _GpuSession] = {}
    for size in sorted({*manifest.static_batches, manifest.input.batch.max}):
        options = (
            CUDA_OPTIONS if provider == PROVIDERS["cuda"] else tensorrt_options(directory, size)
        )
        session = open_session(program, provider, num_threads, options, batch_size=size)
        by_size[size] = _GpuSession(session, info, size)
    return by_size


def tensorrt_options(directory: Path, batch_size: int) -> dict[str, str]:
    """Return the provider's options; engines are kept beside the program, of each size its own.

    In one folder the session of a second size would take the first one's engine, widen its range
    and build it again in its place.
    """
    folder = directory / ".engines" / f"batch-{batch_size}"
    if not os.access(directory, os.W_OK):
        log.warning("%s cannot be written to: engines are built at each start", directory)
        return TENSORRT_OPTIONS
    # ONNX Runtime makes one level of folders only.
    folder.mkdir(parents=True, exist_ok=True)
    return TENSORRT_OPTIONS | {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder)}


def require_tensorrt(directory: Path) -> None:
    """Load the TensorRT that the provider is linked to: where pip puts it, no loader looks."""
    try:
        found: str = importlib.import_module("tensorrt").__version__
    # Its Python part without its libraries fails with an OSError.
    except (ImportError, OSError) as error:
        found = f"none ({error})"
    if found.partition(".")[0] != TENSORRT_MAJOR:
        raise ArtifactError(
            f"{directory} needs TensorRT {TENSORRT_MAJOR} for ONNX Runtime's TensorRT provider, "
            f"and there is {found}: 'pip install \"tensorrt-cu13>=10.13,<11\"', in an environment "
            "of its own where export/trt.py uses 11; --provider cuda needs none"
        )
