"""Checkpoint -> OpenVINO artifact for CPUs, checked against the eager model.

python export/ov.py --precision int8 --search
python export/ov.py --checkpoint runs/v2-s-20261122T101500Z/checkpoint --batches 1 16
"""

from efficientnet.command import late, parse_flags, run_command
from export.inputs.config import OpenVinoConfig

main = late("export.builders.openvino_builder", ["openvino", "nncf"])

if __name__ == "__main__":
    run_command(lambda: parse_flags(OpenVinoConfig, __doc__), main)
