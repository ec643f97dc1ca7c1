"""Two revisions -> whether the newer one is slower or less accurate, measured here in turns.

Both are built on this machine from the same checkpoint and measured by processes that take turns,
the base twice: how far it is from itself is the noise. A confirmed regression ends with exit code
1; what lies within the noise is called inconclusive. `make latency-ci BASE=REV` is this command.

    python perf/regression.py --base main
    python perf/regression.py --base v0.1 --checkpoint runs/latest/checkpoint --exports ort ov
"""

from efficientnet.command import late, parse_flags, run_command
from perf.regressions.config import RegressionConfig

main = late("perf.regressions.regression")

if __name__ == "__main__":
    run_command(lambda: parse_flags(RegressionConfig, __doc__), main)
