"""Artifacts and checkpoints -> latency and throughput of each, measured in turns."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from efficientnet.formats.records import AccuracyRecord, append_record, read_records
from efficientnet.machine.environment import current_environment, num_usable_cores
from efficientnet.measuring.contender import ContenderError
from efficientnet.measuring.peaks import cpu_peaks, describe_peak, gpu_peak
from efficientnet.measuring.programs import Program, read_programs, require_writable
from efficientnet.measuring.progress import Progress
from efficientnet.measuring.turns import TimeBudget
from efficientnet.network.cost import DevicePeak
from perf.measurements.config import LatencyConfig
from perf.measurements.measured_programs import (
    MeasuredProgram,
    MeasuredRow,
    batch_sizes_of,
    joined,
    measure,
    measure_planned,
    open_programs,
    planned_s,
)
from perf.measurements.recording import make_record, results_table
from perf.measurements.scenarios import SCENARIOS, Scenario
from perf.measurements.stability import BELOW_FLOOR, instabilities, is_below_floor

# Beside the latencies, where perf/accuracy.py writes by default.
ACCURACY_FILE = "accuracy.jsonl"

log = logging.getLogger(__name__)


def main(config: LatencyConfig) -> Path:
    """Measure all paths and append the records; a path that fails takes nothing from the others.

    Raises:
        ContenderError: a path failed, or all did; the records of the others have been written.
    """
    started_at = datetime.now(UTC)
    programs = read_programs(config.paths)
    batch_sizes = [choose_batch_sizes(program, config.batches) for program in programs]
    scenarios = [scenario for name, scenario in SCENARIOS.items() if name in config.scenarios]
    for scenario in scenarios:
        if not any(map(scenario.batch_sizes, batch_sizes)):
            raise ValueError(
                f"--scenarios {scenario.name}: no program takes a call {scenario.where}; export "
                "with a larger --batch, or leave it out"
            )
    require_writable(config.output, "--output")
    num_threads = config.threads or num_usable_cores()
    budget = TimeBudget(config.seconds, config.turns)
    log.info(
        "programs: %d; threads: %d; measured time: %g s each and scenario, in %d turns; "
        "machine: %s, %d cores",
        len(programs),
        num_threads,
        config.seconds,
        config.turns,
        current_environment().processor,
        num_usable_cores(),
    )
    # Before the programs are opened: nothing else computes now.
    peaks = peaks_of(programs, num_threads)
    failures: list[ContenderError] = []
    num_processes = config.processes
    if all(scenario.is_planned for scenario in scenarios):
        num_processes = 1
    with Progress(planned_s(batch_sizes, scenarios, budget, num_processes)) as progress:
        measurement = _Measurement(scenarios, budget, config.bound_ms, progress)
        alive = dict(zip(programs, batch_sizes, strict=True))
        # One process of each program, and when all is measured the next of each.
        for part in budget.split(num_processes):
            with open_programs(
                list(alive), list(alive.values()), num_threads, config.data, failures
            ) as opened:
                held = measurement.measure_all(opened, part, failures)
            alive = {program.program: program.batch_sizes for program in held}
            if not alive:
                break
    rows = measurement.rows(num_processes)
    if not rows:
        raise failures[0]
    folder = config.output.parent
    records = [
        make_record(row, scenario.name, num_threads, started_at, folder, peaks)
        for scenario, row in rows
    ]
    for record in records:
        append_record(config.output, record)
    names = [row.program.name for _, row in rows]
    log.info("%s", results_table(names, records).aligned_text())
    for name, record in zip(names, records, strict=True):
        for reason in instabilities(record):
            log.info("unstable: %s, %s: %s", name, record.scenario, reason)
        if is_below_floor(record):
            log.info("wrong floor: %s, %s: %s", name, record.scenario, BELOW_FLOOR)
    if missing := without_accuracy(programs, folder):
        log.info(
            "a speed is reported with its accuracy only: 'python perf/accuracy.py %s' measures it",
            " ".join(map(str, missing)),
        )
    if failures:
        raise ContenderError(
            f"{len(failures)} of {len(programs)} paths failed, the records of the others are in "
            f"{config.output}: {'; '.join(map(str, failures))}"
        )
    return config.output


class _Measurement:
    """Rows of each program in each scenario, from one process of it after the other."""

    def __init__(
        self,
        scenarios: Sequence[Scenario],
        budget: TimeBudget,
        bound_ms: float | None,
        progress: Progress,
    ) -> None:
        self._scenarios = scenarios
        self._budget = budget
        self._bound_ms = bound_ms
        self._progress = progress
        self._found: dict[tuple[Scenario, Program], list[list[MeasuredRow]]] = defaultdict(list)

    def measure_all(
        self, opened: list[MeasuredProgram], part: TimeBudget, failures: list[ContenderError]
    ) -> list[MeasuredProgram]:
        """Measure the next process of each, for a part of the budget; return those that held."""
        for scenario in self._scenarios:
            if scenario.is_planned and any(self._found[scenario, p.program] for p in opened):
                continue
            while opened:
                try:
                    rows = self._measure(opened, scenario, part)
                except ContenderError as error:
                    alive = [p for p in opened if p.process is not error.contender]
                    if len(alive) == len(opened):
                        raise
                    # All take turns in the same order again: what was measured beside one that
                    # failed half-way is not what the others are.
                    log.warning("%s; %s is measured again without it", error, scenario.name)
                    failures.append(error)
                    opened = alive
                    continue
                for program, own in zip(opened, rows, strict=True):
                    self._found[scenario, program.program].append(own)
                break
        return opened

    def _measure(
        self, opened: list[MeasuredProgram], scenario: Scenario, part: TimeBudget
    ) -> list[list[MeasuredRow]]:
        if scenario.is_planned:
            return measure_planned(opened, scenario, self._budget, self._bound_ms, self._progress)
        before = [self._found[scenario, program.program] for program in opened]
        if all(before):
            sizes = [tuple(row.measured.batch_size for row in own[0]) for own in before]
        else:
            sizes = batch_sizes_of(opened, scenario, self._budget, self._progress)
        return measure(opened, sizes, scenario, part, self._progress)

    def rows(self, num_processes: int) -> list[tuple[Scenario, MeasuredRow]]:
        """Put the rows of each program's processes together, where none of them failed."""
        return [
            (scenario, joined(rows))
            for (scenario, _), own in self._found.items()
            if len(own) == (1 if scenario.is_planned else num_processes)
            for rows in zip(*own, strict=True)
        ]


