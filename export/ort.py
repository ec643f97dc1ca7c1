"""Checkpoint -> ONNX Runtime artifact, checked against the eager model.

python export/ort.py
python export/ort.py --precision int8
python export/ort.py --checkpoint runs/v2-s-20261122T101500Z/checkpoint --batch 1 1 128
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch

from efficientnet.command import parse_flags, run_command
from export.config import ExportConfig
from export.graph import OPSET, count_ops, count_weight_bytes, export_onnx
from export.source import load_source
from export.writing import Built, default_output, write_checked_artifact

PROGRAM_FILE = "model.onnx"

log = logging.getLogger(__name__)


def main(config: ExportConfig) -> Path:
    source = load_source(config)
    output = default_output(config, source, "onnxruntime")

    def build(directory: Path, kept: tuple[str, ...]) -> Built:
        log.info("export %s at %d px to ONNX, opset %d", source.variant, source.image_size, OPSET)
        graph = export_onnx(source.model, source.image_size)
        onnx.save(graph, directory / PROGRAM_FILE)
        lines = (
            f"exported by torch {torch.__version__}, onnx {onnx.__version__}, opset {OPSET}",
            "graph: " + ", ".join(f"{op} {n}" for op, n in count_ops(graph).most_common()),
        )
        return Built(PROGRAM_FILE, count_weight_bytes(graph), log=lines, opset=OPSET)

    return write_checked_artifact(source, config, output, "onnxruntime", build)


if __name__ == "__main__":
    run_command(lambda: parse_flags(ExportConfig, __doc__), main)
