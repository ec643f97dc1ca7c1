"""A service in trouble -> what its clients see, beside what is promised: a table a drill.

overload: ten times what it can do. slow-clients: a thousand that send a byte a second. kill: a
worker ended in mid-load. drain: SIGTERM in mid-load. change: another artifact by serving/change.py
in mid-load. artifact: swapped, deleted, written over, and a worker ended after it. memory: many
requests, and the slope of its memory.

    python perf/drills.py artifacts/v2-s/onnxruntime-fp32 --photos photos
    python perf/drills.py artifacts/lite0/default --photos photos --drills kill drain --seconds 10
"""

from efficientnet.command import late, parse_flags, run_command
from perf.service_load.config import DrillsConfig

main = late("perf.service_load.drills", needs=("uvloop", "psutil"))

if __name__ == "__main__":
    run_command(lambda: parse_flags(DrillsConfig, __doc__), main)
