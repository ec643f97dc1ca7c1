"""Variant, image sizes, batch sizes -> images per second and memory of a training step."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from efficientnet.formats.records import TrainingSpeedRecord, append_record
from efficientnet.measuring.contender import Contender, running
from efficientnet.measuring.turns import take_turns
from efficientnet.reporting.publishing import find_section
from efficientnet.reporting.tables import format_rate
from training.studies.speed_plan import SpeedConfig, StepCase, plan
from training.studies.speed_recorder import Recorder
from training.studies.speed_subject import Measured, StepSubject, StepTurn, StepWarmUp
from training.studies.speed_tables import SECTION, document, publish

# Of a case's time, at most, for steps that do not count.
WARM_UP_FRACTION = 0.5

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


def measure(group: Sequence[StepCase], seconds: float, num_turns: int) -> list[Measured]:
    """Let the processes of a group take turns; one alone has a single long one.

    All are in memory at once. Each has so many seconds in all, without its warm-up.
    """
    takes_turns = len(group) > 1
    num_turns = num_turns if takes_turns else 1
    processes = {case: Contender(case.describe(), partial(StepSubject, case)) for case in group}
    rows: dict[StepCase, Measured] = {}

    def ask(case: StepCase, method: str, *arguments: float) -> StepWarmUp | StepTurn | None:
        # What the device does not hold has no answer, and its process keeps none of the memory.
        answer = processes[case].ask(method, *arguments)
        if answer is None:
            rows[case].is_out_of_memory = True
            processes[case].stop()
        return answer

    def turn(case: StepCase, _: int) -> None:
        if rows[case].is_out_of_memory:
            return
        taken = ask(case, "turn", seconds / num_turns, 1 if takes_turns else 0)
        if isinstance(taken, StepTurn):
            rows[case].turns += (taken,)

    with running(list(processes.values())):
        for case in group:
            rows[case] = Measured(case, processes[case].ask("device"))
        for case in group:
            warm_up = ask(case, "warm_up", WARM_UP_FRACTION * seconds)
            rows[case].warm_up = warm_up if isinstance(warm_up, StepWarmUp) else None
        take_turns(group, num_turns, turn)
    return list(rows.values())
