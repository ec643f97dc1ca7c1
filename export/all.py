"""Checkpoint -> every artifact that this machine can make, one table of them, and the default.

python export/all.py
python export/all.py --checkpoint runs/v2-s-20261122T101500Z/checkpoint --only ort ov
"""

from efficientnet.command import late, parse_flags, run_command
from export.inputs.study_config import AllConfig

main = late("export.studies.all_exports")

if __name__ == "__main__":
    run_command(lambda: parse_flags(AllConfig, __doc__), main)
