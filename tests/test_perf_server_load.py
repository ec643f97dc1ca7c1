import itertools
import math
import shutil
from pathlib import Path

import pytest
from commands import run
from facts import raises_naming

from efficientnet.formats.records import LatencyRecord, read_records
from efficientnet.measuring.clock import Turn, percentile
from perf.measurements.config import LatencyConfig
from perf.measurements.server_load import (
    NUM_STEPS,
    RateSearch,
    answer_planned,
    num_images_of,
    poisson_times,
)

FLAGS = ["--seconds", "0.2", "--turns", "3", "--threads", "1"]
FLAGS += ["--scenarios", "server", "--bound-ms", "2000"]


class Machine:
    """A clock that a look at costs a microsecond, and calls that take a time of their own."""

    def __init__(self, call_ms: float) -> None:
        self.now_ns = 0
        self.num_calls = 0
        self._call_ns = round(call_ms * 1e6)

    def clock(self) -> int:
        self.now_ns += 1000
        return self.now_ns

    def sleep(self, seconds: float) -> None:
        self.now_ns += round(seconds * 1e9)

    def call(self) -> None:
        self.num_calls += 1
        self.now_ns += self._call_ns

    def answer(self, times_s: list[float], bound_ms: float = math.inf) -> Turn:
        return answer_planned(self.call, self.clock, times_s, bound_ms, self.sleep)


def search(call_ms: float, bound_ms: float, seed: int = 0) -> RateSearch:
    rates = RateSearch(1e3 / call_ms, bound_ms)
    number = 0
    while (rate := rates.next_rate) is not None:
        times_s = poisson_times(rate, num_images_of(rate, 0.1), seed + number)
        rates.note(rate, Machine(call_ms).answer(times_s, bound_ms), len(times_s))
        number += 1
    return rates


def test_latency_counts_from_the_planned_time_with_the_waiting():
    turn = Machine(10).answer([0.0, 0.001, 0.002, 1.0])

    assert turn.samples_ms == pytest.approx((10, 19, 28, 10), abs=0.1)


def test_a_call_is_not_made_before_its_time():
    machine = Machine(10)

    machine.answer([0.0, 0.5])

    assert machine.now_ns >= 0.5e9


def test_a_rate_is_given_up_once_p99_cannot_be_within_the_bound():
    turn = Machine(10).answer([0.0] * 1000, bound_ms=55)

    # Five are within the bound, ten late ones are allowed.
    assert len(turn.samples_ms) == 5 + 11


def test_times_are_random_with_just_so_many_images_in_their_time():
    times_s = poisson_times(100, 1000, seed=1)
    gaps = [after - before for before, after in itertools.pairwise(times_s)]

    assert times_s == sorted(times_s) and times_s[0] == 0
    assert times_s[-1] == pytest.approx(10, rel=0.01)
    # Of exponential gaps 1 of e is longer than the mean.
    assert sum(gap > 0.01 for gap in gaps) / len(gaps) == pytest.approx(1 / math.e, abs=0.05)
    assert times_s == poisson_times(100, 1000, seed=1) != poisson_times(100, 1000, seed=2)


def test_no_rate_has_fewer_images_than_p99_needs():
    assert num_images_of(1, 1) == 1000
    assert num_images_of(1000, 10) == 10_000


@pytest.mark.parametrize("seed", range(5))
def test_the_rate_that_is_found_is_the_queue_theorys(seed: int):
    # Images at random times and calls of 10 ms: p99 of the wait and the call is 50 ms at a use of
    # 0.57 (M/D/1), which a thousand images a rate tell to a tenth.
    found = search(10, 50, seed).found

    assert 0.45 * 100 < found.images_per_s < 0.6 * 100


def test_every_rate_that_was_tried_is_told_and_the_last_confirms_the_answer():
    found = search(10, 50).found

    assert len(found.tried) > NUM_STEPS
    assert found.tried[0].images_per_s == pytest.approx(50)
    assert found.tried[-1].held and found.tried[-1].images_per_s == found.images_per_s
    assert found.images_per_s in [tried.images_per_s for tried in found.tried[:NUM_STEPS]]
    for tried in found.tried:
        assert tried.held == (tried.num_images >= 1000 and tried.num_late <= 10)


def test_a_rate_that_does_not_hold_again_gives_way_to_the_next_lower_one():
    rates = RateSearch(64.0, 50)
    good, bad = Turn((10.0,) * 1000, 1, 0), Turn((99.0,) * 11, 1, 0)
    for turn in (good, good, bad, bad, bad, bad):
        rates.note(rates.next_rate or 0, turn, 1000)
    assert rates.next_rate == 48
    rates.note(48, bad, 1000)
    assert rates.next_rate == 32
    rates.note(32, good, 1000)

    assert rates.next_rate is None
    assert rates.found.images_per_s == 32


def test_a_bound_below_a_call_is_kept_by_no_rate():
    found = search(10, 9).found

    assert found.images_per_s == 0
    assert [tried.held for tried in found.tried] == [False] * NUM_STEPS
    assert found.tried[-1].p99_ms is None


def test_the_command_measures_all_programs_at_one_bound(tiny_artifact: Path, tmp_path: Path):
    other = shutil.copytree(tiny_artifact, tmp_path / "other")
    # A bound that holds whatever else runs meanwhile.
    done = run("perf/latency.py", tiny_artifact, other, *FLAGS, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    records = read_records(tmp_path / "reports" / "latency.jsonl", LatencyRecord)
    assert len(records) == 2
    assert "images/s tried" in done.stderr
    for record in records:
        assert record.server is not None and record.server.bound_ms == 2000
        assert (record.scenario, record.batch_size) == ("server", 1)
        assert record.throughput_images_per_s == record.server.images_per_s
        assert record.num_iterations == record.server.tried[-1].num_images
        assert isinstance(record.samples_ms, tuple)
        assert record.p99_ms == percentile(record.samples_ms, 99)


def test_a_bound_belongs_to_its_scenario_and_is_above_zero():
    with raises_naming(ValueError, "--bound-ms", 20, "server"):
        LatencyConfig(bound_ms=20)
    with raises_naming(ValueError, "--bound-ms", 0):
        LatencyConfig(bound_ms=0, scenarios=("server",))
