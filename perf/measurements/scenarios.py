"""A latency scenario as one object: what it measures of each program, and how that is told.

A new scenario is a Scenario in the tuple at the end; its name is a value of `--scenarios` and of
the records, and measurement, tables, pictures and verdict go by its fields.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from efficientnet.formats.records import LatencyRecord
from efficientnet.reporting.tables import format_ms, format_rate, format_ratio
from efficientnet.runtimes.names import EAGER_RUNTIME, RUNTIMES

EAGER = RUNTIMES[EAGER_RUNTIME].title

PROGRAM = ("variant", "runtime", "precision", "size px", "batch", "threads")
SPEED = ("p50 ms", "p90 ms", "p99 ms", "images/s")
WORTH = ("time / floor", "top-1 (images)", "balanced", "peak memory", "stable")


@dataclass(frozen=True)
class Scenario:
    """One way of asking programs for answers."""

    name: str
    title: str
    """Above its table."""
    where: str
    """Its batch size in words: "at batch 1"."""
    batch_sizes: Callable[[tuple[int, ...]], tuple[int, ...]]
    """Of the sizes that a program is asked for, ascending, those that it is measured at."""
    is_planned: bool
    """Whether images come at random times, and a search finds the most a second that are answered
    within a bound; otherwise a call begins when the one before it has ended."""
    picks_fastest: bool
    """Whether a sweep finds the size of the most images/s, the only one that is measured then;
    otherwise each size is a row of its own."""
    compares: Literal["time", "rate"]
    """With the eager model: the time of a call, or the images a second."""
    columns: tuple[str, ...]
    """Of its table, by their names in perf/pages/latency_tables.py."""
    order: Callable[[LatencyRecord], Any]
    """Sorts the rows of a network, after the eager model's."""
    headline: Callable[[LatencyRecord, LatencyRecord], str]
    """What the verdict says that a program does, beside its eager model; "" = nothing."""


def fastest_first(record: LatencyRecord) -> float:
    """Sort by images a second."""
    return -record.throughput_images_per_s


def time_ratio(record: LatencyRecord, eager: LatencyRecord) -> float | None:
    """Divide the medians of a call; None when one of them has too few samples."""
    if record.p50_ms is None or eager.p50_ms is None:
        return None
    return record.p50_ms / eager.p50_ms


def rate_ratio(record: LatencyRecord, eager: LatencyRecord) -> float | None:
    """Divide the images a second; None where the eager model kept no bound."""
    if eager.throughput_images_per_s == 0:
        return None
    return record.throughput_images_per_s / eager.throughput_images_per_s


def say_time(own: LatencyRecord, eager: LatencyRecord) -> str:
    """Compare the times of a call in words."""
    return (
        f"takes {format_ratio(time_ratio(own, eager))} of {EAGER}'s time at batch "
        f"{own.batch_size} ({format_ms(own.p50_ms)} ms against {format_ms(eager.p50_ms)} ms)"
    )


def say_rate(own: LatencyRecord, eager: LatencyRecord) -> str:
    """Compare the images a second in words."""
    return (
        f"classifies {format_ratio(rate_ratio(own, eager))} times as many images a second "
        f"({format_rate(own.throughput_images_per_s)} at batch {own.batch_size} against "
        f"{format_rate(eager.throughput_images_per_s)} at batch {eager.batch_size})"
    )


def say_load(own: LatencyRecord, eager: LatencyRecord) -> str:
    """Compare the loads that keep the bound in words."""
    if own.server is None:
        return ""
    return (
        f"answers 99 of 100 within {format_ms(own.server.bound_ms)} ms at up to "
        f"{format_rate(own.throughput_images_per_s)} images a second "
        f"({EAGER}: {format_rate(eager.throughput_images_per_s)})"
    )


def of_one_size(name: str, title: str, size: int) -> Scenario:
    """Make a scenario of calls of so many images; programs that do not take them have no row."""
    return Scenario(
        name=name,
        title=title,
        where=f"at batch {size}",
        # One image is what every program takes, whatever sizes are tried for offline.
        batch_sizes=lambda asked: (size,) if size == 1 or size in asked else (),
        is_planned=False,
        picks_fastest=False,
        compares="time",
        columns=(*PROGRAM, *SPEED, "time / eager", *WORTH),
        order=fastest_first,
        headline=say_time,
    )


SINGLE_STREAM = of_one_size("single_stream", "Single stream: one image at a time", 1)
MULTI_STREAM = of_one_size("multi_stream", "Multi stream: eight images at a time", 8)
BATCH16 = of_one_size("batch16", "Batch 16, as the EfficientNetV2 paper measures", 16)

OFFLINE = Scenario(
    name="offline",
    title="Offline: the batch size of the most images a second",
    where="at the best batch size",
    batch_sizes=lambda asked: asked,
    is_planned=False,
    picks_fastest=True,
    compares="rate",
    columns=(*PROGRAM, *SPEED, "images/s / eager", *WORTH),
    order=fastest_first,
    headline=say_rate,
)

SERVER = Scenario(
    name="server",
    title="Server: the most images a second, at random times, whose p99 stays within a bound",
    where="at random times",
    batch_sizes=lambda _: (1,),
    is_planned=True,
    picks_fastest=False,
    compares="rate",
    # No time / floor: these times have waiting in them.
    columns=(*PROGRAM, "bound ms", "images/s", *SPEED[:-1], "images/s / eager", *WORTH[1:]),
    order=fastest_first,
    headline=say_load,
)

# In the order in which they are measured and shown.
SCENARIOS = {
    scenario.name: scenario for scenario in (SINGLE_STREAM, MULTI_STREAM, BATCH16, OFFLINE, SERVER)
}

if TYPE_CHECKING:
    ScenarioName = str
else:  # what --help lists
    ScenarioName = Literal[tuple(SCENARIOS)]
