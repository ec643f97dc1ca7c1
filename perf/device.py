"""A GPU -> all that it can tell in one call of some minutes: a folder of records and a report.

    python perf/device.py
    python perf/device.py --minutes 8 --output reports/device/h100
    python perf/device.py --parts limits network
    python perf/device.py --dry-run --output reports/device/dry

Each job is a process of its own with a time limit, the important ones first; what a job measures is
written as it comes, so that a call that is cut off loses no more than that. The same call with the
same --output goes on: what is done is not done again. Without a GPU only --dry-run works, which
walks all parts on the CPU with the smallest networks, and whose numbers mean nothing.

Nothing need be installed where torch is: docs/measuring.md lists the packages that are needed.
"""

from efficientnet.command import late, parse_flags, run_command
from perf.device_parts.config import DeviceConfig

main = late("perf.device_parts.study")

if __name__ == "__main__":
    run_command(lambda: parse_flags(DeviceConfig, __doc__), main)
