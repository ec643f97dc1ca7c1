"""Variant, image sizes, batch sizes -> images per second and memory of a training step."""

import logging
from pathlib import Path

from tqdm import tqdm

from efficientnet.formats.records import TrainingSpeedRecord, append_record
from efficientnet.reporting.publishing import find_section
from efficientnet.reporting.tables import format_rate
from training.studies.speed_plan import SpeedConfig, plan
from training.studies.speed_recorder import Recorder
from training.studies.speed_tables import SECTION, document, publish
from training.studies.speed_turns import measure

log = logging.getLogger(__name__)


def main(config: SpeedConfig) -> Path:
    """Measure all rows, print the table, and return the records' file."""
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
            log.info("%s: %s images/s", measured.case.describe(), speed)
    print(document(records, as_markdown=False))
    if config.publish:
        publish(records, config.readme)
    return config.output
