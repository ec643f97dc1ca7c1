"""A call and a clock -> samples in milliseconds, their percentiles, and a warm-up that ends."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Call = Callable[[], object]
Clock = Callable[[], int]

# Below ten samples above it, a percentile is the luck of a few calls: p50 needs 20 samples, p90
# 100, p95 200, p99 1,000.
MIN_SAMPLES_ABOVE = 10

# Wide enough for a shared machine: at 1 % its noise alone would keep every warm-up going.
WARM_UP_TOLERANCE = 0.05
MIN_WARM_UP_WINDOWS = 3

# The first calls of a turn find the caches and the threads as another process left them.
SETTLING_FRACTION = 0.05


@dataclass(frozen=True)
class Summary:
    """Statistics of samples in milliseconds; a percentile of too few samples is None."""

    p50_ms: float | None
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    mean_ms: float
    stdev_ms: float
    min_ms: float
    max_ms: float


@dataclass(frozen=True)
class WarmUp:
    """How many calls a warm-up took, and whether it ended because the times had settled."""

    num_calls: int
    is_stable: bool


@dataclass(frozen=True)
class Turn:
    """The calls of one turn: every sample in order, and the wall time from first to last."""

    samples_ms: tuple[float, ...]
    elapsed_s: float
    num_settling_calls: int
    """Calls at the start of the turn that do not count."""

    @property
    def median_ms(self) -> float:
        """Of however few samples."""
        return statistics.median(self.samples_ms)


def min_samples(percent: int) -> int:
    """Return how many samples a percentile needs."""
    return -(-MIN_SAMPLES_ABOVE * 100 // (100 - percent))


def percentile(samples: Sequence[float], percent: int) -> float | None:
    """Return the sample that `percent` % of all are at or below (nearest rank, never between two).

    None when fewer than ten samples lie above that rank.
    """
    if len(samples) < min_samples(percent):
        return None
    rank = -(-percent * len(samples) // 100)
    return sorted(samples)[rank - 1]


def summarize(samples_ms: Sequence[float]) -> Summary:
    """Compute the statistics of at least one sample; none is taken for an outlier."""
    return Summary(
        p50_ms=percentile(samples_ms, 50),
        p90_ms=percentile(samples_ms, 90),
        p95_ms=percentile(samples_ms, 95),
        p99_ms=percentile(samples_ms, 99),
        mean_ms=statistics.fmean(samples_ms),
        stdev_ms=statistics.stdev(samples_ms) if len(samples_ms) > 1 else 0.0,
        min_ms=min(samples_ms),
        max_ms=max(samples_ms),
    )


def relative_spread(values: Sequence[float]) -> float:
    """Return the largest minus the smallest value, as a fraction of their median."""
    return (max(values) - min(values)) / statistics.median(values)


def measure_turn(call: Call, clock: Clock, seconds: float, settle: bool = True) -> Turn:
    """Call again and again until `seconds` have passed, which the last call may exceed.

    To settle, calls that do not count come first, for a twentieth of the turn, at least one. The
    clock gives nanoseconds, never backwards: time.perf_counter_ns outside tests.
    """
    num_settling_calls = 0
    if settle:
        settled = clock() + round(seconds * SETTLING_FRACTION * 1e9)
        while num_settling_calls == 0 or clock() < settled:
            call()
            num_settling_calls += 1
    samples_ns: list[int] = []
    started = clock()
    end = started + round(seconds * 1e9)
    while True:
        before = clock()
        call()
        after = clock()
        samples_ns.append(after - before)
        if after >= end:
            break
    samples_ms = tuple(sample / 1e6 for sample in samples_ns)
    return Turn(samples_ms, (after - started) / 1e9, num_settling_calls)


def warm_up_until_stable(call: Call, clock: Clock, window_s: float, max_s: float) -> WarmUp:
    """Call in windows of time until the medians of the last two agree, at least three windows.

    A call that takes longer is a window by itself. But for the first, no window is begun that would
    end after `max_s`.
    """
    last_begin = clock() + round((max_s - window_s) * 1e9)
    medians: list[float] = []
    num_calls = 0
    while True:
        window = measure_turn(call, clock, window_s, settle=False)
        num_calls += len(window.samples_ms)
        medians.append(window.median_ms)
        last = medians[-2:]
        is_stable = len(last) > 1 and max(last) - min(last) <= WARM_UP_TOLERANCE * max(last)
        if clock() > last_begin or (is_stable and len(medians) >= MIN_WARM_UP_WINDOWS):
            return WarmUp(num_calls, is_stable)


class TimedCall:
    """A call that is measured in a process of its own, without collections of garbage in it."""

    def __init__(self, call: Call) -> None:
        self._call = call
        gc.disable()

    def warm_up(self, window_s: float, max_s: float) -> WarmUp:
        """See warm_up_until_stable."""
        gc.collect()
        return warm_up_until_stable(self._call, time.perf_counter_ns, window_s, max_s)

    def turn(self, seconds: float) -> Turn:
        """See measure_turn."""
        gc.collect()
        return measure_turn(self._call, time.perf_counter_ns, seconds)
