"""The network against timm's same one, eager on the CPU -> a table of ratios.

    python perf/network.py
    python perf/network.py --variants b0 v2-s --paddings symmetric --seconds 60 --publish

Forward at the eval size (batch 1) and forward + backward at the train size. Each contender is a
process of its own and they take turns, timm twice: how far timm is from itself is the noise.
"""

from efficientnet.command import late, parse_flags, run_command
from perf.measurements.config import NetworkConfig

main = late("perf.measurements.network")

if __name__ == "__main__":
    run_command(lambda: parse_flags(NetworkConfig, __doc__), main)
