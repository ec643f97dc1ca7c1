"""Checkpoint -> artifact for the project's own CPU engine, checked against the eager model.

python export/native.py --precision int8
python export/native.py --checkpoint runs/v2-s-20261122T101500Z/checkpoint --size 224
"""

from pathlib import Path

from efficientnet.command import parse_flags, run_command
from export.builders.native_builder import export_native
from export.inputs.config import NativeConfig


def main(config: NativeConfig) -> Path:
    """Export, check and write the artifact; return its directory.

    Raises:
        see native_build.export_native.
    """
    return export_native(config)


if __name__ == "__main__":
    run_command(lambda: parse_flags(NativeConfig, __doc__), main)
