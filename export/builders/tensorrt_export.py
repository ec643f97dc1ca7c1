"""Checkpoint -> TensorRT or TensorRT-RTX engine, checked against the eager model."""

import json
import logging
from pathlib import Path
from typing import Any

import onnx
import torch

from efficientnet.formats.artifact import Binding, ProgramFile
from efficientnet.machine.atomic import write_text
from efficientnet.runtimes.tensorrt_library import deserialize
from export.builders import tensorrt_builder, writing
from export.builders.tensorrt_target import Target, find_target, member_for
from export.graphs.folding import count_weight_bytes
from export.graphs.precision import typed_graph
from export.inputs.config import TrtConfig, rebuild_command
from export.inputs.reference import load_reference

PROGRAM_FILE = "model.engine"
LAYERS_FILE = "layers.json"

log = logging.getLogger(__name__)


def main(config: TrtConfig) -> Path:
    """Build, check and write the artifact; return its directory."""
    runtime = "tensorrt" if config.flavor == "tensorrt" else "tensorrt-rtx"
    target = find_target(runtime, config.precision, config.compute_capability)
    version = target.trt.__version__
    log.info("%s %s for %s", runtime, version, target.device)
    if runtime == "tensorrt-rtx" and config.is_quantized:
        log.info(
            "TensorRT-RTX promises %s for weights of matrix products only: the engine is built, "
            "but nothing says that it is faster than fp16",
            config.precision,
        )
    reference = load_reference(config)
    output = writing.default_output(config, reference, runtime)
    settings = settings_for(config, target, output)
    binding = target.binding(rebuild_command("export/trt.py", config, reference.checkpoint))
    scheme = "tensorrt-fp8" if config.precision == "fp8" else "tensorrt"
    files = writing.program_files(PROGRAM_FILE, config)

    def build(directory: Path, kept: tuple[str, ...]) -> writing.Built:
        typed = typed_graph(reference, config, kept, scheme, directory)
        lines = [
            f"exported by torch {torch.__version__}, onnx {onnx.__version__}, opset {typed.opset}",
            f"built by {runtime} {version} for {target.device}",
        ]
        for file, batch in files.items():
            log.info("build %s", file)
            graph, profiles = typed.model, tensorrt_builder.profiles_for(config.batch)
            if isinstance(batch, int):
                graph, profiles = tensorrt_builder.fix_batch(graph, batch), ()
            made = tensorrt_builder.build_engine(target.trt, graph, profiles, settings, file)
            (directory / file).write_bytes(made.data)
            log.info("%s: %.1f MB in %.1f s", file, len(made.data) / 1e6, made.seconds)
            lines += made.log
        if target.can_run_here:
            write_layers(target.trt, directory, list(files), binding)
        return writing.Built(
            next(iter(files)),
            count_weight_bytes(typed.model),
            static_programs=writing.static_programs(files),
            log=tuple(lines),
            opset=typed.opset,
            target_device=target.device,
            binding=binding,
            quantization=typed.quantization,
        )

    return writing.write_checked_artifact(
        reference, config, output, runtime, build, target.can_run_here
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
        uses_tf32=config.precision != "fp32",
        timing_cache=cache,
        compute_capabilities=capabilities,
    )


def write_layers(trt: Any, directory: Path, files: list[str], binding: Binding) -> None:
    """Write layers.json: what the engines consist of, as TensorRT's inspector tells it."""
    engines = {
        file: deserialize(trt, ProgramFile.read(directory / file), binding) for file in files
    }
    layers = {file: tensorrt_builder.layers_of(trt, engine) for file, engine in engines.items()}
    write_text(directory / LAYERS_FILE, json.dumps(layers, indent=1) + "\n")
