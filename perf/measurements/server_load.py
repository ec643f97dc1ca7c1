"""Images at planned times -> latencies from those times; a bound -> the highest rate that keeps it.

MLPerf's server scenario, in its style: images come at random times (Poisson), whether or not those
before them are answered, and 99 of 100 must be answered within a bound. One image a call, in the
order in which they come.
"""

import time
from collections.abc import Callable

import numpy as np

from efficientnet.formats.records import ServerLoad, TriedRate
from efficientnet.measuring.clock import Call, Clock, Turn, min_samples, percentile

PERCENT = 99

# Of a bound that is not given, in calls of the slowest program.
BOUND_FACTOR = 5

# Halvings of what a program does without a pause: the answer is known to 1/64 of that.
NUM_STEPS = 6

# Before the first planned time, since the caches and threads are as another process left them.
NUM_SETTLING_CALLS = 5

# What is left after a sleep, which may end late, is waited for by looking at the clock.
SPIN_NS = 500_000


def num_images_of(rate: float, seconds: float) -> int:
    """Count the images of a plan so long, at least what the percentile needs."""
    return max(min_samples(PERCENT), round(rate * seconds))


def poisson_times(rate: float, num_images: int, seed: int) -> list[float]:
    """Plan when images come, in seconds from the first.

    Of Poisson's processes one that has just so many in their time: with the rate left to chance, a
    thousand images would be 3 % off.
    """
    times = np.sort(np.random.default_rng(seed).uniform(0, num_images / rate, num_images))
    return (times - times[0]).tolist()


def answer_planned(
    call: Call,
    clock: Clock,
    times_s: list[float],
    bound_ms: float,
    sleep: Callable[[float], None] = time.sleep,
) -> Turn:
    """Make a call at each of the times, or at once where the one before ends later.

    A sample is from the planned time to the end of the call: waiting counts. Ends when so many are
    late that the percentile cannot be within the bound any more.

    Args:
        call: of one image.
        clock: see measure_turn.
        times_s: ascending, from 0.
        bound_ms: what is late.
        sleep: time.sleep outside tests.
    """
    for _ in range(NUM_SETTLING_CALLS):
        call()
    samples_ms: list[float] = []
    num_late, most_late = 0, len(times_s) * (100 - PERCENT) // 100
    started = clock()
    for time_s in times_s:
        planned = started + round(time_s * 1e9)
        if (remaining := planned - clock()) > SPIN_NS:
            sleep((remaining - SPIN_NS) / 1e9)
        while clock() < planned:
            pass
        call()
        samples_ms.append((clock() - planned) / 1e6)
        num_late += samples_ms[-1] > bound_ms
        if num_late > most_late:
            break
    return Turn(tuple(samples_ms), (clock() - started) / 1e9, NUM_SETTLING_CALLS)


class RateSearch:
    """Which rate to try next, after those that were tried.

    A bisection between no image a second and `most`, what the program does without a pause; then
    the highest rate that held is tried once more, with other times, and gives way to the next lower
    one if it does not hold again: a search that keeps the best of several looks would keep luck.
    """

    def __init__(self, most: float, bound_ms: float) -> None:
        self.most = most
        self.bound_ms = bound_ms
        self._tried: list[TriedRate] = []

    @property
    def next_rate(self) -> float | None:
        """In images a second; None when the answer is known."""
        steps, confirmations = self._tried[:NUM_STEPS], self._tried[NUM_STEPS:]
        if len(steps) < NUM_STEPS:
            low = max((t.images_per_s for t in steps if t.held), default=0.0)
            high = min((t.images_per_s for t in steps if not t.held), default=self.most)
            return (low + high) / 2
        if confirmations and confirmations[-1].held:
            return None
        refuted = {t.images_per_s for t in confirmations}
        held = [t.images_per_s for t in steps if t.held and t.images_per_s not in refuted]
        return max(held, default=None)

    def note(self, rate: float, turn: Turn, num_planned: int) -> None:
        """Take what came of a rate."""
        samples = turn.samples_ms
        num_late = sum(sample > self.bound_ms for sample in samples)
        p99_ms = percentile(samples, PERCENT)
        self._tried.append(
            TriedRate(
                images_per_s=rate,
                num_images=len(samples),
                num_late=num_late,
                p99_ms=p99_ms,
                held=len(samples) == num_planned and p99_ms is not None and p99_ms <= self.bound_ms,
            )
        )

    @property
    def found(self) -> ServerLoad:
        """The answer, and what was tried for it."""
        last = self._tried[-1]
        return ServerLoad(
            bound_ms=self.bound_ms,
            images_per_s=last.images_per_s if len(self._tried) > NUM_STEPS and last.held else 0.0,
            tried=tuple(self._tried),
        )
