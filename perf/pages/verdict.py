"""The rows of a machine -> the sentences that a report begins with."""

from collections.abc import Sequence

from efficientnet.formats.class_accuracy import is_at_chance
from efficientnet.reporting.tables import format_ms, format_percent, format_rate, format_ratio
from efficientnet.runtimes.names import EAGER_RUNTIME, RUNTIMES, title
from perf.pages.rows import Group, Row

EAGER = RUNTIMES[EAGER_RUNTIME].title


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
    singles = [r for r in rows if r.latency.scenario == "single_stream" and r.latency.p50_ms]
    compared = [r for r in singles if not r.is_eager and r.time_ratio is not None]
    if compared:
        best = min(compared, key=lambda row: row.time_ratio or 0.0)
        offline = [r for r in rows if _is_same_program(r, best)]
        return _compared(best) + _offline(offline) + _caution([best, *offline])
    if singles:
        best = min(singles, key=lambda row: row.latency.p50_ms or 0.0)
        return _alone(best) + _caution([best])
    best = max(rows, key=lambda row: row.latency.throughput_images_per_s)
    return (
        f"{_name(best)} classifies {format_rate(best.latency.throughput_images_per_s)} images a "
        f"second at batch {best.latency.batch_size} at a top-1 of "
        f"{format_percent(best.accuracy.top1)}; there are too few calls for a median at batch 1."
        + _caution([best])
    )


def _compared(row: Row) -> str:
    assert row.eager is not None
    return (
        f"{_name(row)} takes {format_ratio(row.time_ratio)} of {EAGER}'s time at batch 1 "
        f"({format_ms(row.latency.p50_ms)} ms against {format_ms(row.eager.latency.p50_ms)} ms) "
        f"at {_accuracies(row, row.eager)}."
    )


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


def _offline(rows: Sequence[Row]) -> str:
    for row in rows:
        if row.latency.scenario == "offline" and row.eager and row.rate_ratio is not None:
            own, eager = row.latency, row.eager.latency
            return (
                f" At the best batch size it classifies {format_ratio(row.rate_ratio)} times as "
                f"many images a second ({format_rate(own.throughput_images_per_s)} at batch "
                f"{own.batch_size} against {format_rate(eager.throughput_images_per_s)} at batch "
                f"{eager.batch_size})."
            )
    return ""


def _alone(row: Row) -> str:
    missing = (
        "no artifact of it was measured beside it"
        if row.is_eager
        else "the eager model was not measured in the same run, so there is no ratio"
    )
    return (
        f"{_name(row)} takes {format_ms(row.latency.p50_ms)} ms at batch 1 at a top-1 of "
        f"{format_percent(row.accuracy.top1)}; {missing}."
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
