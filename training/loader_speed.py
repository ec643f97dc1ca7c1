"""A folder of JPEG images -> images per second of our training loader beside timm's.

Our loader with RandAugment in its workers, and without it (for augmentation on the device), timm's,
and timm's again (the noise of the comparison) take turns, each in a process of its own. All deliver
uint8 batches in shuffled order with the same crops, mirroring, filter and number of operations;
timm's normalization on the device is not part of it.

    python training/loader_speed.py photos
    python training/loader_speed.py photos --image-sizes 224 --num-workers 8 --batch-size 128
"""

from efficientnet.command import late, parse_flags, run_command
from training.studies.config import LoaderSpeedConfig

main = late("training.studies.loader_speed_study")

if __name__ == "__main__":
    run_command(lambda: parse_flags(LoaderSpeedConfig, __doc__), main)
