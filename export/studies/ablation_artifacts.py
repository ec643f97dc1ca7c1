"""One of the three forms -> a runtime's artifact of it, and what that runtime executes."""

import importlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import onnx
import torch

from efficientnet.formats.artifact import Binding, ProgramFile, StaticProgram
from export.builders.writing import Builder, Built, write_checked_artifact
from export.graphs.folding import OPSET, count_weight_bytes
from export.graphs.fusable_parts import Executed, count_parts
from export.graphs.fusion_forms import FORMS, Form, graph_in_form, model_in_form
from export.inputs.config import ExportConfig
from export.inputs.reference import Reference
from export.studies.executed_layers import (
    executed_by_inductor,
    executed_by_onnxruntime,
    executed_by_openvino,
    executed_by_tensorrt,
)

REBUILD = "python export/ablation.py"

log = logging.getLogger(__name__)


class Made(NamedTuple):
    """A form as a runtime's artifact, and what is executed of it."""

    artifact: Path
    executed: Executed


def make_onnxruntime(reference: Reference, config: ExportConfig, form: Form, output: Path) -> Made:
    """Write a form as ONNX Runtime's artifact."""
    graph = graph_in_form(reference.model, reference.image_size, form)

    def build(directory: Path, _: tuple[str, ...]) -> Built:
        onnx.save(graph, directory / "model.onnx")
        return Built("model.onnx", count_weight_bytes(graph), opset=OPSET)

    artifact = _write(reference, config, output, "onnxruntime", build)
    image, totals = reference.parity_images[:1], count_parts(reference.model)
    return Made(artifact, executed_by_onnxruntime(artifact / "model.onnx", image, totals))


def make_openvino(reference: Reference, config: ExportConfig, form: Form, output: Path) -> Made:
    """Write a form as OpenVINO's artifact, read by OpenVINO as it is."""
    graph = graph_in_form(reference.model, reference.image_size, form)
    ov: Any = importlib.import_module("openvino")
    runtime: Any = importlib.import_module("efficientnet.runtimes.openvino_runtime")

    def build(directory: Path, _: tuple[str, ...]) -> Built:
        model = runtime.openvino_core().read_model(graph.SerializeToString())
        ov.save_model(model, directory / "model.xml", compress_to_fp16=False)
        return Built(
            "model.xml",
            count_weight_bytes(graph),
            other_files=("model.bin",),
            static_batches=(1,),
            opset=OPSET,
        )

    artifact = _write(reference, config, output, "openvino", build)
    image = reference.parity_images[:1]
    return Made(artifact, executed_by_openvino(artifact / "model.xml", image, graph))


def make_aoti(
    reference: Reference,
    config: ExportConfig,
    form: Form,
    output: Path,
    device: Literal["cpu", "cuda"],
) -> Made:
    """Compile a form with the compiler settings of export/aoti.py."""
    aoti: Any = importlib.import_module("export.builders.aoti_export")
    builder: Any = importlib.import_module("export.builders.aoti_builder")
    target = aoti.find_target(aoti.AotiConfig(device=device))
    settings = builder.CompileSettings(device, torch.float32, False)
    network = model_in_form(reference.model, form, device)
    program = builder.Program(network, torch.float32).eval().to(device)

    def build(directory: Path, _: tuple[str, ...]) -> Built:
        log.info("compile %s", FORMS[form])
        # It tells everyone without a GPU that the CUDA toolkit is not used.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        image = torch.zeros(1, 3, reference.image_size, reference.image_size, device=device)
        with builder.fresh_cache(dir=str(directory)), torch.no_grad():
            torch._inductor.aoti_compile_and_package(
                torch.export.export(program, (image,)),
                package_path=str(directory / "model.pt2"),
                inductor_configs=settings.inductor(is_static=True),
            )
        return Built(
            "model.pt2",
            builder.weight_bytes_of(reference.model, torch.float32),
            static_programs=(StaticProgram(batch_size=1, file="model.pt2"),),
            target_device=target.name if device == "cuda" else "cpu",
            binding=Binding(
                library="torch",
                version=torch.__version__,
                compute_capability=target.compute_capability,
                device=target.name,
                rebuild=REBUILD,
            ),
        )

    artifact = _write(reference, config, output, "aoti", build)
    return Made(
        artifact, executed_by_inductor(artifact / "model.pt2", count_parts(reference.model))
    )


def make_tensorrt(reference: Reference, config: ExportConfig, form: Form, output: Path) -> Made:
    """Build an engine of a form, for batches of one."""
    builder: Any = importlib.import_module("export.builders.tensorrt_builder")
    library = importlib.import_module("efficientnet.runtimes.tensorrt_library")
    target = importlib.import_module("export.builders.tensorrt_target").find_target(
        "tensorrt", "fp32", None
    )
    graph = builder.fix_batch(graph_in_form(reference.model, reference.image_size, form), 1)
    binding = Binding(
        library=library.PACKAGES["tensorrt"],
        version=target.trt.__version__,
        compute_capability=" ".join(target.compute_capabilities),
        device=target.device,
        rebuild=REBUILD,
    )

    def build(directory: Path, _: tuple[str, ...]) -> Built:
        settings = builder.BuildSettings(uses_tf32=False)
        engine = builder.build_engine(target.trt, graph, (), settings, FORMS[form])
        (directory / "model.engine").write_bytes(engine.data)
        return Built(
            "model.engine",
            count_weight_bytes(graph),
            static_programs=(StaticProgram(batch_size=1, file="model.engine"),),
            log=engine.log,
            opset=OPSET,
            target_device=target.device,
            binding=binding,
        )

    artifact = _write(reference, config, output, "tensorrt", build)
    engine = library.deserialize(target.trt, ProgramFile.read(artifact / "model.engine"), binding)
    layers = builder.read_layers(builder.layers_of(target.trt, engine))["layers"]
    return Made(artifact, executed_by_tensorrt(layers, graph))


def _write(
    reference: Reference, config: ExportConfig, output: Path, runtime: str, build: Builder
) -> Path:
    return write_checked_artifact(reference, config, output, runtime, build, is_judged=False)


Make = Callable[[Reference, ExportConfig, Form, Path], Made]

MAKERS: dict[str, Make] = {
    "onnxruntime": make_onnxruntime,
    "openvino": make_openvino,
    "aoti": partial(make_aoti, device="cpu"),
    "aoti-cuda": partial(make_aoti, device="cuda"),
    "tensorrt": make_tensorrt,
}
