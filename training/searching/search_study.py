"""A SearchConfig -> networks tried until there are enough -> found.json and the report."""

import logging
from pathlib import Path

from optuna.trial import TrialState

from efficientnet.network.variant_file import write_variant_file
from efficientnet.reporting.publishing import find_section
from training.searching.artifact_latency import open_bench
from training.searching.comparison import compare
from training.searching.experiment import prepare
from training.searching.search_config import SearchConfig
from training.searching.search_record import SearchRecord, collect, read_record
from training.searching.search_report import publish, section_name, write_files
from training.searching.storage import open_storage
from training.searching.study import open_study, setting_of
from training.searching.worker import Worker

log = logging.getLogger(__name__)


def main(config: SearchConfig) -> Path:
    """Search; return the report."""
    if config.record is not None:
        record, path = read_record(config.record), config.record
        if config.publish:
            return publish(record, config.readme)
        stem = "report" if path.name == "search.json" else path.stem
        return write_files(record, path.parent, stem, path.name)
    if config.publish:
        find_section(config.readme, section_name(config.title))
    space = config.space()
    experiment = prepare(config)
    storage = open_storage(
        config.storage, config.directory, 60 * config.wait_minutes, config.heartbeat
    )
    setting = setting_of(config, experiment, space)
    study = open_study(config, storage, setting)
    config.directory.mkdir(parents=True, exist_ok=True)
    with open_bench(config, experiment, space.backbone) as bench:
        _search(Worker(config, experiment, space, study, storage, bench))
    record = collect(config, study, space, len(experiment.held_out))
    write_found(record, config.directory)
    text = write_files(record, config.directory, "report", "search.json")
    return publish(record, config.readme) if config.publish else text


def _search(worker: Worker) -> None:
    space = worker.space
    num_known = sum(t.state == TrialState.COMPLETE for t in worker.trials())
    log.info(
        f"study {worker.config.title}: {space.num_choices:,} choices around {space.backbone.name}, "
        f"{num_known} networks known, on {worker.experiment.ranks.describe()}"
    )
    worker.run()
    if worker.others_are_at_work():
        log.info("others are still at work: the last one compares, and has all in its report")
    else:
        compare(worker)


def write_found(record: SearchRecord, directory: Path) -> None:
    """Write the found network, and those of the front, as variant files."""
    chosen = [("found.json", record.best_trial)]
    if record.setting["objective"] == "front":
        chosen += [(f"front/trial-{trial.number}.json", trial) for trial in record.front]
    measured = ("top1", "step_ratio", "size_ratio", "latency_ratio", "reward")
    for name, trial in chosen:
        if trial is not None:
            origin: dict[str, object] = {"search": record.name, "trial": trial.number}
            origin |= {field: getattr(trial, field) for field in measured}
            origin["reference"] = record.setting["reference"]
            write_variant_file(directory / name, record.space.network(trial.chosen), origin)
