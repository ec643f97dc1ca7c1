"""Checkpoint -> model.onnx for one of ONNX Runtime's providers, in its precision."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx
import torch
from onnx import helper

from efficientnet.machine.processor import has_vnni
from efficientnet.runtimes.onnxruntime_sessions import PROVIDERS, require_provider
from export.builders import writing
from export.builders.batch_splitting import choose_streams
from export.builders.search import fastest_within_drop
from export.graphs.folding import count_ops, count_weight_bytes
from export.graphs.precision import typed_graph
from export.inputs.config import OrtConfig, rebuild_command
from export.inputs.reference import Reference, load_reference

PROGRAM_FILE = "model.onnx"

log = logging.getLogger(__name__)


def main(config: OrtConfig) -> Path:
    """Export, check and write the artifact; return its directory."""
    require_provider(PROVIDERS[config.provider])
    reference = load_reference(config)
    # Also in the artifacts of a search, whose own settings are results.
    rebuild = rebuild_command("export/ort.py", config, reference.checkpoint)
    write = partial(write_onnxruntime, rebuild=rebuild)
    finish = None
    if config.provider == "cpu":
        finish = partial(choose_streams, reference, sizes=config.static_batches)
    if config.search:
        output = writing.default_output(config, reference, config.name)
        in_float = replace(config, precision="fp32", search=False)
        return fastest_within_drop(reference, {"int8": config}, in_float, output, write, finish)
    return write(reference, config, finish)


def write_onnxruntime(
    reference: Reference,
    config: OrtConfig,
    finish: Callable[[Path], None] | None = None,
    *,
    rebuild: str,
) -> Path:
    """Export, check and write one artifact; return its directory."""
    on_cpu, provider = config.provider == "cpu", PROVIDERS[config.provider]
    output = writing.default_output(config, reference, config.name)
    # Without VNNI two products are added up in 16 bits, where weights of 8 bits would overflow.
    of_cpu = "onnxruntime" if has_vnni() else "onnxruntime-7-bits"
    scheme = of_cpu if on_cpu else "tensorrt"
    if config.precision == "fp16" and on_cpu:
        log.info("the CPU provider computes fp16 in fp32: the file is half as large, not faster")

    def build(directory: Path, kept: tuple[str, ...]) -> writing.Built:
        typed = typed_graph(reference, config, kept, scheme, directory)
        # Records find each other by the file's hash: those of two providers are two programs.
        helper.set_model_props(typed.model, {"provider": provider})
        onnx.save(typed.model, directory / PROGRAM_FILE)
        graph = ", ".join(f"{op} {n}" for op, n in count_ops(typed.model).most_common())
        is_bound = scheme == "onnxruntime" and config.precision == "int8"
        return writing.Built(
            PROGRAM_FILE,
            count_weight_bytes(typed.model),
            log=(
                f"exported by torch {torch.__version__}, onnx {onnx.__version__}, "
                f"opset {typed.opset}",
                f"graph: {graph}",
            ),
            static_batches=() if on_cpu else config.static_batches,
            provider=None if on_cpu else provider,
            opset=typed.opset,
            target_device="cpu" if on_cpu else "cuda",
            binding=writing.vnni_binding("onnxruntime", rebuild) if is_bound else None,
            quantization=typed.quantization,
        )

    return writing.write_checked_artifact(
        reference, config, output, "onnxruntime", build, finish=finish
    )
