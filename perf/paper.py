"""A table of the EfficientNetV2 paper -> its rows measured here, each beside the paper's number.

The networks run eager in channels_last, in fp16 on a GPU and fp32 on a CPU, at the table's batch
and image sizes, each in a process of its own. The tables are 1, 7, 10 and 11, the appendix's
(--table batch), and 2 and 3, whose training steps training/speed.py measures.

    python perf/paper.py --table 7
    python perf/paper.py --table 7 --rows b4 v2-s --seconds 10 --projected
    python perf/paper.py --table batch --seconds 10
    python perf/paper.py --table batch --seconds 10 --resume   # after it was ended
"""

from efficientnet.command import late, parse_flags, run_command
from perf.studies.config import PaperConfig

main = late("perf.studies.paper")

if __name__ == "__main__":
    run_command(lambda: parse_flags(PaperConfig, __doc__), main)
