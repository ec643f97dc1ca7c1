"""Checkpoint -> model.onnx for one of ONNX Runtime's providers, in its precision."""

import logging
from pathlib import Path

import onnx
import torch

from efficientnet.devices import has_vnni
from efficientnet.runtimes.onnx_runtime import PROVIDERS, require_provider
from export.config import ExportConfig, OrtConfig
from export.graph import count_ops, count_weight_bytes
from export.precision import typed_graph
from export.search import fastest_within_drop
from export.source import Source, load_source
from export.streams import choose_streams
from export.writing import Built, default_output, vnni_binding, write_checked_artifact

PROGRAM_FILE = "model.onnx"

OUTPUT_NAMES = {
    "cpu": "onnxruntime",
    "cuda": "onnxruntime-cuda",
    "tensorrt": "onnxruntime-tensorrt",
}

log = logging.getLogger(__name__)


def export_onnxruntime(config: ExportConfig) -> Path:
    """Export, check and write the artifact; return its directory.

    Raises:
        ArtifactError: the provider is not there.
        CheckpointError, GraphError, CalibrationError, GateError, ParityError: see load_source,
            export_onnx, choose_samples and write_checked_artifact.
    """
    provider = provider_of(config)
    require_provider(PROVIDERS[provider])
    source = load_source(config)
    if isinstance(config, OrtConfig) and config.search:
        output = default_output(config, source, OUTPUT_NAMES["cpu"])
        artifact = fastest_within_drop(source, {"int8": config}, "fp32", output, write_onnxruntime)
    else:
        artifact = write_onnxruntime(source, config)
    if provider == "cpu":
        choose_streams(source, artifact, config.static_batches)
    return artifact


def write_onnxruntime(source: Source, config: ExportConfig) -> Path:
    """Export, check and write one artifact; return its directory."""
    provider = provider_of(config)
    output = default_output(config, source, OUTPUT_NAMES[provider])
    # Without VNNI two products are added up in 16 bits, where weights of 8 bits would overflow.
    scheme = {"cpu": "onnxruntime" if has_vnni() else "onnxruntime-7-bits"}.get(
        provider, "tensorrt"
    )
    if config.precision == "fp16" and provider == "cpu":
        log.info("the CPU provider computes fp16 in fp32: the file is half as large, not faster")

    def build(directory: Path, kept: tuple[str, ...]) -> Built:
        log.info("export %s at %d px to ONNX", source.variant, source.image_size)
        typed = typed_graph(source, config, kept, scheme, directory)
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
            binding=vnni_binding("onnxruntime", "python export/ort.py") if is_bound else None,
            quantization=typed.quantization,
        )

    return write_checked_artifact(source, config, output, "onnxruntime", build)


def provider_of(config: ExportConfig) -> str:
    """Return what executes the graph."""
    return config.provider if isinstance(config, OrtConfig) else "cpu"
