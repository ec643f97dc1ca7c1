"""Checkpoint -> artifact for the project's own CPU engine, checked against the eager model.

python export/native.py --precision int8
python export/native.py --checkpoint runs/v2-s-20261122T101500Z/checkpoint --size 224
"""

from efficientnet.command import late, parse_flags, run_command
from export.inputs.config import NativeConfig

main = late("export.builders.native_builder")

if __name__ == "__main__":
    run_command(lambda: parse_flags(NativeConfig, __doc__), main)
