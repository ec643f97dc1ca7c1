"""Programs -> running processes with their inputs -> what each of them measured."""

import statistics
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from efficientnet.images.datasets import data_name
from efficientnet.images.preprocess import PreprocessSpec
from efficientnet.measuring.contender import Worker
from efficientnet.measuring.inputs import Inputs, prepare_inputs
from efficientnet.measuring.programs import Program, images_for
from efficientnet.measuring.progress import Progress
from efficientnet.measuring.turns import (
    NUM_SWEEPS,
    Job,
    Measured,
    TimeBudget,
    measure_in_turns,
    sweep,
)
from efficientnet.reporting.tables import NOTHING, Table, format_rate
from efficientnet.runtimes import ProgramInfo
from efficientnet.runtimes.names import title
from perf.measurements.scenarios import Scenario

# A runtime that computes nothing has thousands of samples by then.
MAX_NULL_SECONDS = 1.0


@dataclass(frozen=True)
class MeasuredProgram:
    """A program, the process that runs it, and one with the null runtime in its place."""

    program: Program
    worker: Worker
    null: Worker
    batch_sizes: tuple[int, ...]
    num_input_images: int
    data: str


@dataclass(frozen=True)
class MeasuredRow:
    """A program at one batch size."""

    program: MeasuredProgram
    measured: Measured
    overhead_ms: float
    """Of the harness, at that size."""


@contextmanager
def open_programs(
    programs: Sequence[Program],
    batch_sizes: Sequence[tuple[int, ...]],
    num_threads: int,
    data: str | None,
    seed: int,
) -> Generator[list[MeasuredProgram]]:
    """Prepare the inputs, start the processes and wait until all are ready; end them afterwards.

    Raises:
        FileNotFoundError: the data is not there.
        WorkerError: a process cannot open its program.
    """
    datasets = [images_for(program, data) for program in programs]
    names = _names(programs)
    largest = max(size for sizes in batch_sizes for size in sizes)
    inputs: dict[tuple[str, PreprocessSpec], Inputs] = {}
    nulls: dict[tuple[str, PreprocessSpec, int], Worker] = {}
    opened: list[MeasuredProgram] = []
    with ExitStack() as stack:

        def start(name: str, program: Path | ProgramInfo, own_inputs: Inputs) -> Worker:
            worker = Worker(name, program, num_threads, own_inputs)
            stack.callback(worker.stop)
            return worker

        for program, dataset, sizes in zip(programs, datasets, batch_sizes, strict=True):
            seen = (dataset.source, program.preprocess)
            if seen not in inputs:
                inputs[seen] = prepare_inputs(dataset.val, program.preprocess, largest, seed)
                stack.enter_context(inputs[seen].file)
            answered = (*seen, len(program.class_names))
            if answered not in nulls:
                nulls[answered] = start("harness overhead", _null_of(program), inputs[seen])
            opened.append(
                MeasuredProgram(
                    program,
                    start(names[program], program.path, inputs[seen]),
                    nulls[answered],
                    sizes,
                    inputs[seen].num_images,
                    data_name(dataset.source),
                )
            )
        for worker in (*nulls.values(), *(program.worker for program in opened)):
            worker.receive()
        yield opened


def measure(
    programs: Sequence[MeasuredProgram],
    scenario: Scenario,
    budget: TimeBudget,
    progress: Progress,
) -> list[MeasuredRow]:
    """Measure each program at the batch sizes of a scenario."""
    sizes = [scenario.batch_sizes(program.batch_sizes) for program in programs]
    if scenario.picks_fastest:
        sizes = _fastest(programs, sizes, scenario, budget, progress)
    pairs = [(p, size) for p, own in zip(programs, sizes, strict=True) for size in own]
    jobs = [Job(program.worker, size, budget) for program, size in pairs]
    null_jobs = list(dict.fromkeys(Job(p.null, size, _null_budget(budget)) for p, size in pairs))
    measured = measure_in_turns([*jobs, *null_jobs], scenario.name, progress)
    overheads_ms = {
        (job.worker, job.batch_size): statistics.median(result.samples_ms)
        for job, result in zip(null_jobs, measured[len(jobs) :], strict=True)
    }
    return [
        MeasuredRow(program, result, overheads_ms[program.null, size])
        for (program, size), result in zip(pairs, measured[: len(jobs)], strict=True)
    ]


def planned_s(
    programs: Sequence[MeasuredProgram], scenarios: Sequence[Scenario], budget: TimeBudget
) -> float:
    """Estimate how long the scenarios, and the sweeps before them, take."""
    seconds = 0.0
    for scenario in scenarios:
        sizes = [scenario.batch_sizes(program.batch_sizes) for program in programs]
        num_sizes = sum(map(len, sizes))
        num_rows = len(programs) if scenario.picks_fastest else num_sizes
        seconds += num_rows * budget.planned_s + _null_budget(budget).planned_s
        if scenario.picks_fastest and _needs_sweep(sizes):
            seconds += num_sizes * NUM_SWEEPS * budget.sweep_s
    return seconds


def sweep_table(programs: Sequence[MeasuredProgram], rates: Sequence[dict[int, float]]) -> Table:
    """Lay out images/s by batch size."""
    sizes = sorted({size for rate in rates for size in rate})
    columns = ("images/s at batch", *map(str, sizes))
    rows = tuple(
        (
            program.worker.name,
            *(format_rate(rate[size]) if size in rate else NOTHING for size in sizes),
        )
        for program, rate in zip(programs, rates, strict=True)
    )
    return Table(columns, rows, frozenset(columns[:1]))


def _fastest(
    programs: Sequence[MeasuredProgram],
    sizes: list[tuple[int, ...]],
    scenario: Scenario,
    budget: TimeBudget,
    progress: Progress,
) -> list[tuple[int, ...]]:
    # Of each program the size of the most images/s.
    if not _needs_sweep(sizes):
        return sizes
    workers = [(program.worker, own) for program, own in zip(programs, sizes, strict=True)]
    rates = sweep(workers, scenario.name, budget, progress)
    progress.write(sweep_table(programs, rates).aligned_text())
    return [(max(rate, key=lambda size, rate=rate: rate[size]),) for rate in rates]


def _needs_sweep(sizes: Sequence[tuple[int, ...]]) -> bool:
    return any(len(own) > 1 for own in sizes)


def _names(programs: Sequence[Program]) -> dict[Program, str]:
    # The path is told where two would have the same name otherwise.
    short = {p: f"{p.variant} {title(p.runtime, p.precision)}" for p in programs}
    taken = Counter(short.values())
    return {p: name if taken[name] == 1 else f"{name} ({p.path})" for p, name in short.items()}


def _null_budget(budget: TimeBudget) -> TimeBudget:
    return TimeBudget(min(budget.seconds, MAX_NULL_SECONDS), budget.num_turns)


def _null_of(program: Program) -> ProgramInfo:
    return ProgramInfo(
        program_sha256="",
        variant=program.variant,
        runtime="null",
        precision=program.precision,
        preprocess=program.preprocess,
        class_names=program.class_names,
        data=program.data,
        max_batch_size=None,
        flops_per_image=0,
        weight_bytes=0,
    )
