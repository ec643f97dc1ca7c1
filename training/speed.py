"""Variant, image sizes, batch sizes -> images per second and memory of a training step.

    python training/speed.py v2-s
    python training/speed.py v2-s --image-sizes 128 300 --batch-sizes 64 --precision bf16 --compile
    python training/speed.py v2-s --data FOLDER --num-workers 8
    python training/speed.py v2-s --peer timm --image-sizes 64 --batch-sizes 32
    python training/speed.py --table 2    # its rows, for perf/paper.py --table 2

A step is a forward and a backward pass, the optimizer's update and the moving average's, by the
paper's recipe without Mixup. Each image size and batch size is measured in a process of its own,
on a GPU if there is one. With --data there is a second row for each, fed by the loader. With --peer
our step, that of timm's train.py, and timm's again (the noise) take turns. Sizes that do not fit
are marked OOM: on a GPU after they were tried, on a CPU by what they would need.
"""

from efficientnet.command import late, parse_flags, run_command
from training.studies.speed_plan import SpeedConfig

main = late("training.studies.speed_study")

if __name__ == "__main__":
    run_command(lambda: parse_flags(SpeedConfig, __doc__), main)
