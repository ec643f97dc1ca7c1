"""Artifacts and checkpoints -> top-1 and top-5 of each on all held-out images: AccuracyRecords.

Without a path: the checkpoint of the newest complete run and every artifact made of it.

    python perf/accuracy.py
    python perf/accuracy.py artifacts/v2-s/onnxruntime-fp32 --predictions predictions.jsonl
"""

from efficientnet.command import late, parse_flags, run_command
from perf.measurements.config import AccuracyConfig

main = late("perf.measurements.accuracy")

if __name__ == "__main__":
    run_command(lambda: parse_flags(AccuracyConfig, __doc__), main)
