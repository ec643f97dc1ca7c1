"""Checkpoint -> ONNX Runtime artifact for its CPU, CUDA or TensorRT provider, checked.

python export/ort.py
python export/ort.py --precision int8 --max-drop 0.5
python export/ort.py --provider cuda --precision fp16 --batches 1 16
"""

import importlib
from pathlib import Path

from efficientnet.command import parse_flags, run_command
from efficientnet.errors import PipelineError
from export.inputs.config import ExportConfig, OrtConfig


def main(config: ExportConfig) -> Path:
    """Export, check and write the artifact; return its directory.

    Raises:
        PipelineError: ONNX Runtime is not installed; and see ort_build.export_onnxruntime.
    """
    try:
        builder = importlib.import_module("export.builders.onnxruntime_builder")
    except ImportError as error:
        raise PipelineError(
            f"{error}: this export needs onnxruntime: 'make setup', or pip install onnxruntime "
            "(onnxruntime-gpu on a machine with an NVIDIA GPU)"
        ) from error
    return builder.export_onnxruntime(config)


if __name__ == "__main__":
    run_command(lambda: parse_flags(OrtConfig, __doc__), main)
