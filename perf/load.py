"""The service under load, beside a plain loop of the same program -> table, picture and record.

Requests are sent at planned times, whether or not earlier ones are answered, and latency counts
from the planned time. Measured with and without batching, in turns: a single client, what
saturates the service, and the answers in time at rising rates. The plain loop decodes,
preprocesses and infers without HTTP: one process with all threads, and one process a core.

    python perf/load.py artifacts/lite0/onnxruntime-fp32 --photos photos
    python perf/load.py artifacts/v2-s/onnxruntime-fp32 --photos photos --seconds 60 --publish
"""

from efficientnet.command import late, parse_flags, run_command
from perf.service_load.config import LoadConfig

main = late("perf.service_load.load", needs=("uvloop", "matplotlib"))

if __name__ == "__main__":
    run_command(lambda: parse_flags(LoadConfig, __doc__), main)
