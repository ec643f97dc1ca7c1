"""An ONNX artifact -> ONNX Runtime's CPU provider."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# ONNX Runtime 1.31 for Linux reports to its makers; the variable is read when it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort

from efficientnet.artifact import ArtifactError, ArtifactManifest
from efficientnet.runtimes.protocol import ProgramInfo, check_images, info_of_artifact

PROVIDER = "CPUExecutionProvider"


class OnnxRuntime:
    """Runs model.onnx. A session may be used by several threads at once."""

    def __init__(self, program: Path, info: ProgramInfo, num_threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        try:
            self._session = ort.InferenceSession(program, options, providers=[PROVIDER])
        # ONNX Runtime's own exception classes share no public base but Exception.
        except Exception as error:
            raise ArtifactError(f"ONNX Runtime cannot open {program}: {error}") from error
        self._input_name = self._session.get_inputs()[0].name
        self.info = info

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """See Runtime.infer."""
        check_images(images, self.info)
        (logits,) = self._session.run(None, {self._input_name: images})
        return np.asarray(logits, dtype=np.float32)


def open_program(directory: Path, manifest: ArtifactManifest, num_threads: int) -> OnnxRuntime:
    """Open an ONNX Runtime artifact.

    Raises:
        ArtifactError: ONNX Runtime refuses it.
    """
    return OnnxRuntime(directory / manifest.program_file, info_of_artifact(manifest), num_threads)
