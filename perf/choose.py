"""Measured records -> the most accurate program within a budget of time on this device.

Variant, size, precision and runtime are chosen from the records of this device: reports/*.jsonl and
those published. The answer is verified by a fresh run, in turns with the eager model of the same
weights; what does not hold gives way to the next. The Pareto front is drawn to reports/choice.png.

    python perf/choose.py --budget-ms 20
    python perf/choose.py --budget-ms 20 --min-top1 0.9 --percentile 99 --seconds 60
"""

from efficientnet.command import late, parse_flags, run_command
from perf.choosing.config import ChooseConfig

main = late("perf.choosing.choice")

if __name__ == "__main__":
    run_command(lambda: parse_flags(ChooseConfig, __doc__), main)
