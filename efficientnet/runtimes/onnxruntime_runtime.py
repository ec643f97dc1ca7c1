"""An ONNX artifact -> ONNX Runtime, on the provider that the manifest names and on no other."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from efficientnet.formats.artifact import ArtifactManifest, ProgramFile, read_program
from efficientnet.machine.denormals import flushed_denormals
from efficientnet.runtimes import protocol
from efficientnet.runtimes.onnxruntime_gpu import OnnxGpuRuntime
from efficientnet.runtimes.onnxruntime_sessions import PROVIDERS, open_session


class OnnxRuntime:
    """Runs model.onnx on the CPU. A session may be used by several threads at once.

    Streamed batch sizes have a second session, whose calls compute in the thread that makes them.
    """

    def __init__(
        self,
        program: ProgramFile,
        info: protocol.ProgramInfo,
        streamed_batches: tuple[int, ...],
        num_threads: int,
        may_spin: bool = True,
    ) -> None:
        cpu = PROVIDERS["cpu"]
        self._session = open_session(program, cpu, num_threads, may_spin=may_spin)
        self._input_name = self._session.get_inputs()[0].name
        self._streamed_batches = streamed_batches
        self.info = info
        if streamed_batches:
            self._stream = open_session(program, cpu, 1)
            self._threads = ThreadPoolExecutor(num_threads)

    @flushed_denormals()
    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """See Runtime.infer."""
        protocol.check_images(images, self.info)
        if len(images) not in self._streamed_batches:
            return self._run(self._session, images)
        single = (images[index : index + 1] for index in range(len(images)))
        return np.concatenate(list(self._threads.map(partial(self._run, self._stream), single)))

    def _run(
        self, session: ort.InferenceSession, images: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        (logits,) = session.run(None, {self._input_name: images})
        return np.asarray(logits, dtype=np.float32)


def open_program(
    directory: Path, manifest: ArtifactManifest, num_threads: int, may_spin: bool
) -> OnnxRuntime | OnnxGpuRuntime:
    """Open an ONNX Runtime artifact."""
    info = protocol.info_of_artifact(manifest)
    protocol.require_processor(directory, manifest)
    if manifest.provider is not None:
        return OnnxGpuRuntime(directory, manifest, info, num_threads)
    program = read_program(directory, manifest, manifest.program_file)
    return OnnxRuntime(program, info, manifest.streamed_batches, num_threads, may_spin)
