"""Whole trainings side by side -> what progressive learning and adaptive regularisation bring.

    python training/ablation.py
    python training/ablation.py v2-b0 --data cifar10 --epochs 20 --image-sizes 32 48 64 --jobs 4
    python training/ablation.py tiny --image-sizes 16 24 32 --flags="--optimizer.learning-rate 0.02"
    python training/ablation.py --record reports/published/DAY-DEVICE/ablation-digits.json --publish

schedules: sizes that rise, that are fixed, or in random order, with regularisation that follows the
size or is constant (Tan and Le 2021, Tables 12 and 13). magnitudes: RandAugment's magnitude by
image size (Table 5). Each training is a run of training/run.py; a seed is a round of all of them.
Started again, the command goes on where it was interrupted. With --record it trains nothing and
writes the text, the picture and the section of docs/results.md of a record again.
"""

from efficientnet.command import late, parse_flags, run_command
from training.ablations.ablation_plan import AblationConfig

main = late("training.ablations.ablation_study")

if __name__ == "__main__":
    run_command(lambda: parse_flags(AblationConfig, __doc__), main)
