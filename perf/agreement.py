"""Artifacts and checkpoints -> our times beside those of tools that others wrote, in turns.

OpenVINO's benchmark_app for its artifacts, torch.utils.benchmark for a checkpoint; where the
runtime's package has no such tool, the table says so. Medians should agree within 5 %. What our
harness adds to a call, measured with a runtime that computes nothing, stands beside them.

    python perf/agreement.py
    python perf/agreement.py runs/latest/checkpoint artifacts/v2-s/openvino-fp32 --seconds 60
"""

from efficientnet.command import late, parse_flags, run_command
from perf.studies.config import AgreementConfig

main = late("perf.studies.tool_agreement")

if __name__ == "__main__":
    run_command(lambda: parse_flags(AgreementConfig, __doc__), main)
