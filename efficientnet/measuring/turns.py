"""Waiting processes, a time budget -> their samples, in turns: only one computes at a time."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from efficientnet.measuring.clock import SETTLING_FRACTION, Turn, WarmUp
from efficientnet.measuring.contender import Answer, Worker
from efficientnet.measuring.progress import Progress

# Share of a row's measured time that the sweep gives to each batch size. It comes round twice, so
# that one slow moment of the machine does not choose the batch size.
SWEEP_FRACTION = 0.2
NUM_SWEEPS = 2


@dataclass(frozen=True)
class TimeBudget:
    """How long things take, derived from the seconds measured per row."""

    seconds: float
    num_turns: int

    @property
    def turn_s(self) -> float:
        """Length of a turn."""
        return self.seconds / self.num_turns

    @property
    def window_s(self) -> float:
        """Length of a warm-up's window: a second, less when the row itself is short."""
        return min(1.0, self.seconds / 10)

    @property
    def warm_up_s(self) -> float:
        """Longest warm-up."""
        return 30 * self.window_s

    @property
    def sweep_s(self) -> float:
        """Length of one visit of the sweep to one batch size."""
        return self.seconds * SWEEP_FRACTION / NUM_SWEEPS

    @property
    def planned_s(self) -> float:
        """Time for a warm-up that is stable at once and all turns."""
        return 3 * self.window_s + self.seconds * (1 + SETTLING_FRACTION)


@dataclass(frozen=True)
class Job:
    """A process and what it is to measure."""

    worker: Worker
    batch_size: int
    budget: TimeBudget


@dataclass(frozen=True)
class Measured:
    """What a job gave."""

    batch_size: int
    warm_up: WarmUp
    turns: tuple[Turn, ...]
    peak_memory_bytes: int
    cores_busy_elsewhere: float | None
    """Mean over the turns."""

    @property
    def samples_ms(self) -> tuple[float, ...]:
        """All samples in order."""
        return tuple(sample for turn in self.turns for sample in turn.samples_ms)

    @property
    def turn_medians_ms(self) -> tuple[float, ...]:
        """The median of each turn."""
        return tuple(statistics.median(turn.samples_ms) for turn in self.turns)

    @property
    def num_warmup(self) -> int:
        """Calls that do not count: the warm-up's, and the first ones of each turn."""
        return self.warm_up.num_calls + sum(turn.num_settling_calls for turn in self.turns)

    @property
    def images_per_s(self) -> float:
        """Images divided by the wall time of the turns."""
        num_images = self.batch_size * len(self.samples_ms)
        return num_images / sum(turn.elapsed_s for turn in self.turns)


def measure_in_turns(jobs: Sequence[Job], scenario: str, progress: Progress) -> list[Measured]:
    """Warm all jobs up, then give each of them one turn after the other; all have as many."""
    warm_ups: list[WarmUp] = []
    for job in jobs:
        progress.begin(f"{scenario}: warm-up, {job.worker.name}")
        budget = job.budget
        warm_ups.append(job.worker.warm_up(job.batch_size, budget.window_s, budget.warm_up_s))
        progress.done(3 * budget.window_s)
    answers: list[list[Answer]] = [[] for _ in jobs]
    num_turns = jobs[0].budget.num_turns
    for number in range(num_turns):
        # There and back: a machine that gets slower or faster meanwhile favors nobody.
        indices = range(len(jobs)) if number % 2 == 0 else reversed(range(len(jobs)))
        for index in indices:
            job = jobs[index]
            progress.begin(f"{scenario}: turn {number + 1} of {num_turns}, {job.worker.name}")
            answers[index].append(job.worker.take_turn(job.batch_size, job.budget.turn_s))
            progress.done(job.budget.turn_s * (1 + SETTLING_FRACTION))
    return [
        _measured(job.batch_size, warm_up, own)
        for job, warm_up, own in zip(jobs, warm_ups, answers, strict=True)
    ]


def sweep(
    workers: Sequence[tuple[Worker, tuple[int, ...]]],
    scenario: str,
    budget: TimeBudget,
    progress: Progress,
) -> list[dict[int, float]]:
    """Measure each process at each of its batch sizes; return images/s by batch size."""
    num_images = [dict.fromkeys(batch_sizes, 0) for _, batch_sizes in workers]
    seconds = [dict.fromkeys(batch_sizes, 0.0) for _, batch_sizes in workers]
    for number in range(NUM_SWEEPS):
        for index, (worker, batch_sizes) in enumerate(workers):
            for batch_size in batch_sizes:
                progress.begin(
                    f"{scenario}: sweep {number + 1} of {NUM_SWEEPS}, {worker.name}, "
                    f"batch {batch_size}"
                )
                turn = worker.take_turn(batch_size, budget.sweep_s).turn
                num_images[index][batch_size] += batch_size * len(turn.samples_ms)
                seconds[index][batch_size] += turn.elapsed_s
                progress.done(budget.sweep_s)
    return [
        {batch_size: images[batch_size] / spent[batch_size] for batch_size in images}
        for images, spent in zip(num_images, seconds, strict=True)
    ]


def _measured(batch_size: int, warm_up: WarmUp, answers: Sequence[Answer]) -> Measured:
    elsewhere = [a.cores_busy_elsewhere for a in answers if a.cores_busy_elsewhere is not None]
    return Measured(
        batch_size=batch_size,
        warm_up=warm_up,
        turns=tuple(answer.turn for answer in answers),
        peak_memory_bytes=answers[-1].peak_memory_bytes,
        cores_busy_elsewhere=statistics.fmean(elsewhere) if elsewhere else None,
    )
