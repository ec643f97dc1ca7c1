"""Whole trainings side by side -> what progressive learning and adaptive regularisation bring."""

import logging
import sys
import time
from pathlib import Path

from tqdm import tqdm

from efficientnet.reporting.publishing import find_section
from efficientnet.reporting.tables import format_percent
from training.running.progress import format_seconds
from training.running.run_folder import is_complete
from training.studies.ablation_plan import AblationConfig, PlannedRun, plan_rounds, plan_rows
from training.studies.ablation_report import publish, section_name, write_files, write_results
from training.studies.ablation_results import read_record, read_result, seconds_left
from training.studies.ablation_runs import train_all

log = logging.getLogger(__name__)


def main(config: AblationConfig) -> Path:
    """Train what has not been trained yet; return the results' text."""
    if config.record is not None:
        return _write_again(config.record, config)
    if config.publish:
        find_section(config.readme, section_name(config.title))
    planned = plan_rounds(config, plan_rows(config))
    results = {p.directory: read_result(p) for p in planned if is_complete(p.directory)}
    log.info("%d runs, %d of them complete, in %s", len(planned), len(results), config.directory)
    num_trainings = len(planned) // config.seeds
    began, trained_s = time.perf_counter(), 0.0
    with tqdm(total=len(planned), initial=len(results), unit="run", disable=None) as bar:

        def on_finished(run: PlannedRun) -> None:
            nonlocal trained_s
            result = results[run.directory] = read_result(run)
            bar.update()
            trained_s += result.seconds
            # Starts and evaluations take time too, and several runs go on at once.
            left_s = seconds_left(planned, results) * (time.perf_counter() - began) / trained_s
            bar.write(
                f"{run.row.name}, seed {run.seed}: top-1 {format_percent(result.top1)} in "
                f"{format_seconds(result.seconds)}; {len(results)} of {len(planned)} runs, "
                f"{format_seconds(left_s)} left",
                file=sys.stderr,
            )
            is_whole_round = sum(r.seed == run.seed for r in results.values()) == num_trainings
            if is_whole_round and len(results) < len(planned):  # the last is written below
                write_results(config, planned, results)

        train_all([p for p in planned if p.directory not in results], config.jobs, on_finished)
    record = write_results(config, planned, results)
    if config.publish:
        return publish(record, config.readme)
    return config.directory / "ablation.md"


def _write_again(path: Path, config: AblationConfig) -> Path:
    record = read_record(path)
    if not config.publish:
        return write_files(record, path.parent, path.stem)
    find_section(config.readme, section_name(record.name))
    return publish(record, config.readme)
