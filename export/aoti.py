"""Checkpoint -> programs compiled by AOTInductor for this CPU or GPU, checked against the model.

    python export/aoti.py
    python export/aoti.py --device cuda --precision fp16 --batches 1 8 16
    python export/aoti.py --checkpoint runs/v2-s-20261122T101500Z/checkpoint --batch 1 8 32

Compiling needs a C++ compiler and about a minute a program; running needs torch only, the version
that compiled it, on a processor with the same instructions or a GPU of the same kind.
"""

from efficientnet.command import late, parse_flags, run_command
from export.inputs.config import AotiConfig

main = late("export.builders.aoti_builder")

if __name__ == "__main__":
    run_command(lambda: parse_flags(AotiConfig, __doc__), main)
