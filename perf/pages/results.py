"""The rows of a machine -> one table per scenario, with notes on what is missing or unstable."""

from dataclasses import dataclass, field

from efficientnet.formats.class_accuracy import is_at_chance
from efficientnet.formats.records import Scenario
from efficientnet.measuring.clock import min_samples
from efficientnet.measuring.stability import BELOW_FLOOR, is_below_floor
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
from perf.pages.rows import Group, Row, is_same_machine

SCENARIO_TITLES: dict[Scenario, str] = {
    "single_stream": "Single stream: one image at a time",
    "offline": "Offline: the batch size of the most images a second",
}


def result_tables(group: Group) -> list[tuple[str, Table]]:
    """Lay out each scenario that was measured, with its title."""
    return [
        (SCENARIO_TITLES[scenario], _result_table(group, scenario))
        for scenario in SCENARIO_TITLES
        if group.of(scenario)
    ]


@dataclass
class _Notes:
    """Numbers the footnotes of a table; the same text has the same mark."""

    marks: dict[str, str] = field(default_factory=dict)

    def mark(self, text: str) -> str:
        mark = self.marks.setdefault(text, f"({chr(ord('a') + len(self.marks) % 26)})")
        return mark

    @property
    def lines(self) -> tuple[str, ...]:
        return tuple(f"{mark} {text}." for text, mark in self.marks.items())


def _result_table(group: Group, scenario: Scenario) -> Table:
    is_single = scenario == "single_stream"
    columns = ("variant", "runtime", "precision", "size px", "batch", "threads")
    columns += ("p50 ms", "p90 ms", "p99 ms", "images/s")
    columns += ("time / eager" if is_single else "images/s / eager",)
    columns += ("time / floor",)
    columns += ("top-1 (images)", "balanced", "peak memory", "stable")
    notes = _Notes()
    has_several_data = len({row.accuracy.dataset_sha256 for row in group.rows}) > 1
    rows = tuple(_result_row(row, is_single, has_several_data, notes) for row in group.of(scenario))
    words = frozenset(("variant", "runtime", "precision", "stable"))
    return Table(columns, rows, words, notes.lines)


def _result_row(
    row: Row, is_single: bool, has_several_data: bool, notes: _Notes
) -> tuple[str, ...]:
    latency, accuracy = row.latency, row.accuracy

    def noted(text: str, *reasons: str) -> str:
        return " ".join((text, *(notes.mark(reason) for reason in reasons)))

    def percentile_cell(value: float | None) -> str:
        if value is not None:
            return format_ms(value)
        needed = f"p50 needs {min_samples(50)}, p90 {min_samples(90)}, p99 {min_samples(99):,}"
        return noted(NOTHING, f"too few calls: {needed}; measure longer with `--seconds`")

    ratio = row.time_ratio if is_single else row.rate_ratio
    ratio_cell = format_ratio(ratio)
    if row.eager is None:
        ratio_cell = noted(
            ratio_cell,
            "no ratio: the eager model of the same weights was not measured in the same run, "
            "or its accuracy was not",
        )
    elif ratio is None:
        ratio_cell = percentile_cell(None)
    floor_cell = NOTHING
    if latency.p50_ms and latency.floor_ms:
        floor_cell = format_ratio(latency.p50_ms / latency.floor_ms)
    where: list[str] = []
    if not is_same_machine(latency.environment, accuracy.environment):
        where.append("accuracy measured on another machine or with other versions")
    classes = accuracy.class_accuracy
    if classes and is_at_chance(accuracy.top1, classes.largest_share, accuracy.num_images):
        where.append(
            "not clearly above always naming the largest class, "
            f"{accuracy.class_names[classes.largest]}: "
            f"{format_percent(classes.largest_share)}"
        )
    if has_several_data:
        where.append(f"on the images of {accuracy.data}, {accuracy.dataset_sha256[:7]}")
    return (
        row.label,
        title(latency.runtime, "").strip(),
        latency.precision,
        str(latency.image_size),
        str(latency.batch_size),
        str(latency.num_threads),
        percentile_cell(latency.p50_ms),
        percentile_cell(latency.p90_ms),
        percentile_cell(latency.p99_ms),
        format_rate(latency.throughput_images_per_s),
        ratio_cell,
        noted(floor_cell, BELOW_FLOOR) if is_below_floor(latency) else floor_cell,
        noted(f"{format_percent(accuracy.top1)} ({accuracy.num_images:,})", *where),
        format_percent(classes.balanced) if classes else NOTHING,
        format_bytes(latency.peak_process_memory_bytes),
        noted("no", *row.instabilities) if row.instabilities else "yes",
    )
