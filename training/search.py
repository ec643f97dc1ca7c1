"""A space of networks -> the best for accuracy, training speed and size, as a variant file.

    python training/search.py
    python training/search.py --trials 200 --hours 2 --name digits-w0 --w 0
    python training/search.py --data FOLDER --backbone v2-b0 --width 0.5 --image-size 48
    python training/search.py --storage postgresql://USER@HOST/DATABASE   # the same on each machine
    python training/search.py --target-artifact ov-int8
    python training/search.py --pareto
    python training/search.py --record reports/published/DAY-DEVICE/search-digits.json --publish

EfficientNetV2's search (Tan and Le 2021, section 3.2): operator, kernel, expansion and layers of
each stage, judged by accuracy * step time^w * parameters^v after a brief training. Started again,
the command goes on where it was interrupted; --trials of no more than there are writes the report.
The found network is trained by training/run.py --variant-file.
"""

from efficientnet.command import late, parse_flags, run_command
from training.searching.search_config import SearchConfig

main = late("training.searching.search_study", needs=("optuna",))

if __name__ == "__main__":
    run_command(lambda: parse_flags(SearchConfig, __doc__), main)
