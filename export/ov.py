"""Checkpoint -> OpenVINO artifact for CPUs, checked against the eager model.

python export/ov.py --precision int8 --search
python export/ov.py --checkpoint runs/v2-s-20261122T101500Z/checkpoint --batches 1 16
"""

import importlib
from pathlib import Path

from efficientnet.command import parse_flags, run_command
from efficientnet.errors import PipelineError
from export.inputs.config import OpenVinoConfig


def main(config: OpenVinoConfig) -> Path:
    """Export, check and write the artifact; return its directory.

    Raises:
        PipelineError: OpenVINO or NNCF is not installed; and see ov_build.export_openvino.
    """
    try:
        builder = importlib.import_module("export.builders.openvino_builder")
    except ImportError as error:
        raise PipelineError(
            f"{error}: this export needs openvino and nncf: 'make setup', or "
            "pip install openvino nncf"
        ) from error
    return builder.export_openvino(config)


if __name__ == "__main__":
    run_command(lambda: parse_flags(OpenVinoConfig, __doc__), main)