def without_accuracy(programs: Sequence[Program], folder: Path) -> list[Path]:
    """Return the paths of the programs whose accuracy has not been measured yet."""
    records = folder / ACCURACY_FILE
    known: set[str] = set()
    if records.is_file():
        known = {record.program_sha256 for record in read_records(records, AccuracyRecord)}
    return [program.path for program in programs if program.program_sha256 not in known]


def peaks_of(programs: Sequence[Program], num_threads: int) -> dict[Path, DevicePeak | None]:
    """Find what the device of each program can do at most; None where that is not known."""
    of_cpu = cpu_peaks(num_threads, [p.precision for p in programs if not p.runs_on_gpu])
    for precision, peak in of_cpu.items():
        log.info("the CPU's peak in %s: %s", precision, describe_peak(peak))
    gpus = current_environment().gpus
    gpu_name = gpus[0].partition(",")[0] if gpus else ""
    return {
        program.path: gpu_peak(gpu_name, program.precision)
        if program.runs_on_gpu
        else of_cpu.get(program.precision)
        for program in programs
    }


def choose_batch_sizes(program: Program, asked: Sequence[int]) -> tuple[int, ...]:
    """Keep the sizes that the program takes, ascending; those it does not take are logged."""
    most = program.max_batch_size
    sizes = sorted(set(asked))
    taken = tuple(size for size in sizes if most is None or size <= most)
    if not taken:
        raise ValueError(
            f"{program.path} takes at most {most} images in a call, --batches are "
            f"{', '.join(map(str, sizes))}; add a smaller one, or export with a larger --batch"
        )
    if len(taken) < len(sizes):
        left_out = ", ".join(str(size) for size in sizes if size not in taken)
        log.info("%s takes at most %d images in a call: without %s", program.path, most, left_out)
    return taken
