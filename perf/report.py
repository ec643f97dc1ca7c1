"""LatencyRecords and AccuracyRecords -> report.md, report.html and pictures.

No speed is shown without the accuracy of the same program, its environment and its date.

    python perf/report.py
    python perf/report.py --latency reports/latency.jsonl --publish
    python perf/report.py --history reports/published
"""

from efficientnet.command import late, parse_flags, run_command
from perf.measurements.config import ReportConfig

main = late("perf.pages.report")

if __name__ == "__main__":
    run_command(lambda: parse_flags(ReportConfig, __doc__), main)
