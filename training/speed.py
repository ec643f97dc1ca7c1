"""Variant, image sizes, batch sizes -> images per second and memory of a training step.

    python training/speed.py v2-s
    python training/speed.py v2-s --image-sizes 128 300 --batch-sizes 64 --precision bf16 --compile
    python training/speed.py v2-s --data FOLDER --num-workers 8
    python training/speed.py v2-s --peer timm --image-sizes 64 --batch-sizes 32
    python training/speed.py --table 2 --publish

A step is a forward and a backward pass, the optimizer's update and the moving average's, by the
paper's recipe without Mixup. Each image size and batch size is measured in a process of its own,
on a GPU if there is one. With --data there is a second row for each, fed by the loader. With --peer
our step, that of timm's train.py, and timm's again (the noise) take turns. Sizes that do not fit
are marked OOM: on a GPU after they were tried, on a CPU by what they would need.
"""

import logging
from pathlib import Path

from tqdm import tqdm

from efficientnet.command import parse_flags, run_command
from efficientnet.formats.records import TrainingSpeedRecord, append_record
from efficientnet.reporting.publishing import find_section
from efficientnet.reporting.tables import format_rate
from training.studies.speed_plan import SpeedConfig, plan
from training.studies.speed_recorder import Recorder
from training.studies.speed_tables import SECTION, document, publish
from training.studies.speed_worker import measure

log = logging.getLogger(__name__)


def main(config: SpeedConfig) -> Path:
    """Measure all rows, print the table, and return the records' file.

    Raises:
        PublishError: the README has no place for the tables; nothing is measured then.
        SpeedError: a process failed; the rows before it are kept.
        FileNotFoundError, DatasetError, ValueError: the data cannot be used.
    """
    if config.publish:
        find_section(config.readme, SECTION)
    groups = plan(config)
    recorder = Recorder(config)
    records: list[TrainingSpeedRecord] = []
    for group in tqdm(groups, "measuring", unit="row", disable=None, leave=False):
        for measured in recorder.predict(group) or measure(group, config.seconds, config.turns):
            record = recorder.record(measured)
            append_record(config.output, record)
            records.append(record)
            speed = "OOM" if record.images_per_s is None else format_rate(record.images_per_s)
            log.info("%s: %s images/s", measured.cell.describe(), speed)
    print(document(records, as_markdown=False))
    if config.publish:
        publish(records, config.readme)
    return config.output


if __name__ == "__main__":
    run_command(lambda: parse_flags(SpeedConfig, __doc__), main)
