"""An OpenVINO artifact -> OpenVINO's CPU plugin, in the precision that the manifest names."""

from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from efficientnet.formats.artifact import ArtifactError, ArtifactManifest, ProgramFile, read_program
from efficientnet.machine.denormals import are_flushed, flushed_denormals
from efficientnet.runtimes import protocol

DEVICE = "CPU"

# The plugin's own default is bf16 wherever the processor has it, whatever the file says.
HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}

# Of the program for all batch sizes; OpenVINO's own default is 5,000. It keeps kernels for each
# size that it has seen, with a copy of their weights: about three sizes of V2-S here. A call of
# another size makes its kernels anew, a fourth of its time more (docs/export.md).
NUM_KEPT_KERNELS = 500

CAPABILITIES = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16", "int8": "INT8"}


class OpenVinoRuntime:
    """Runs model.xml with a fixed shape for some batch sizes, and one program for all others.

    A program of a fixed shape is faster, but takes a second or more to compile, too long for a
    batch size that a service meets for the first time. Streamed sizes share a program of one image
    that runs in several streams of one thread each. Not for several threads at once.
    """

    # OpenVINO leaves the thread that compiles with denormals flushed; here it gets them back.
    @flushed_denormals()
    def __init__(
        self,
        program: ProgramFile,
        weights: ProgramFile,
        info: protocol.ProgramInfo,
        static_batches: tuple[int, ...],
        streamed_batches: tuple[int, ...],
        float_precision: str,
        num_threads: int,
    ) -> None:
        self._precision = float_precision
        self._num_threads = num_threads
        self._streamed_batches = streamed_batches
        self.info = info
        try:
            require_capability(float_precision, program.path)
            self._model = openvino_core().read_model(program.data, weights.data)
            self._static = {
                size: self._compile(size).create_infer_request()
                for size in static_batches
                if size not in streamed_batches
            }
            self._any: Any = None
            if streamed_batches:
                self._streams = ov.AsyncInferQueue(self._compile(1, num_threads), num_threads)
                self._streams.set_callback(_keep_logits)
        # OpenVINO raises plain RuntimeErrors.
        except RuntimeError as error:
            raise ArtifactError(f"OpenVINO cannot open {program.path}: {error}") from error

    @flushed_denormals()
    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """See Runtime.infer."""
        protocol.check_images(images, self.info)
        if len(images) in self._streamed_batches:
            return self._infer_in_streams(images)
        request = self._static.get(len(images))
        if request is None:
            if self._any is None:
                self._any = self._compile(None).create_infer_request()
            request = self._any
        # Copying the images would take up to a tenth of a small network's call.
        (logits,) = request.infer({0: images}, share_inputs=True).values()
        return np.array(logits, dtype=np.float32)

    def _infer_in_streams(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        logits = np.empty((len(images), len(self.info.class_names)), np.float32)
        for index in range(len(images)):
            single = {0: images[index : index + 1]}
            self._streams.start_async(single, logits[index], share_inputs=True)
        self._streams.wait_all()
        return logits

    def _compile(self, batch_size: int | None, num_streams: int = 1) -> Any:
        # Sizes that are met later are of the same model: the files may be others' by then.
        model = self._model.clone()
        size = self.info.preprocess.image_size
        model.reshape([-1 if batch_size is None else batch_size, 3, size, size])
        properties = compile_properties(self._precision, self._num_threads, num_streams)
        if batch_size is None:
            properties["CPU_RUNTIME_CACHE_CAPACITY"] = NUM_KEPT_KERNELS
        return openvino_core().compile_model(model, DEVICE, properties)


def _keep_logits(request: Any, row: NDArray[np.float32]) -> None:
    row[:] = request.get_output_tensor().data[0]


def compile_properties(
    float_precision: str, num_threads: int, num_streams: int = 1
) -> dict[str, Any]:
    """Return what OpenVINO's CPU plugin compiles a program with."""
    return {
        "INFERENCE_NUM_THREADS": num_threads,
        "INFERENCE_PRECISION_HINT": HINTS[float_precision],
        "CPU_DENORMALS_OPTIMIZATION": are_flushed(),
        **({"PERFORMANCE_HINT": "LATENCY"} if num_streams == 1 else {"NUM_STREAMS": num_streams}),
    }


@cache
def openvino_core() -> ov.Core:
    """Return the only core of this process, which is never closed.

    Each core gives the thread that first compiles with it a stack for signals, and takes it back
    when it closes. Two that close in the order of their opening leave the thread with a stack that
    is unmapped: the next signal (SIGTERM, or SIGCHLD of a loader's worker) ends the process, or is
    handled on top of what lies there by then. Seen with OpenVINO 2026.4.1 (in its source,
    src/plugins/intel_cpu/src/sigstack_manager.cpp).
    """
    return ov.Core()


def require_capability(precision: str, what: object) -> None:
    """Check that this processor computes in a precision: else OpenVINO takes float32."""
    core = openvino_core()
    found = core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
    if CAPABILITIES[precision] not in found:
        raise ArtifactError(
            f"{what} computes in {precision}, and this processor does not "
            f"({core.get_property(DEVICE, 'FULL_DEVICE_NAME').strip()}: "
            f"{', '.join(sorted(set(found) & set(CAPABILITIES.values())))}); "
            "export in fp32 or int8"
        )


def own_precision() -> Literal["bf16", "fp32"]:
    """Return what OpenVINO computes in by default on this processor, whatever the file says."""
    found = openvino_core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
    return "bf16" if "BF16" in found else "fp32"


def open_program(directory: Path, manifest: ArtifactManifest, num_threads: int) -> OpenVinoRuntime:
    """Open an OpenVINO artifact."""
    protocol.require_processor(directory, manifest)
    quantization = manifest.quantization
    (weights,) = manifest.other_files
    return OpenVinoRuntime(
        read_program(directory, manifest, manifest.program_file),
        read_program(directory, manifest, weights),
        protocol.info_of_artifact(manifest),
        manifest.static_batches,
        manifest.streamed_batches,
        quantization.kept_precision if quantization else manifest.precision,
        num_threads,
    )
