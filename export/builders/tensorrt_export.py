"""Checkpoint -> TensorRT or TensorRT-RTX engine, checked against the eager model."""

import json
import logging
from pathlib import Path
from typing import Any

import onnx
import torch

from efficientnet.formats.artifact import Binding, ProgramFile
from efficientnet.machine.atomic import write_text
from efficientnet.runtimes.tensorrt_library import PACKAGES, deserialize
from export.builders import tensorrt_builder
from export.builders.tensorrt_target import Target, find_target, member_for
from export.builders.writing import Built, default_output, programs_for, write_checked_artifact
from export.graphs.folding import count_weight_bytes
from export.graphs.precision import typed_graph
from export.inputs.config import TrtConfig
from export.inputs.rebuild import rebuild_command
from export.inputs.reference import load_reference

PROGRAM_FILE = "model.engine"
LAYERS_FILE = "layers.json"

log = logging.getLogger(__name__)


def main(config: TrtConfig) -> Path:
    """Build, check and write the artifact; return its directory."""
    runtime = "tensorrt" if config.flavor == "tensorrt" else "tensorrt-rtx"
    target = find_target(runtime, config.precision, config.compute_capability)
    version = target.trt.__version__
    log.info("%s %s for %s", target.runtime, version, target.device)
    if target.runtime == "tensorrt-rtx" and config.is_quantized:
        log.info(
            "TensorRT-RTX promises %s for weights of matrix products only: the engine is built, "
            "but nothing says that it is faster than fp16",
            config.precision,
        )
    reference = load_reference(config)
    output = default_output(config, reference, target.runtime)
    settings = settings_for(config, target, output)
    binding = Binding(
        library=PACKAGES[target.runtime],
        version=version,
        compute_capability=" ".join(target.compute_capabilities) or None,
        device=target.device,
        rebuild=rebuild_command("export/trt.py", config, reference.checkpoint),
    )
    scheme = "tensorrt-fp8" if config.precision == "fp8" else "tensorrt"

    def build(directory: Path, kept: tuple[str, ...]) -> Built:
        log.info("export %s at %d px to ONNX", reference.variant, reference.image_size)
        typed = typed_graph(reference, config, kept, scheme, directory)
        lines = [
            f"exported by torch {torch.__version__}, onnx {onnx.__version__}, opset {typed.opset}",
            f"built by {target.runtime} {version} for {target.device}",
        ]
        sizes = config.static_batches if config.batches else ()
        programs = programs_for(PROGRAM_FILE, sizes)
        graphs = {p.file: tensorrt_builder.fix_batch(typed.model, p.batch_size) for p in programs}
        profiles = () if programs else tensorrt_builder.profiles_for(config.batch)
        for file, graph in (graphs or {PROGRAM_FILE: typed.model}).items():
            log.info("build %s", file)
            made = tensorrt_builder.build_engine(target.trt, graph, profiles, settings, file)
            (directory / file).write_bytes(made.data)
            log.info("%s: %.1f MB in %.1f s", file, len(made.data) / 1e6, made.seconds)
            lines += made.log
        files = list(graphs) or [PROGRAM_FILE]
        if target.can_run_here:
            write_layers(target.trt, directory, files, binding)
        return Built(
            program_file=files[0],
            weight_bytes=count_weight_bytes(typed.model),
            other_files=tuple(files[1:]),
            static_programs=programs,
            log=tuple(lines),
            opset=typed.opset,
            target_device=target.device,
            binding=binding,
            quantization=typed.quantization,
        )

    return write_checked_artifact(
        reference, config, output, target.runtime, build, target.can_run_here
    )


def settings_for(config: TrtConfig, target: Target, output: Path) -> tensorrt_builder.BuildSettings:
    """Return what the builder is told; fp32 means float32, not TF32."""
    capabilities: tuple[str, ...] = ()
    cache: Path | None = None
    if target.runtime == "tensorrt":
        assert target.gpu is not None
        name = f"{target.trt.__version__}-{target.gpu.compute_capability}"
        cache = output.parent / f".timing-cache-tensorrt-{name}"
    elif config.compute_capability is None and target.gpu is not None:
        capabilities = ("CURRENT",)
    else:
        capabilities = tuple(map(member_for, target.compute_capabilities))
    return tensorrt_builder.BuildSettings(
        optimization_level=config.optimization_level,
        workspace_mib=config.workspace_mib,
        uses_tf32=config.precision != "fp32",
        timing_cache=cache,
        compute_capabilities=capabilities,
    )


def write_layers(trt: Any, directory: Path, files: list[str], binding: Binding) -> None:
    """Write layers.json: what the engines consist of, for reports on single layers."""
    layers: dict[str, object] = {}
    for file in files:
        engine: Any = deserialize(trt, ProgramFile.read(directory / file), binding)
        layers[file] = tensorrt_builder.read_layers(tensorrt_builder.layers_of(trt, engine))
    write_text(directory / LAYERS_FILE, json.dumps(layers, indent=1) + "\n")
