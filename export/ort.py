"""Checkpoint -> ONNX Runtime artifact for its CPU, CUDA or TensorRT provider, checked.

python export/ort.py
python export/ort.py --precision int8 --max-drop 0.5
python export/ort.py --provider cuda --precision fp16 --batches 1 16
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from efficientnet.command import parse_flags, run_command
from efficientnet.errors import PipelineError
from export.config import ExportConfig


@dataclass(frozen=True)
class OrtConfig(ExportConfig):
    """Settings of an export to ONNX Runtime."""

    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    """What executes the graph; cuda and tensorrt need onnxruntime-gpu."""

    def __post_init__(self) -> None:
        """Check the limits, and what each provider computes in."""
        super().__post_init__()
        allowed = {
            "cpu": ("fp32", "fp16", "int8"),
            "cuda": ("fp32", "fp16"),
            "tensorrt": ("fp32", "fp16", "bf16", "int8", "fp8"),
        }[self.provider]
        if self.precision not in allowed:
            raise ValueError(
                f"--precision is {self.precision}, for which ONNX Runtime's {self.provider} "
                f"provider has no convolution; expected {', '.join(allowed)}"
                + ("; OpenVINO has bf16: python export/ov.py" if self.precision == "bf16" else "")
            )


def main(config: ExportConfig) -> Path:
    """Export, check and write the artifact; return its directory.

    Raises:
        PipelineError: ONNX Runtime is not installed; and see ort_build.export_onnxruntime.
    """
    try:
        builder = importlib.import_module("export.ort_build")
    except ImportError as error:
        raise PipelineError(
            f"{error}: this export needs onnxruntime: 'make setup', or pip install onnxruntime "
            "(onnxruntime-gpu on a machine with an NVIDIA GPU)"
        ) from error
    return builder.export_onnxruntime(config)


if __name__ == "__main__":
    run_command(lambda: parse_flags(OrtConfig, __doc__), main)
