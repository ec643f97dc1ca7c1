"""Whole trainings side by side -> what progressive learning and adaptive regularisation bring."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from efficientnet import PROJECT_ROOT
from efficientnet.machine.environment import num_usable_cores
from efficientnet.reporting.publishing import find_section
from efficientnet.reporting.tables import format_percent
from training.ablations.ablation_plan import (
    AblationConfig,
    AblationError,
    PlannedRun,
    plan_rounds,
    plan_rows,
)
from training.ablations.ablation_report import publish, section_name, write_files
from training.ablations.ablation_results import collect, read_record, read_result
from training.running.progress import format_seconds
from training.running.run_folder import is_complete

RUN_COMMAND = PROJECT_ROOT / "training" / "run.py"
LOG_LINES = 15
SECONDS_BETWEEN_LOOKS = 0.2

log = logging.getLogger(__name__)


def main(config: AblationConfig) -> Path:
    """Train what has not been trained yet; return the results' text."""
    if config.record is not None:
        record, path = read_record(config.record), config.record
        if config.publish:
            return publish(record, config.readme)
        return write_files(record, path.parent, path.stem)
    if config.publish:
        find_section(config.readme, section_name(config.title))
    planned = plan_rounds(config, plan_rows(config))
    results = {p.directory: read_result(p) for p in planned if is_complete(p.directory)}
    log.info("%d runs, %d of them complete, in %s", len(planned), len(results), config.directory)
    with tqdm(total=len(planned), initial=len(results), unit="run", disable=None) as bar:

        def on_finished(run: PlannedRun) -> None:
            result = results[run.directory] = read_result(run)
            bar.update()
            bar.write(
                f"{run.row.name}, seed {run.seed}: top-1 {format_percent(result.top1)} in "
                f"{format_seconds(result.seconds)}; {len(results)} of {len(planned)} runs",
                file=sys.stderr,
            )

        train_all([p for p in planned if p.directory not in results], config.jobs, on_finished)
    record = collect(config, planned, results)
    text = write_files(record, config.directory, "ablation")
    return publish(record, config.readme) if config.publish else text


def train_all(
    pending: Sequence[PlannedRun], jobs: int, on_finished: Callable[[PlannedRun], None]
) -> None:
    """Train some at a time, in their order, each in a process of training/run.py.

    Raises:
        AblationError: one failed; the others have saved what was reached, as after Ctrl-C.
    """
    waiting, running = list(pending), dict[PlannedRun, subprocess.Popen[bytes]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running[run] = _start(run, jobs)
            for run, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[run]
                if process.returncode != 0 or not is_complete(run.directory):
                    raise AblationError(_describe_failure(run, process.returncode))
                on_finished(run)
            time.sleep(SECONDS_BETWEEN_LOOKS)
    except KeyboardInterrupt as interrupt:
        left = len(waiting) + len(running)
        raise type(interrupt)(
            f"interrupted with {left} runs left; the same command goes on"
        ) from None
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def _start(run: PlannedRun, jobs: int) -> "subprocess.Popen[bytes]":
    threads = max(1, num_usable_cores() // jobs)
    variant, *flags = run.arguments
    if jobs > 1 and run.config.data is not None:
        flags = ["--num-workers", str(threads), *flags]  # before those given, which win
    path = _log_path(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, str(RUN_COMMAND), variant, *flags],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            # Ctrl-C reaches this command alone, which then asks each run once: twice is "at once".
            process_group=0,
        )


def _log_path(run: PlannedRun) -> Path:
    return run.directory.parent.parent / "logs" / f"{run.directory.name}.log"


def _describe_failure(run: PlannedRun, code: int) -> str:
    path = _log_path(run)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    last = "\n".join(lines[-LOG_LINES:])
    return f"{run.row.name}, seed {run.seed}, ended with code {code}; {path} ends with:\n{last}"
