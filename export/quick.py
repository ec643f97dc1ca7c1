"""Checkpoint -> what answers fastest on this CPU, from one process and in about a minute.

ONNX Runtime and OpenVINO, in float32, in bf16 where the processor has it, and in int8 if the
accuracy gate lets it; the native engine in int8. `export/all.py` makes everything, searches for
mixtures where int8 loses too much, and measures as it should be.

    python export/quick.py
    python export/quick.py --checkpoint runs/lite0-20261122T101500Z/checkpoint
"""

from efficientnet.command import late, parse_flags, run_command
from export.inputs.study_config import QuickConfig

main = late("export.studies.quick_exports")

if __name__ == "__main__":
    run_command(lambda: parse_flags(QuickConfig, __doc__), main)
