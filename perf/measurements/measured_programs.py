"""Programs -> running processes with their inputs -> what each of them measured."""

import itertools
import statistics
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from efficientnet.formats.records import ServerLoad
from efficientnet.images.datasets import data_name
from efficientnet.images.preprocess_spec import PreprocessSpec
from efficientnet.measuring.clock import SETTLING_FRACTION, Turn, WarmUp
from efficientnet.measuring.contender import Contender, ContenderError, running
from efficientnet.measuring.inputs import Inputs, prepare_inputs
from efficientnet.measuring.programs import Program, images_for
from efficientnet.measuring.progress import Progress
from efficientnet.measuring.turns import TimeBudget, take_turns
from efficientnet.reporting.tables import NOTHING, Table, format_ms, format_rate
from efficientnet.runtimes import ProgramInfo
from efficientnet.runtimes.names import title
from perf.measurements.program_subject import ProgramSubject, ProgramTurn
from perf.measurements.scenarios import Scenario
from perf.measurements.server_load import (
    BOUND_FACTOR,
    RateSearch,
    num_images_of,
    poisson_times,
)

# A runtime that computes nothing has thousands of samples by then.
MAX_NULL_SECONDS = 1.0
OVERHEAD = "harness overhead"

# Draws the held-out images that are the input.
SEED = 0

# Share of a row's measured time that the sweep gives to each batch size. It comes round twice, so
# that one slow moment of the machine does not choose the batch size.
SWEEP_FRACTION = 0.2
NUM_SWEEPS = 2


@dataclass(frozen=True)
class MeasuredProgram:
    """A program, the process that runs it, and one with the null runtime in its place."""

    program: Program
    name: str
    process: Contender
    null: Contender
    batch_sizes: tuple[int, ...]
    num_input_images: int
    data: str


@dataclass(frozen=True)
class Job:
    """A process and what it is to measure."""

    name: str
    process: Contender
    batch_size: int
    budget: TimeBudget


@dataclass(frozen=True)
class Measured:
    """What a job gave, or several of the same program in one process after the other."""

    batch_size: int
    warm_ups: tuple[WarmUp, ...]
    """Of each process."""
    answers: tuple[ProgramTurn, ...]

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What was timed."""
        return tuple(answer.turn for answer in self.answers)

    @property
    def peak_memory_bytes(self) -> int:
        """Of the process that took most."""
        return max(answer.peak_memory_bytes for answer in self.answers)

    @property
    def cores_busy_elsewhere(self) -> float | None:
        """Mean over the turns; None where the system does not tell."""
        busy = [a.cores_busy_elsewhere for a in self.answers if a.cores_busy_elsewhere is not None]
        return statistics.fmean(busy) if busy else None

    @property
    def samples_ms(self) -> tuple[float, ...]:
        """All samples in order."""
        return tuple(sample for turn in self.turns for sample in turn.samples_ms)

    @property
    def num_warmup(self) -> int:
        """Calls that do not count: the warm-up's, and the first ones of each turn."""
        num_calls = sum(warm_up.num_calls for warm_up in self.warm_ups)
        return num_calls + sum(turn.num_settling_calls for turn in self.turns)

    @property
    def is_warmup_stable(self) -> bool:
        """Whether every warm-up settled."""
        return all(warm_up.is_stable for warm_up in self.warm_ups)

    @property
    def images_per_s(self) -> float:
        """Images divided by the wall time of the turns."""
        num_images = self.batch_size * len(self.samples_ms)
        return num_images / sum(turn.elapsed_s for turn in self.turns)


@dataclass(frozen=True)
class MeasuredRow:
    """A program at one batch size."""

    program: MeasuredProgram
    measured: Measured
    overhead_ms: float
    """Of the harness, at that size."""
    server: ServerLoad | None = None
    """What the search for the highest rate found."""


@contextmanager
def open_programs(
    programs: Sequence[Program],
    batch_sizes: Sequence[tuple[int, ...]],
    num_threads: int,
    data: str | None,
    failures: list[ContenderError] | None = None,
) -> Generator[list[MeasuredProgram]]:
    """Prepare the inputs, start the processes and wait until all are ready; end them afterwards.

    Args:
        programs: what is opened.
        batch_sizes: of each.
        num_threads: of a call.
        data: see images_for.
        failures: takes programs that cannot be opened, which are not given then; None = none may.
    """
    datasets = [images_for(program, data) for program in programs]
    names = _names(programs)
    largest = max(size for sizes in batch_sizes for size in sizes)
    inputs: dict[tuple[str, PreprocessSpec], Inputs] = {}
    nulls: dict[tuple[str, PreprocessSpec, int], Contender] = {}
    opened: list[MeasuredProgram] = []
    with ExitStack() as stack:

        def process(name: str, program: Path | ProgramInfo, own_inputs: Inputs) -> Contender:
            descriptor, size = own_inputs.file.fileno(), own_inputs.image_size
            opener = partial(ProgramSubject, program, num_threads, descriptor, size)
            return Contender(name, opener, (descriptor,))

        for program, dataset, sizes in zip(programs, datasets, batch_sizes, strict=True):
            seen = (dataset.source, program.preprocess)
            if seen not in inputs:
                inputs[seen] = prepare_inputs(dataset.val, program.preprocess, largest, SEED)
                stack.enter_context(inputs[seen].file)
            answered = (*seen, len(program.class_names))
            if answered not in nulls:
                nulls[answered] = process(OVERHEAD, _null_of(program), inputs[seen])
            name = names[program]
            opened.append(
                MeasuredProgram(
                    program,
                    name,
                    process(f"{name} ({program.path})", program.path, inputs[seen]),
                    nulls[answered],
                    sizes,
                    inputs[seen].num_images,
                    data_name(dataset.source),
                )
            )
        with running(list(nulls.values())), running([p.process for p in opened], failures):
            failed = [error.contender for error in failures or ()]
            yield [program for program in opened if program.process not in failed]


