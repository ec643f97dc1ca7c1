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
from export.builders.batch_splitting import choose_streams
from export.builders.search import fastest_within_drop
from export.builders.writing import Built, default_output, vnni_binding, write_checked_artifact
from export.graphs.folding import count_ops, count_weight_bytes
from export.graphs.precision import typed_graph
from export.inputs.config import ExportConfig, OrtConfig
from export.inputs.rebuild import rebuild_command
from export.inputs.reference import Reference, load_reference

PROGRAM_FILE = "model.onnx"

log = logging.getLogger(__name__)


def main(config: ExportConfig) -> Path:
    """Export, check and write the artifact; return its directory."""
    provider = provider_of(config)
    require_provider(PROVIDERS[provider])
    reference = load_reference(config)
    # Also in the artifacts of a search, whose own settings are results.
    rebuild = rebuild_command("export/ort.py", config, reference.checkpoint)
    write = partial(write_onnxruntime, rebuild=rebuild)
    finish = None
    if provider == "cpu":
        finish = partial(choose_streams, reference, sizes=config.static_batches)
    if isinstance(config, OrtConfig) and config.search:
        output = default_output(config, reference, config.name)
        in_float: OrtConfig = replace(config, precision="fp32", search=False)
        kinds = {"int8": config}
        return fastest_within_drop(reference, kinds, in_float, output, write, finish)
    return write(reference, config, finish)


def write_onnxruntime(
    reference: Reference,
    config: ExportConfig,
    finish: Callable[[Path], None] | None = None,
    *,
    rebuild: str,
) -> Path:
    """Export, check and write one artifact; return its directory."""
    provider = provider_of(config)
    name = config.name if isinstance(config, OrtConfig) else "onnxruntime"
    output = default_output(config, reference, name)
    # Without VNNI two products are added up in 16 bits, where weights of 8 bits would overflow.
    scheme = {"cpu": "onnxruntime" if has_vnni() else "onnxruntime-7-bits"}.get(
        provider, "tensorrt"
    )
    if config.precision == "fp16" and provider == "cpu":
        log.info("the CPU provider computes fp16 in fp32: the file is half as large, not faster")

    def build(directory: Path, kept: tuple[str, ...]) -> Built:
        typed = typed_graph(reference, config, kept, scheme, directory)
        # Records find each other by the file's hash: those of two providers are two programs.
        helper.set_model_props(typed.model, {"provider": PROVIDERS[provider]})
        onnx.save(typed.model, directory / PROGRAM_FILE)
        graph = ", ".join(f"{op} {n}" for op, n in count_ops(typed.model).most_common())
        is_bound = scheme == "onnxruntime" and config.precision == "int8"
        return Built(
            PROGRAM_FILE,
            count_weight_bytes(typed.model),
            log=(
                f"exported by torch {torch.__version__}, onnx {onnx.__version__}, "
                f"opset {typed.opset}",
                f"graph: {graph}",
            ),
            static_batches=() if provider == "cpu" else config.static_batches,
            provider=None if provider == "cpu" else PROVIDERS[provider],
            opset=typed.opset,
            target_device="cpu" if provider == "cpu" else "cuda",
            binding=vnni_binding("onnxruntime", rebuild) if is_bound else None,
            quantization=typed.quantization,
        )

    return write_checked_artifact(reference, config, output, "onnxruntime", build, finish=finish)


def provider_of(config: ExportConfig) -> str:
    """Return what executes the graph."""
    return config.provider if isinstance(config, OrtConfig) else "cpu"
