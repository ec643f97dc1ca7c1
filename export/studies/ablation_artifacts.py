"""One of the three forms -> a runtime's artifact of it."""

import importlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import onnx
import torch

from efficientnet.formats.artifact import StaticProgram
from export.builders.writing import Built, write_checked_artifact
from export.graphs.folding import OPSET, count_weight_bytes, weight_bytes_of
from export.graphs.fusion_forms import FORMS, Form, graph_in_form, model_in_form
from export.inputs.config import ExportConfig
from export.inputs.reference import Reference

REBUILD = "python export/ablation.py"

log = logging.getLogger(__name__)

Build = Callable[[Path], Built]


def build_onnxruntime(reference: Reference, form: Form) -> Build:
    """Save a form's graph as it is."""
    graph = graph_in_form(reference.model, reference.image_size, form)

    def build(directory: Path) -> Built:
        onnx.save(graph, directory / "model.onnx")
        return Built("model.onnx", count_weight_bytes(graph), opset=OPSET)

    return build


def build_openvino(reference: Reference, form: Form) -> Build:
    """Have OpenVINO read a form's graph as it is."""
    graph = graph_in_form(reference.model, reference.image_size, form)
    ov: Any = importlib.import_module("openvino")
    runtime: Any = importlib.import_module("efficientnet.runtimes.openvino_runtime")

    def build(directory: Path) -> Built:
        model = runtime.openvino_core().read_model(graph.SerializeToString())
        ov.save_model(model, directory / "model.xml", compress_to_fp16=False)
        return Built(
            "model.xml",
            count_weight_bytes(graph),
            other_files=("model.bin",),
            static_batches=(1,),
            opset=OPSET,
        )

    return build


def build_aoti(reference: Reference, form: Form, device: Literal["cpu", "cuda"]) -> Build:
    """Compile a form with the compiler settings of export/aoti.py."""
    aoti: Any = importlib.import_module("export.builders.aoti_builder")
    target = aoti.find_target(device, "fp32")
    network = model_in_form(reference.model, form, device)

    def build(directory: Path) -> Built:
        log.info("compile %s", FORMS[form])
        file = directory / "model.pt2"
        aoti.compile_programs(network, torch.float32, reference.image_size, {file: 1}, 1, device)
        return Built(
            file.name,
            weight_bytes_of(reference.model, torch.float32),
            static_programs=(StaticProgram(batch_size=1, file=file.name),),
            target_device=target.name if device == "cuda" else "cpu",
            binding=target.binding(REBUILD),
        )

    return build


def build_tensorrt(reference: Reference, form: Form) -> Build:
    """Build an engine of a form, for batches of one."""
    builder: Any = importlib.import_module("export.builders.tensorrt_builder")
    exporting: Any = importlib.import_module("export.builders.tensorrt_export")
    target = exporting.find_target("tensorrt", "fp32", None)
    graph = builder.fix_batch(graph_in_form(reference.model, reference.image_size, form), 1)
    binding = target.binding(REBUILD)

    def build(directory: Path) -> Built:
        settings = builder.BuildSettings(uses_tf32=False)
        engine = builder.build_engine(target.trt, graph, (), settings, FORMS[form])
        (directory / "model.engine").write_bytes(engine.data)
        exporting.write_layers(target.trt, directory, ["model.engine"], binding)
        return Built(
            "model.engine",
            count_weight_bytes(graph),
            static_programs=(StaticProgram(batch_size=1, file="model.engine"),),
            log=engine.log,
            opset=OPSET,
            target_device=target.device,
            binding=binding,
        )

    return build


# Name in the ablation -> runtime of the artifact, and what prepares its build.
BUILDERS: dict[str, tuple[str, Callable[[Reference, Form], Build]]] = {
    "onnxruntime": ("onnxruntime", build_onnxruntime),
    "openvino": ("openvino", build_openvino),
    "aoti": ("aoti", partial(build_aoti, device="cpu")),
    "aoti-cuda": ("aoti", partial(build_aoti, device="cuda")),
    "tensorrt": ("tensorrt", build_tensorrt),
}


def make_artifact(
    name: str, reference: Reference, config: ExportConfig, form: Form, output: Path
) -> Path:
    """Write a form as a runtime's artifact; its parity is recorded, but refuses none."""
    runtime, prepare = BUILDERS[name]
    build = prepare(reference, form)
    return write_checked_artifact(
        reference, config, output, runtime, lambda folder, _: build(folder), is_judged=False
    )
