"""Artifacts and checkpoints -> latency and throughput of each, measured in turns: LatencyRecords.

Without a path: the checkpoint of the newest complete run and every artifact made of it. Each path
is measured in a process of its own, image by image (single_stream) and at the batch size of the
most images/s (offline).

    python perf/latency.py
    python perf/latency.py runs/latest/checkpoint artifacts/v2-s/onnxruntime-fp32 --seconds 60
"""

from efficientnet.command import late, parse_flags, run_command
from perf.measurements.config import LatencyConfig

main = late("perf.measurements.latency")

if __name__ == "__main__":
    run_command(lambda: parse_flags(LatencyConfig, __doc__), main)
