"""A folder of photos -> time and pixels of our preprocessing beside timm's, in one thread.

timm's transform, the methods exact and fast, and timm's again (the noise of the comparison) take
turns over the same photos, from the bytes of a file to the tensor. A photo's time is the median of
its rounds, a contender's the mean over the photos.

    python perf/preprocessing.py photos
    python perf/preprocessing.py photos --size 384 --crop-fraction None
    python perf/preprocessing.py photos --checkpoint runs/latest/checkpoint
"""

from efficientnet.command import late, parse_flags, run_command
from perf.measurements.config import PreprocessingConfig

main = late("perf.measurements.preprocessing", needs=("timm",))

if __name__ == "__main__":
    run_command(lambda: parse_flags(PreprocessingConfig, __doc__), main)
