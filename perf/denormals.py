"""A network's programs -> what denormal floats cost them on white noise, in turns: a table.

python perf/denormals.py runs/v2-s-digits/checkpoint artifacts/v2-s/openvino-fp32
"""

from efficientnet.command import late, parse_flags, run_command
from perf.studies.config import DenormalsConfig

main = late("perf.studies.denormals_cost")

if __name__ == "__main__":
    run_command(lambda: parse_flags(DenormalsConfig, __doc__), main)
