"""A runtime's name, as manifests and records have it -> title, module, and how it is exported."""

from typing import Literal, NamedTuple, get_args

from efficientnet.precision import Precision


class Export(NamedTuple):
    """One kind of artifact of a runtime."""

    name: str
    """First part of the artifact's directory."""
    device: Literal["cpu", "cuda"]
    precisions: tuple[Precision, ...]
    """All that the runtime has on some device."""
    flags: tuple[str, ...] = ()
    """Of the command, besides --precision."""


class RuntimeName(NamedTuple):
    """One runtime: a row here and a module is all that opening and reporting need of it."""

    title: str
    """As people write it."""
    module: str
    """Has `open_program(directory, manifest, num_threads)` for an artifact, or
    `open_directory(directory, num_threads)` for a checkpoint. Imported only when it is asked for,
    so that none of these libraries is needed by the others."""
    command: str = ""
    """Name of the script in export/ that makes its artifacts."""
    exports: tuple[Export, ...] = ()
    """What `export/all.py` tries."""


EAGER_RUNTIME = "torch"

_ALL = get_args(Precision)
_FLOATS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")

RUNTIMES = {
    EAGER_RUNTIME: RuntimeName("eager PyTorch", "efficientnet.runtimes.torch_runtime"),
    "onnxruntime": RuntimeName(
        "ONNX Runtime",
        "efficientnet.runtimes.onnxruntime_runtime",
        "ort",
        (
            Export("onnxruntime", "cpu", ("fp32", "fp16", "int8")),
            Export("onnxruntime-cuda", "cuda", ("fp32", "fp16"), ("--provider", "cuda")),
            # In fp32 it computes in TF32, which no option of the provider turns off.
            Export(
                "onnxruntime-tensorrt",
                "cuda",
                ("fp16", "bf16", "int8", "fp8"),
                ("--provider", "tensorrt"),
            ),
        ),
    ),
    "openvino": RuntimeName(
        "OpenVINO",
        "efficientnet.runtimes.openvino_runtime",
        "ov",
        (Export("openvino", "cpu", (*_FLOATS, "int8")),),
    ),
    "native": RuntimeName(
        "native engine",
        "efficientnet.runtimes.native_runtime",
        "native",
        (Export("native", "cpu", ("bf16", "int8")),),
    ),
    "aoti": RuntimeName(
        "AOTInductor",
        "efficientnet.runtimes.aoti_runtime",
        "aoti",
        (
            Export("aoti", "cpu", _FLOATS, ("--device", "cpu")),
            Export("aoti-cuda", "cuda", _FLOATS, ("--device", "cuda")),
        ),
    ),
    "torch-tensorrt": RuntimeName(
        "torch-tensorrt",
        "efficientnet.runtimes.torch_tensorrt_runtime",
        "torch_trt",
        (Export("torch-tensorrt", "cuda", _FLOATS),),
    ),
    "tensorrt": RuntimeName(
        "TensorRT",
        "efficientnet.runtimes.tensorrt_runtime",
        "trt",
        (Export("tensorrt", "cuda", _ALL),),
    ),
    "tensorrt-rtx": RuntimeName(
        "TensorRT-RTX",
        "efficientnet.runtimes.tensorrt_runtime",
        "trt",
        (Export("tensorrt-rtx", "cuda", _ALL, ("--flavor", "rtx")),),
    ),
}

EXPORTS = {export.name: export for row in RUNTIMES.values() for export in row.exports}


def title(runtime: str, precision: str) -> str:
    """Name a runtime as people write it, with its precision."""
    name = RUNTIMES[runtime].title if runtime in RUNTIMES else runtime
    return f"{name} {precision}"