def batch_sizes_of(
    programs: Sequence[MeasuredProgram],
    scenario: Scenario,
    budget: TimeBudget,
    progress: Progress,
) -> list[tuple[int, ...]]:
    """Find the batch sizes of each program in a scenario, by a sweep where the fastest counts."""
    sizes = [scenario.batch_sizes(program.batch_sizes) for program in programs]
    return (
        _fastest(programs, sizes, scenario, budget, progress) if scenario.picks_fastest else sizes
    )


def measure(
    programs: Sequence[MeasuredProgram],
    sizes: Sequence[tuple[int, ...]],
    scenario: Scenario,
    budget: TimeBudget,
    progress: Progress,
) -> list[list[MeasuredRow]]:
    """Measure each program at its batch sizes; return the rows of each."""
    pairs = [(p, size) for p, own in zip(programs, sizes, strict=True) for size in own]
    jobs = {(p, size): Job(p.name, p.process, size, budget) for p, size in pairs}
    null_jobs = {(p, size): Job(OVERHEAD, p.null, size, _null_budget(budget)) for p, size in pairs}
    # Programs with the same inputs have one null job.
    measured = measure_jobs([*jobs.values(), *null_jobs.values()], scenario.name, progress)

    def row(p: MeasuredProgram, size: int) -> MeasuredRow:
        overhead_ms = statistics.median(measured[null_jobs[p, size]].samples_ms)
        return MeasuredRow(p, measured[jobs[p, size]], overhead_ms)

    return [[row(p, size) for size in own] for p, own in zip(programs, sizes, strict=True)]


def joined(rows: Sequence[MeasuredRow]) -> MeasuredRow:
    """Make one row of those of a program's processes."""
    parts = [row.measured for row in rows]
    whole = Measured(
        parts[0].batch_size,
        tuple(warm_up for part in parts for warm_up in part.warm_ups),
        tuple(answer for part in parts for answer in part.answers),
    )
    overhead_ms = statistics.median(row.overhead_ms for row in rows)
    return replace(rows[0], measured=whole, overhead_ms=overhead_ms)


def measure_planned(
    programs: Sequence[MeasuredProgram],
    scenario: Scenario,
    budget: TimeBudget,
    bound_ms: float | None,
    progress: Progress,
) -> list[list[MeasuredRow]]:
    """Search for each program the highest rate of images at random times that keeps the bound.

    They take turns, each of which is one rate. Without a bound it is the same for all: some calls
    of the slowest.
    """
    warm_ups = _warm_up(
        [job for p in programs for job in (_single(p, budget), _null_single(p, budget))],
        scenario.name,
        progress,
    )
    alone = _sweep([(p, (1,)) for p in programs], scenario, budget, progress)
    most = [rate[1] for rate in alone]
    bound_ms = bound_ms or float(f"{BOUND_FACTOR * 1e3 / min(most):.2g}")
    searches = {p: RateSearch(rate, bound_ms) for p, rate in zip(programs, most, strict=True)}
    answers: dict[MeasuredProgram, ProgramTurn] = {}
    waiting = list(programs)
    for number in itertools.count():
        for program in waiting:
            search = searches[program]
            rate = search.next_rate
            assert rate is not None
            text = f"{scenario.name}: {format_rate(rate)} images a second, {program.name}"
            progress.begin(text)
            times_s = poisson_times(rate, num_images_of(rate, budget.turn_s), SEED + number)
            answers[program] = program.process.ask("planned", times_s, bound_ms)
            search.note(rate, answers[program].turn, len(times_s))
            progress.done(budget.turn_s)
        waiting = [p for p in reversed(waiting) if searches[p].next_rate is not None]
        if not waiting:
            break
    overheads = {
        p.null: p.null.ask("turn", 1, _null_budget(budget).turn_s).turn.median_ms for p in programs
    }
    progress.write(rates_table(programs, [searches[p].found for p in programs]).aligned_text())
    return [
        [
            MeasuredRow(
                p,
                Measured(1, (warm_ups[_single(p, budget)],), (answers[p],)),
                overheads[p.null],
                searches[p].found,
            )
        ]
        for p in programs
    ]


