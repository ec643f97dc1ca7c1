"""An OpenVINO artifact -> OpenVINO's CPU plugin, in the precision that the manifest names."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from efficientnet.artifact import ArtifactError, ArtifactManifest
from efficientnet.runtimes.protocol import (
    ProgramInfo,
    check_images,
    info_of_artifact,
    require_processor,
)

DEVICE = "CPU"

# The plugin's own default is bf16 wherever the processor has it, whatever the file says.
HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}

CAPABILITIES = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16", "int8": "INT8"}


class OpenVinoRuntime:
    """Runs model.xml with a fixed shape for some batch sizes, and one program for all others.

    A program of a fixed shape is faster, but takes a second or more to compile, too long for a
    batch size that a service meets for the first time. Not for several threads at once.
    """

    def __init__(
        self,
        program: Path,
        info: ProgramInfo,
        static_batches: tuple[int, ...],
        float_precision: str,
        num_threads: int,
    ) -> None:
        self._properties = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": num_threads,
            "INFERENCE_PRECISION_HINT": HINTS[float_precision],
        }
        self._program = program
        self.info = info
        try:
            self._core = ov.Core()
            require_capability(self._core, float_precision, program)
            self._static = {size: self._compile(size) for size in static_batches}
            self._any: Any = None
        # OpenVINO raises plain RuntimeErrors.
        except RuntimeError as error:
            raise ArtifactError(f"OpenVINO cannot open {program}: {error}") from error

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """See Runtime.infer."""
        check_images(images, self.info)
        request = self._static.get(len(images))
        if request is None:
            if self._any is None:
                self._any = self._compile(None)
            request = self._any
        (logits,) = request.infer({0: images}).values()
        return np.array(logits, dtype=np.float32)

    def _compile(self, batch_size: int | None) -> Any:
        model = self._core.read_model(self._program)
        size = self.info.preprocess.image_size
        model.reshape([-1 if batch_size is None else batch_size, 3, size, size])
        compiled = self._core.compile_model(model, DEVICE, self._properties)
        return compiled.create_infer_request()


def require_capability(core: Any, precision: str, what: object) -> None:
    """Check that this processor computes in a precision by itself.

    Raises:
        ArtifactError: it does not; OpenVINO would compute in float32 without a word.
    """
    found = core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
    if CAPABILITIES[precision] not in found:
        raise ArtifactError(
            f"{what} computes in {precision}, and this processor does not "
            f"({core.get_property(DEVICE, 'FULL_DEVICE_NAME').strip()}: "
            f"{', '.join(sorted(set(found) & set(CAPABILITIES.values())))}); "
            "export in fp32 or int8"
        )


def own_precision(core: Any) -> Literal["bf16", "fp32"]:
    """Return what OpenVINO computes in by default on this processor, whatever the file says."""
    return "bf16" if "BF16" in core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES") else "fp32"


def open_program(directory: Path, manifest: ArtifactManifest, num_threads: int) -> OpenVinoRuntime:
    """Open an OpenVINO artifact.

    Raises:
        ArtifactError: OpenVINO refuses it, or the processor lacks its precision.
    """
    require_processor(directory, manifest)
    quantization = manifest.quantization
    return OpenVinoRuntime(
        directory / manifest.program_file,
        info_of_artifact(manifest),
        manifest.static_batches,
        quantization.kept_precision if quantization else manifest.precision,
        num_threads,
    )
