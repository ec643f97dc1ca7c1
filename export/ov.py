"""Checkpoint -> OpenVINO artifact for CPUs, checked against the eager model.

python export/ov.py --precision int8 --search
python export/ov.py --checkpoint runs/v2-s-20261122T101500Z/checkpoint --batches 1 16
"""

import importlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from efficientnet.command import parse_flags, run_command
from efficientnet.errors import PipelineError
from export.config import ExportConfig

Activations = Literal["asymmetric", "symmetric"]
Depthwise = Literal["int8", "float"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenVinoConfig(ExportConfig):
    """Settings of an export to OpenVINO."""

    activations: Activations = "asymmetric"
    """How int8 maps are rounded: asymmetric keeps all 256 levels after SiLU, which is hardly ever
    below zero; symmetric kernels are sometimes faster."""

    depthwise: Depthwise = "int8"
    """What depthwise convolutions compute in, in an int8 artifact."""

    search: bool = False
    """Of int8: build with both kinds of activations and of depthwise convolutions, and keep the
    fastest on this machine that is within --max-drop."""

    def __post_init__(self) -> None:
        """Check the limits."""
        super().__post_init__()
        if self.precision == "fp8":
            raise ValueError(
                "--precision is fp8, which no CPU that OpenVINO runs on computes in; "
                "expected fp32, bf16, fp16 or int8"
            )
        if self.search and self.precision != "int8":
            raise ValueError(f"--search is for --precision int8, which is {self.precision}")


def main(config: OpenVinoConfig) -> Path:
    """Export, check and write the artifact; return its directory.

    Raises:
        PipelineError: OpenVINO or NNCF is not installed; and see ov_build.export_openvino.
    """
    try:
        builder = importlib.import_module("export.ov_build")
    except ImportError as error:
        raise PipelineError(
            f"{error}: this export needs openvino and nncf: 'make setup', or "
            "pip install openvino nncf"
        ) from error
    return builder.export_openvino(config)


if __name__ == "__main__":
    run_command(lambda: parse_flags(OpenVinoConfig, __doc__), main)