def rates_table(programs: Sequence[MeasuredProgram], loads: Sequence[ServerLoad]) -> Table:
    """Lay out every rate that was tried, in the order in which it was."""
    columns = ("program", "images/s tried", "answered", "late", "p99 ms", "bound ms", "held")
    rows = tuple(
        (
            program.name,
            format_rate(tried.images_per_s),
            f"{tried.num_images:,}",
            f"{tried.num_late:,}",
            format_ms(tried.p99_ms),
            format_ms(load.bound_ms),
            "yes" if tried.held else "no",
        )
        for program, load in zip(programs, loads, strict=True)
        for tried in load.tried
    )
    return Table(columns, rows, frozenset((columns[0], columns[-1])))


def measure_jobs(jobs: Sequence[Job], scenario: str, progress: Progress) -> dict[Job, Measured]:
    """Warm all jobs up, then let them take turns; all have as many."""
    warm_ups = _warm_up(jobs, scenario, progress)
    num_turns = jobs[0].budget.num_turns

    def turn(job: Job, number: int) -> ProgramTurn:
        progress.begin(f"{scenario}: turn {number + 1} of {num_turns}, {job.name}")
        answer = job.process.ask("turn", job.batch_size, job.budget.turn_s)
        progress.done(job.budget.turn_s * (1 + SETTLING_FRACTION))
        return answer

    answers = take_turns(warm_ups, num_turns, turn)
    return {
        job: Measured(job.batch_size, (warm_ups[job],), tuple(own)) for job, own in answers.items()
    }


def _warm_up(jobs: Sequence[Job], scenario: str, progress: Progress) -> dict[Job, WarmUp]:
    warm_ups: dict[Job, WarmUp] = {}
    for job in dict.fromkeys(jobs):
        progress.begin(f"{scenario}: warm-up, {job.name}")
        window_s, max_s = job.budget.window_s, job.budget.warm_up_s
        warm_ups[job] = job.process.ask("warm_up", job.batch_size, window_s, max_s)
        progress.done(3 * window_s)
    return warm_ups


def _single(program: MeasuredProgram, budget: TimeBudget) -> Job:
    return Job(program.name, program.process, 1, budget)


def _null_single(program: MeasuredProgram, budget: TimeBudget) -> Job:
    return Job(OVERHEAD, program.null, 1, _null_budget(budget))


def planned_s(
    batch_sizes: Sequence[tuple[int, ...]],
    scenarios: Sequence[Scenario],
    budget: TimeBudget,
    num_processes: int,
) -> float:
    """Estimate how long the scenarios, and the sweeps before them, take.

    Args:
        batch_sizes: of each program.
        scenarios: that are measured.
        budget: of a program in a scenario.
        num_processes: that share it.
    """
    seconds = 0.0
    for scenario in scenarios:
        sizes = [scenario.batch_sizes(own) for own in batch_sizes]
        num_sizes = sum(map(len, sizes))
        num_rows = len(batch_sizes) if scenario.picks_fastest else num_sizes
        for part in [budget] if scenario.is_planned else budget.split(num_processes):
            seconds += num_rows * part.planned_s + _null_budget(part).planned_s
        if scenario.picks_fastest and _needs_sweep(sizes):
            seconds += num_sizes * NUM_SWEEPS * _sweep_s(budget)
    return seconds


def sweep_table(programs: Sequence[MeasuredProgram], rates: Sequence[dict[int, float]]) -> Table:
    """Lay out images/s by batch size."""
    sizes = sorted({size for rate in rates for size in rate})
    columns = ("images/s at batch", *map(str, sizes))
    rows = tuple(
        (p.name, *(format_rate(rate[size]) if size in rate else NOTHING for size in sizes))
        for p, rate in zip(programs, rates, strict=True)
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
    rates = _sweep(list(zip(programs, sizes, strict=True)), scenario, budget, progress)
    progress.write(sweep_table(programs, rates).aligned_text())
    return [(max(rate, key=lambda size, rate=rate: rate[size]),) for rate in rates]


def _sweep(
    pairs: Sequence[tuple[MeasuredProgram, tuple[int, ...]]],
    scenario: Scenario,
    budget: TimeBudget,
    progress: Progress,
) -> list[dict[int, float]]:
    # Of each program images/s by batch size.
    def visit(pair: tuple[MeasuredProgram, int], number: int) -> Turn:
        program, size = pair
        text = f"{scenario.name}: sweep {number + 1} of {NUM_SWEEPS}, {program.name}, batch {size}"
        progress.begin(text)
        answer: ProgramTurn = program.process.ask("turn", size, _sweep_s(budget))
        progress.done(_sweep_s(budget))
        return answer.turn

    visits = take_turns(((p, size) for p, own in pairs for size in own), NUM_SWEEPS, visit)
    return [{size: size * _calls_per_s(visits[p, size]) for size in own} for p, own in pairs]


def _sweep_s(budget: TimeBudget) -> float:
    # Of one visit to one batch size.
    return budget.seconds * SWEEP_FRACTION / NUM_SWEEPS


def _calls_per_s(turns: Sequence[Turn]) -> float:
    return sum(len(turn.samples_ms) for turn in turns) / sum(turn.elapsed_s for turn in turns)


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
