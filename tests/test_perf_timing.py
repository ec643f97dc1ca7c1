import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import pytest

from efficientnet.measuring.clock import (
    measure_turn,
    min_samples,
    percentile,
    relative_spread,
    summarize,
    warm_up_until_stable,
)
from efficientnet.measuring.turns import TimeBudget, measure_calls, ratio, take_turns

MS = 1_000_000


class FakeClock:
    """Stands still but for the calls, each of which takes the next of the given durations."""

    def __init__(self, call_ms: Iterable[float]) -> None:
        self.now_ns = 0
        self.num_calls = 0
        self._call_ms: Iterator[float] = iter(call_ms)

    def __call__(self) -> int:
        return self.now_ns

    def call(self) -> None:
        self.num_calls += 1
        self.now_ns += round(next(self._call_ms) * MS)


def repeat(*values: float) -> Iterator[float]:
    while True:
        yield from values


def test_a_percentile_is_a_sample_that_was_measured():
    samples = [float(value) for value in range(1000, 0, -1)]
    assert [percentile(samples, percent) for percent in (50, 90, 95, 99)] == [500, 900, 950, 990]


@pytest.mark.parametrize(("percent", "needed"), [(50, 20), (90, 100), (95, 200), (99, 1000)])
def test_a_percentile_needs_ten_samples_above_it(percent: int, needed: int):
    assert min_samples(percent) == needed
    assert percentile([1.0] * (needed - 1), percent) is None
    assert percentile([1.0] * needed, percent) == 1.0


def test_a_summary_keeps_outliers_and_needs_one_sample():
    summary = summarize([1.0] * 99 + [101.0])
    assert (summary.p50_ms, summary.p90_ms, summary.p95_ms, summary.p99_ms) == (1, 1, None, None)
    assert (summary.mean_ms, summary.min_ms, summary.max_ms) == (2.0, 1.0, 101.0)
    assert summary.stdev_ms == pytest.approx(10.0)
    single = summarize([3.0])
    assert (single.mean_ms, single.stdev_ms, single.p50_ms) == (3.0, 0.0, None)


def test_the_spread_is_relative_to_the_median():
    assert relative_spread([9.0, 10.0, 12.0]) == pytest.approx(0.3)


def test_a_turn_keeps_every_sample_in_order():
    clock = FakeClock([5, 1, 2, 3, 4])
    turn = measure_turn(clock.call, clock, seconds=0.010)
    assert turn.samples_ms == (1, 2, 3, 4)
    assert turn.elapsed_s == pytest.approx(0.010)
    assert turn.num_settling_calls == 1


def test_a_turn_has_at_least_one_call_however_long_it_takes():
    clock = FakeClock([9000, 8000])
    turn = measure_turn(clock.call, clock, seconds=0.5)
    assert turn.samples_ms == (8000,)
    assert turn.elapsed_s == pytest.approx(8)


def test_the_calls_at_the_start_of_a_turn_do_not_count():
    clock = FakeClock(repeat(1))
    turn = measure_turn(clock.call, clock, seconds=0.2)
    assert turn.num_settling_calls == 10
    assert len(turn.samples_ms) == 200
    assert clock.num_calls == 210


def test_the_warm_up_ends_after_three_windows_when_the_times_are_steady():
    clock = FakeClock(repeat(10))
    warm_up = warm_up_until_stable(clock.call, clock, window_s=1, max_s=30)
    assert warm_up.is_stable
    assert warm_up.num_calls == 300


def test_the_warm_up_goes_on_until_two_windows_agree():
    falling = [40] * 25 + [30] * 33 + [20] * 50 + [10] * 300
    clock = FakeClock(falling)
    warm_up = warm_up_until_stable(clock.call, clock, window_s=1, max_s=30)
    assert warm_up.is_stable
    assert 25 + 33 + 50 + 100 < warm_up.num_calls < len(falling)


def test_a_warm_up_that_never_settles_ends_in_time_and_says_so():
    clock = FakeClock(value for _ in range(100) for value in [10] * 100 + [20] * 50)
    warm_up = warm_up_until_stable(clock.call, clock, window_s=1, max_s=6)
    assert not warm_up.is_stable
    assert clock.now_ns <= 6_000 * MS


def test_a_call_longer_than_a_window_is_a_window():
    clock = FakeClock(repeat(15_000))
    warm_up = warm_up_until_stable(clock.call, clock, window_s=1, max_s=30)
    assert warm_up.is_stable
    assert warm_up.num_calls == 2


def test_contenders_take_turns_there_and_back():
    seen: list[str] = []

    def turn(name: str, number: int) -> str:
        seen.append(name)
        return f"{name}{number}"

    found = take_turns(["a", "b", "c"], 3, turn)
    assert "".join(seen) == "abccbaabc"
    assert found == {name: [f"{name}{number}" for number in range(3)] for name in "abc"}


def test_a_ratio_is_taken_within_turns():
    # The machine slows down threefold in the second half.
    assert ratio([9, 9, 27, 33], [10, 10, 30, 30]) == (0.9, 0.9, 1.1)
    with pytest.raises(ValueError, match="shorter"):
        ratio([2.0, 9.0], [4.0])


def sleeper(seconds: float) -> Callable[[], object]:
    return partial(time.sleep, seconds)


@pytest.mark.usefixtures("own_processes")
def test_calls_of_several_processes_are_compared():
    openers = {name: partial(sleeper, s) for name, s in (("long", 0.02), ("short", 0.0))}
    turns = measure_calls(openers, TimeBudget(seconds=0.1, num_turns=3))
    assert [len(turns[name]) for name in ("long", "short")] == [3, 3]
    # No call is done before it slept; so much of a time is certain.
    assert min(turns["long"]) >= 20 > 0 < min(turns["short"])


def test_parts_of_a_budget_have_all_its_turns_each_as_long_and_its_windows():
    whole = TimeBudget(seconds=8.0, num_turns=8)
    parts = whole.split(3)
    assert [part.num_turns for part in parts] == [3, 3, 2]
    assert {part.turn_s for part in parts} == {1.0}
    assert max(part.window_s for part in parts) <= 1.0
    assert TimeBudget(6.0, 6).split(1) == [TimeBudget(6.0, 6)]
    assert {part.window_s for part in TimeBudget(6.0, 6).split(3)} == {TimeBudget(6.0, 6).window_s}
