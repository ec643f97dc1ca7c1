"""A runtime's name, as manifests and records have it -> its title and the module that opens it."""

from typing import NamedTuple


class RuntimeName(NamedTuple):
    """One runtime: a row here and a module is all that opening and reporting need of it."""

    title: str
    """As people write it."""
    module: str
    """Has `open_program(directory, manifest, num_threads)` for an artifact, or
    `open_directory(directory, num_threads)` for a checkpoint. Imported only when it is asked for,
    so that none of these libraries is needed by the others."""


EAGER_RUNTIME = "torch"

RUNTIMES = {
    EAGER_RUNTIME: RuntimeName("eager PyTorch", "efficientnet.runtimes.torch_runtime"),
    "onnxruntime": RuntimeName("ONNX Runtime", "efficientnet.runtimes.onnxruntime_runtime"),
    "openvino": RuntimeName("OpenVINO", "efficientnet.runtimes.openvino_runtime"),
    "tensorrt": RuntimeName("TensorRT", "efficientnet.runtimes.tensorrt_runtime"),
    "tensorrt-rtx": RuntimeName("TensorRT-RTX", "efficientnet.runtimes.tensorrt_runtime"),
    "torch-tensorrt": RuntimeName("torch-tensorrt", "efficientnet.runtimes.torch_tensorrt_runtime"),
    "aoti": RuntimeName("AOTInductor", "efficientnet.runtimes.aoti_runtime"),
    "native": RuntimeName("native engine", "efficientnet.runtimes.native_runtime"),
}


def title(runtime: str, precision: str) -> str:
    """Name a runtime as people write it, with its precision."""
    name = RUNTIMES[runtime].title if runtime in RUNTIMES else runtime
    return f"{name} {precision}"
