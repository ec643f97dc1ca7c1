"""An ONNX artifact -> ONNX Runtime, on the provider that the manifest names and on no other."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# ONNX Runtime 1.31 for Linux reports to its makers; the variable is read when it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort

from efficientnet.artifact import ArtifactError, ArtifactManifest
from efficientnet.runtimes.protocol import (
    ProgramInfo,
    check_images,
    info_of_artifact,
    require_processor,
    smallest_that_takes,
)

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}

# Channels last, as tensor cores want it; float32 as it is written, not TF32, so that parity holds;
# the CUDA graph needs buffers that stay where they are, see GpuSession.
CUDA_OPTIONS = {
    "prefer_nhwc": "1",
    "use_tf32": "0",
    "cudnn_conv_algo_search": "EXHAUSTIVE",
    "enable_cuda_graph": "1",
}
TENSORRT_OPTIONS = {
    "trt_engine_cache_enable": "1",
    "trt_timing_cache_enable": "1",
    "trt_cuda_graph_enable": "1",
}


class OnnxRuntime:
    """Runs model.onnx on the CPU. A session may be used by several threads at once.

    Streamed batch sizes have a second session, whose calls compute in the thread that makes them.
    """

    def __init__(
        self,
        program: Path,
        info: ProgramInfo,
        streamed_batches: tuple[int, ...],
        num_threads: int,
    ) -> None:
        self._session = _open_session(program, PROVIDERS["cpu"], {}, num_threads)
        self._input_name = self._session.get_inputs()[0].name
        self._streamed_batches = streamed_batches
        self.info = info
        if streamed_batches:
            self._stream = _open_session(program, PROVIDERS["cpu"], {}, 1)
            self._threads = ThreadPoolExecutor(num_threads)

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """See Runtime.infer."""
        check_images(images, self.info)
        if len(images) not in self._streamed_batches:
            return self._run(self._session, images)
        single = (images[index : index + 1] for index in range(len(images)))
        return np.concatenate(list(self._threads.map(partial(self._run, self._stream), single)))

    def _run(
        self, session: ort.InferenceSession, images: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        (logits,) = session.run(None, {self._input_name: images})
        return np.asarray(logits, dtype=np.float32)


class OnnxGpuRuntime:
    """Runs model.onnx on a GPU: buffers on the device that stay, and a CUDA graph per batch size.

    A batch goes through the smallest of the prepared sizes that takes it, the rest is padding.
    Needs a session for each size, since a session captures one graph. Not for several threads.
    """

    def __init__(
        self, directory: Path, manifest: ArtifactManifest, info: ProgramInfo, num_threads: int
    ) -> None:
        provider = manifest.provider
        assert provider is not None
        options = CUDA_OPTIONS
        if provider == PROVIDERS["tensorrt"]:
            options = TENSORRT_OPTIONS | {"trt_engine_cache_path": str(directory / ".engines")}
        program = directory / manifest.program_file
        self._by_size = {
            size: _GpuSession(program, provider, options, info, size, num_threads)
            for size in sorted({*manifest.static_batches, manifest.input.batch.max})
        }
        self.info = info

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """See Runtime.infer."""
        check_images(images, self.info)
        size = smallest_that_takes(len(images), self._by_size)
        assert size is not None
        return self._by_size[size].infer(images)


class _GpuSession:
    def __init__(
        self,
        program: Path,
        provider: str,
        options: dict[str, str],
        info: ProgramInfo,
        batch_size: int,
        num_threads: int,
    ) -> None:
        self._session = _open_session(program, provider, options, num_threads)
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


def require_provider(provider: str) -> None:
    """Check that a provider can be used.

    Raises:
        ArtifactError: it is not in the installed package.
    """
    found = ort.get_available_providers()
    if provider not in found:
        raise ArtifactError(
            f"this ONNX Runtime has no {provider} (it has {', '.join(found)}); on a machine with "
            "an NVIDIA GPU: 'pip uninstall onnxruntime && pip install onnxruntime-gpu'"
        )


def _open_session(
    program: Path, provider: str, options: dict[str, str], num_threads: int
) -> ort.InferenceSession:
    require_provider(provider)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = num_threads
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    if provider != PROVIDERS["cpu"]:
        # What the provider has no kernel for would go to the CPU without a word otherwise.
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
    try:
        session = ort.InferenceSession(program, settings, providers=[(provider, options)])
    # ONNX Runtime's own exception classes share no public base but Exception.
    except Exception as error:
        raise ArtifactError(f"ONNX Runtime cannot open {program}: {error}") from error
    # A provider that fails to start is replaced by the CPU's, and only a log line tells.
    first = session.get_providers()[0]
    if first != provider:
        raise ArtifactError(
            f"{program} is for ONNX Runtime's {provider}, which did not start here: {first} would "
            "run in its place; check the driver, CUDA and cuDNN, or export for the cpu provider"
        )
    return session


def open_program(
    directory: Path, manifest: ArtifactManifest, num_threads: int
) -> OnnxRuntime | OnnxGpuRuntime:
    """Open an ONNX Runtime artifact.

    Raises:
        ArtifactError: ONNX Runtime refuses it, its provider is not here, or the processor would
            compute something else.
    """
    info = info_of_artifact(manifest)
    require_processor(directory, manifest)
    if manifest.provider is not None:
        return OnnxGpuRuntime(directory, manifest, info, num_threads)
    program = directory / manifest.program_file
    return OnnxRuntime(program, info, manifest.streamed_batches, num_threads)
