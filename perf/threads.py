"""Artifacts -> the time of a call on 1, 2, 4, ... threads, in turns: a table and a picture.

python perf/threads.py artifacts/v2-s/native-int8 artifacts/v2-s/openvino-int8
python perf/threads.py artifacts/v2-s/native-int8 --threads 1 2 3 --seconds 30
"""

from efficientnet.command import late, parse_flags, run_command
from perf.measurements.config import ScalingConfig

main = late("perf.studies.thread_scaling")

if __name__ == "__main__":
    run_command(lambda: parse_flags(ScalingConfig, __doc__), main)
