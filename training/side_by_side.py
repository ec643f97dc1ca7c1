"""Finished runs of one recipe -> how far each came after each epoch, side by side.

python training/side_by_side.py runs/fine-tuned runs/from-scratch
python training/side_by_side.py runs/fine-tuned runs/from-scratch --publish
"""

from efficientnet.command import late, parse_flags, run_command
from training.studies.config import SideBySideConfig

main = late("training.studies.side_by_side_study")

if __name__ == "__main__":
    run_command(lambda: parse_flags(SideBySideConfig, __doc__), main)
