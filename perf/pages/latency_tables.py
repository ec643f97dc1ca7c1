"""The rows of a machine -> one table per scenario, with notes on what is missing or unstable."""

import string
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from efficientnet.formats.class_accuracy import is_at_chance
from efficientnet.measuring.clock import min_samples
from efficientnet.reporting.tables import (
    NOTHING,
    Table,
    format_bytes,
    format_ms,
    format_percent,
    format_rate,
    format_ratio,
)
from efficientnet.runtimes.names import title
from perf.measurements.scenarios import SCENARIOS, Scenario
from perf.measurements.stability import BELOW_FLOOR, is_below_floor
from perf.pages.rows import Group, Row, is_same_machine


@cache
def result_tables(group: Group) -> list[tuple[str, Table]]:
    """Lay out each scenario that was measured, with its title; of a group once."""
    return [
        (scenario.title, _result_table(group, scenario))
        for scenario in SCENARIOS.values()
        if group.of(scenario)
    ]


@dataclass
class _Notes:
    """Numbers the footnotes of a table; the same text has the same mark."""

    has_several_data: bool
    """Whether the accuracies of its machine are of different images."""
    marks: dict[str, str] = field(default_factory=dict)

    def mark(self, text: str) -> str:
        number = len(self.marks)
        letters = ("", *string.ascii_lowercase)[number // 26 % 27] + string.ascii_lowercase[
            number % 26
        ]
        return self.marks.setdefault(text, f"({letters})")

    def noted(self, text: str, *reasons: str) -> str:
        return " ".join((text, *(self.mark(reason) for reason in reasons)))

    def percentile(self, value: float | None) -> str:
        if value is not None:
            return format_ms(value)
        needed = f"p50 needs {min_samples(50)}, p90 {min_samples(90)}, p99 {min_samples(99):,}"
        return self.noted(NOTHING, f"too few calls: {needed}; measure longer with `--seconds`")

    @property
    def lines(self) -> tuple[str, ...]:
        return tuple(f"{mark} {text}." for text, mark in self.marks.items())


def _result_table(group: Group, scenario: Scenario) -> Table:
    notes = _Notes(len({row.accuracy.dataset_sha256 for row in group.rows}) > 1)
    # The ratio's notes are numbered first.
    order = sorted(scenario.columns, key=lambda column: COLUMNS[column] is not _ratio)
    cells = [
        {column: COLUMNS[column](row, notes) for column in order} for row in group.of(scenario)
    ]
    rows = tuple(tuple(own[column] for column in scenario.columns) for own in cells)
    words = frozenset(("variant", "runtime", "precision", "stable"))
    return Table(scenario.columns, rows, words, notes.lines)


def _ratio(row: Row, notes: _Notes) -> str:
    if row.eager is None:
        return notes.noted(
            NOTHING,
            "no ratio: the eager model of the same weights was not measured in the same run, "
            "or its accuracy was not",
        )
    if row.ratio is None and row.latency.server is not None:
        return notes.noted(NOTHING, "no ratio: the eager model kept the bound at no rate")
    return format_ratio(row.ratio) if row.ratio is not None else notes.percentile(None)


def _floor_ratio(row: Row, notes: _Notes) -> str:
    latency = row.latency
    cell = NOTHING
    if latency.p50_ms and latency.floor_ms:
        cell = format_ratio(latency.p50_ms / latency.floor_ms)
    return notes.noted(cell, BELOW_FLOOR) if is_below_floor(latency) else cell


def _top1(row: Row, notes: _Notes) -> str:
    accuracy = row.accuracy
    where: list[str] = []
    if not is_same_machine(row.latency.environment, accuracy.environment):
        where.append("accuracy measured on another machine or with other versions")
    classes = accuracy.class_accuracy
    if classes and is_at_chance(accuracy.top1, classes.largest_share, accuracy.num_images):
        where.append(
            "not clearly above always naming the largest class, "
            f"{accuracy.class_names[classes.largest]}: "
            f"{format_percent(classes.largest_share)}"
        )
    if notes.has_several_data:
        where.append(f"on the images of {accuracy.data}, {accuracy.dataset_sha256[:7]}")
    return notes.noted(f"{format_percent(accuracy.top1)} ({accuracy.num_images:,})", *where)


def _rate(row: Row, notes: _Notes) -> str:
    record = row.latency
    if record.server is None or record.server.images_per_s > 0:
        return format_rate(record.throughput_images_per_s)
    lowest = min(tried.images_per_s for tried in record.server.tried)
    return notes.noted(
        "none",
        f"p99 was over the bound at every rate that was tried, down to {lowest:.3g} a second",
    )


def _bound(row: Row, _: _Notes) -> str:
    return format_ms(row.latency.server.bound_ms) if row.latency.server else NOTHING


def _balanced(row: Row, _: _Notes) -> str:
    classes = row.accuracy.class_accuracy
    return format_percent(classes.balanced) if classes else NOTHING


def _stable(row: Row, notes: _Notes) -> str:
    return notes.noted("no", *row.instabilities) if row.instabilities else "yes"


COLUMNS: dict[str, Callable[[Row, _Notes], str]] = {
    "variant": lambda row, _: row.label,
    "runtime": lambda row, _: title(row.latency.runtime, "").strip(),
    "precision": lambda row, _: row.latency.precision,
    "size px": lambda row, _: str(row.latency.image_size),
    "batch": lambda row, _: str(row.latency.batch_size),
    "threads": lambda row, _: str(row.latency.num_threads),
    "p50 ms": lambda row, notes: notes.percentile(row.latency.p50_ms),
    "p90 ms": lambda row, notes: notes.percentile(row.latency.p90_ms),
    "p99 ms": lambda row, notes: notes.percentile(row.latency.p99_ms),
    "images/s": _rate,
    "bound ms": _bound,
    "time / eager": _ratio,
    "images/s / eager": _ratio,
    "time / floor": _floor_ratio,
    "top-1 (images)": _top1,
    "balanced": _balanced,
    "peak memory": lambda row, _: format_bytes(row.latency.peak_process_memory_bytes),
    "stable": _stable,
}
