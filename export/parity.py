"""Artifacts -> each step from the eager model to them compared, and the first that breaks named.

    python export/parity.py artifacts/v2-s/onnxruntime-int8
    python export/parity.py artifacts/v2-s/* --layers --checkpoint runs/latest/checkpoint

An artifact that was built where it could not run is accepted by all once it has passed here.
"""

from efficientnet.command import late, parse_flags, run_command
from export.inputs.study_config import ParityConfig

main = late("export.checks.parity")

if __name__ == "__main__":
    run_command(lambda: parse_flags(ParityConfig, __doc__), main)
