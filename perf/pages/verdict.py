"""The rows of a machine -> the sentences that a report begins with."""

from collections.abc import Sequence

from efficientnet.formats.class_accuracy import is_at_chance
from efficientnet.reporting.tables import format_ms, format_percent, format_rate
from efficientnet.runtimes.names import title
from perf.measurements.scenarios import SCENARIOS, SINGLE_STREAM
from perf.pages.rows import Group, Row


def verdict(group: Group, prefix: str = "") -> list[str]:
    """Say, for each network of a group, how its fastest program compares with the eager model."""
    networks: dict[tuple[str, int, int], list[Row]] = {}
    for row in group.rows:
        key = (row.label, row.latency.image_size, row.latency.num_threads)
        networks.setdefault(key, []).append(row)
    sentences: list[str] = []
    for (label, size, threads), rows in networks.items():
        which = f"{label} at {size} px, {threads} threads: " if len(networks) > 1 else ""
        sentences.append(prefix + which + _about(rows))
    return sentences


def _about(rows: Sequence[Row]) -> str:
    singles = [row for row in rows if row.scenario == SINGLE_STREAM and row.latency.p50_ms]
    compared = [row for row in singles if not row.is_eager and row.ratio is not None]
    if compared:
        best = min(compared, key=lambda row: row.ratio or 0.0)
        same = [row for row in rows if _is_same_program(row, best)]
        return _compared(best) + _in_other_scenarios(same) + _caution([best, *same])
    if singles:
        best = min(singles, key=lambda row: row.latency.p50_ms or 0.0)
        return _alone(best) + _caution([best])
    best = max(rows, key=lambda row: row.latency.throughput_images_per_s)
    return (
        f"{_name(best)} classifies {format_rate(best.latency.throughput_images_per_s)} images a "
        f"second at batch {best.latency.batch_size} at a top-1 of "
        f"{format_percent(best.accuracy.top1)}; there are too few calls for a median "
        f"{SINGLE_STREAM.where}." + _caution([best])
    )


def _compared(row: Row) -> str:
    assert row.eager is not None
    headline = SINGLE_STREAM.headline(row.latency, row.eager.latency)
    return f"{_name(row)} {headline} at {_accuracies(row, row.eager)}."


def _accuracies(row: Row, eager: Row) -> str:
    own, reference = row.accuracy, eager.accuracy
    if own.dataset_sha256 != reference.dataset_sha256:
        return (
            f"a top-1 of {format_percent(own.top1)} "
            f"(eager: {format_percent(reference.top1)}, on other images)"
        )
    if round(own.top1 * own.num_images) == round(reference.top1 * reference.num_images):
        return f"the same top-1 of {format_percent(own.top1)}"
    points = 100 * (own.top1 - reference.top1)
    return (
        f"a top-1 of {format_percent(own.top1)} against {format_percent(reference.top1)} "
        f"({points:+.1f} points)"
    )


def _in_other_scenarios(rows: Sequence[Row]) -> str:
    text = ""
    for scenario in (one for one in SCENARIOS.values() if one != SINGLE_STREAM):
        found = [r for r in rows if r.scenario == scenario and r.eager and r.ratio is not None]
        for row, eager in ((row, row.eager) for row in found[:1] if row.eager):
            if headline := scenario.headline(row.latency, eager.latency):
                text += f" {scenario.where[0].upper()}{scenario.where[1:]} it {headline}."
    return text


def _alone(row: Row) -> str:
    missing = (
        "no artifact of it was measured beside it"
        if row.is_eager
        else "the eager model was not measured in the same run, so there is no ratio"
    )
    return (
        f"{_name(row)} takes {format_ms(row.latency.p50_ms)} ms {SINGLE_STREAM.where} "
        f"at a top-1 of {format_percent(row.accuracy.top1)}; {missing}."
    )


def _caution(rows: Sequence[Row]) -> str:
    references = [row.eager for row in rows if row.eager is not None]
    caution = ""
    own = rows[0].accuracy
    classes = own.class_accuracy
    if classes and is_at_chance(own.top1, classes.largest_share, own.num_images):
        caution += (
            " That top-1 is not clearly above always naming the largest class, "
            f"{own.class_names[classes.largest]}: {format_percent(classes.largest_share)}."
        )
    if any(row.instabilities for row in (*rows, *references)):
        caution += " The measurement is not stable: see the notes under the tables."
    return caution


def _is_same_program(row: Row, other: Row) -> bool:
    one, two = row.latency, other.latency
    return (one.program_sha256, one.runtime) == (two.program_sha256, two.runtime)


def _name(row: Row) -> str:
    name = title(row.latency.runtime, row.latency.precision)
    return name[0].upper() + name[1:]
