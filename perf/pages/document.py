"""Rows -> what a report says, in order: verdict, tables, how it was measured, environment."""

from collections.abc import Sequence
from dataclasses import dataclass

from efficientnet.formats.records import LatencyRecord, TriedRate
from efficientnet.machine.environment import EnvironmentRecord
from efficientnet.measuring.clock import WARM_UP_TOLERANCE, min_samples, relative_spread
from efficientnet.reporting.class_table import class_table
from efficientnet.reporting.tables import (
    Table,
    format_bytes,
    format_ms,
    format_percent,
    format_rate,
)
from efficientnet.runtimes.names import title
from perf.measurements.stability import MAX_BUSY_ELSEWHERE, MAX_TURN_SPREAD
from perf.pages.latency_tables import result_tables
from perf.pages.rows import Group, Joined, Row, command_for_accuracy
from perf.pages.verdict import verdict

# Whoever reads more sentences than these looks at the tables instead.
MAX_VERDICTS = 12

MAX_LISTED = 50

TIME_ONLY = "Time only: unverified"

# Tan and Le 2021, table 7, V100, FP16, batch 16: milliseconds, and top-1 of ImageNet in %.
PAPER = (("V2-S", 24, 83.9), ("V2-M", 57, 85.1), ("V2-L", 98, 85.7))


@dataclass(frozen=True)
class Section:
    """A heading, and under it paragraphs, a list or a table."""

    heading: str
    paragraphs: tuple[str, ...] = ()
    bullets: tuple[str, ...] = ()
    table: Table | None = None
    is_rows: bool = False
    """Whether it is of single programs, which the page's script shows in a way of its own."""


@dataclass(frozen=True)
class Document:
    """A report before it is Markdown or HTML. Text between backticks is code."""

    heading: str
    subtitle: str
    verdict: tuple[str, ...]
    sections: tuple[Section, ...]


def build_document(joined: Joined, problems: Sequence[str] = ()) -> Document:
    """Write the report on at least one row.

    Args:
        joined: the rows.
        problems: what could not be read.
    """
    rows = [row for group in joined.groups for row in group.rows]
    machines = " / ".join(dict.fromkeys(machine_name(g.environment) for g in joined.groups))
    variants = ", ".join(
        dict.fromkeys(f"{row.label} at {row.latency.image_size} px" for row in rows)
    )
    sections: list[Section] = []
    for number, group in enumerate(joined.groups, start=1):
        suffix = f", machine {number}" if len(joined.groups) > 1 else ""
        sections += _result_sections(group, suffix)
        sections += _rate_sections(group, suffix)
        sections += _class_sections(group, suffix)
    if joined.unverified:
        sections.append(_time_only_section(joined.unverified))
    if problems:
        sections.append(Section("Left out: not readable", bullets=tuple(problems[:MAX_LISTED])))
    sections.append(_method_section(rows))
    for number, group in enumerate(joined.groups, start=1):
        suffix = f", machine {number}" if len(joined.groups) > 1 else ""
        sections.append(Section("Environment" + suffix, table=_environment_table(group)))
        sections.append(
            Section("Rows in detail" + suffix, table=_detail_table(group), is_rows=True)
        )
    sections += _paper_sections(rows)
    return Document(
        "Latency and accuracy",
        f"{variants}; measured {_dates(rows)} on {machines}",
        _verdicts(joined.groups),
        tuple(sections),
    )


def _verdicts(groups: Sequence[Group]) -> tuple[str, ...]:
    sentences = [
        sentence
        for number, group in enumerate(groups, start=1)
        for sentence in verdict(group, f"On {_place(number, group)}: " if len(groups) > 1 else "")
    ]
    rest = len(sentences) - MAX_VERDICTS
    if rest > 0:
        sentences[MAX_VERDICTS:] = [f"{rest:,} networks more: see the tables."]
    return tuple(sentences)


def machine_name(environment: EnvironmentRecord) -> str:
    """Name a machine by what computes: GPUs if there are any, and the CPU."""
    gpus = "".join(f"{gpu.partition(',')[0]}, " for gpu in environment.gpus)
    return f"{gpus}{environment.processor} ({environment.num_cores} cores)"


def _place(number: int, group: Group) -> str:
    return f"machine {number}, {machine_name(group.environment)}"


def _dates(rows: Sequence[Row]) -> str:
    days = sorted({f"{row.latency.started_at:%Y-%m-%d}" for row in rows})
    return f"{days[0]} UTC" if len(days) == 1 else f"{days[0]} to {days[-1]} UTC"


def _result_sections(group: Group, suffix: str) -> list[Section]:
    return [
        Section(heading + suffix, table=table, is_rows=True)
        for heading, table in result_tables(group)
    ]


def _rate_sections(group: Group, suffix: str) -> list[Section]:
    # Every rate that was tried, in order.
    bullets = tuple(
        f"{row.label} {title(row.latency.runtime, row.latency.precision)}, within "
        f"{format_ms(row.latency.server.bound_ms)} ms: "
        + "; ".join(map(_tried, row.latency.server.tried))
        for row in group.rows
        if row.latency.server
    )
    if not bullets:
        return []
    paragraph = (
        "A bisection, and at the end the highest rate that held once more, with other times; if "
        "it does not hold again, the next lower one. A rate is given up when more images are late "
        "than p99 allows. One image a call, in the order in which they come; latency counts from "
        "the planned time."
    )
    return [Section("Rates that were tried" + suffix, (paragraph,), bullets)]


def _tried(rate: TriedRate) -> str:
    rest = (
        f"p99 {format_ms(rate.p99_ms)} ms"
        if rate.held
        else f"{rate.num_late:,} of {rate.num_images:,} late"
    )
    return f"{format_rate(rate.images_per_s)}/s {'held' if rate.held else 'did not'} ({rest})"


def _class_sections(group: Group, suffix: str) -> list[Section]:
    # Of the eager model, or else the first program, of each network.
    sections: dict[str, Section] = {}
    for row in sorted(group.rows, key=lambda row: not row.is_eager):
        record, classes = row.accuracy, row.accuracy.class_accuracy
        if classes is None or row.label in sections:
            continue
        names = record.class_names
        program = title(record.runtime, record.precision)
        sections[row.label] = Section(
            f"Classes of {row.label}{suffix}",
            paragraphs=(
                f"Recall, of {program}: the part of a class's images that is given that class; its "
                f"mean, the balanced accuracy, is {format_percent(classes.balanced)}. Always "
                f"naming the largest class, {names[classes.largest]}, would have "
                f"{format_percent(classes.largest_share)} top-1.",
            ),
            table=class_table(classes, names),
        )
    return list(sections.values())


def _time_only_section(unverified: Sequence[LatencyRecord]) -> Section:
    return Section(
        TIME_ONLY,
        paragraphs=(
            "No accuracy was measured of these programs, and their weights may be random: the "
            "times hold, and are no reason to choose one. Nothing above is compared with them.",
        ),
        bullets=tuple(
            dict.fromkeys(
                f"{record.variant} {title(record.runtime, record.precision)} "
                f"(program {record.program_sha256[:7]}): run `{command_for_accuracy(record)}`"
                for record in unverified[:MAX_LISTED]
            )
        ),
        table=time_only_table(unverified),
    )


def time_only_table(unverified: Sequence[LatencyRecord]) -> Table:
    """Lay out the speeds that have no accuracy, with the machine: it may be another for each."""
    columns = ("variant", "runtime", "precision", "scenario", "size px", "batch", "threads")
    columns += ("p50 ms", "p90 ms", "images/s", "top-1", "machine")
    rest = len(unverified) - MAX_LISTED
    return Table(
        columns,
        tuple(
            (
                record.variant,
                title(record.runtime, "").strip(),
                record.precision,
                record.scenario.replace("_", " "),
                str(record.image_size),
                str(record.batch_size),
                str(record.num_threads),
                format_ms(record.p50_ms),
                format_ms(record.p90_ms),
                format_rate(record.throughput_images_per_s),
                "unverified",
                machine_name(record.environment),
            )
            for record in unverified[:MAX_LISTED]
        ),
        frozenset((*columns[:4], "top-1", "machine")),
        (f"{rest:,} more are not listed.",) if rest > 0 else (),
    )


def _method_section(rows: Sequence[Row]) -> Section:
    latencies = [row.latency for row in rows]
    data = ", ".join(dict.fromkeys(record.data for record in latencies))
    images = _span([record.num_input_images for record in latencies])
    overhead = _span([record.harness_overhead_ms for record in latencies])
    regions = {
        "end_to_end": "`end_to_end`, one call from float32 images in host memory to logits in host "
        "memory; decoding and preprocessing are not in it",
        "compute": "`compute`, one call with images and logits on the device",
    }
    region = "; ".join(dict.fromkeys(regions[record.timed_region] for record in latencies))
    peaks = "; ".join(dict.fromkeys(r.device_peak for r in latencies if r.device_peak)) or "unknown"
    clocks = ", ".join(dict.fromkeys(f"`{record.clock}`" for record in latencies))
    counts = sorted({record.num_processes for record in latencies})
    several = " or ".join(map(str, counts))
    processes = (
        f"{several} processes of its own, one after the other"
        if counts[-1] > 1
        else "a process of its own"
    )
    return Section(
        "How it was measured",
        bullets=(
            f"Timed region: {region}.",
            f"Clock: {clocks}. Images/s are images divided by the wall time of the turns.",
            f"Processes: each row in {processes}. They take turns, so that only one "
            "computes at a time and all see the same machine.",
            "Warm-up: until the medians of the last two windows of time agree within "
            f"{format_percent(WARM_UP_TOLERANCE, 0)}; the first calls of each turn do not count "
            "either.",
            f"Inputs: {images} different held-out images of {data} for each row, in rotation: no "
            "call sees the images of the call before it.",
            f"Percentiles: nearest rank, with at least ten samples above (p50 {min_samples(50)} "
            f"calls, p90 {min_samples(90)}, p99 {min_samples(99):,}). No sample is removed; all "
            "are kept in `latency.jsonl`, or in a `.npy` file that it names.",
            f"Harness overhead: {overhead} ms a call, the median of a runtime that computes "
            "nothing, but reads its images once to refuse NaN, as all do; it is contained in the "
            "times.",
            "A row is not stable when its warm-up did not settle, the medians of its turns differ "
            f"by more than {format_percent(MAX_TURN_SPREAD, 0)}, or other programs kept more than "
            f"{format_percent(MAX_BUSY_ELSEWHERE, 0)} of the cores busy.",
            f"Time / floor: p50 over what the device could not beat, the longer of computing all "
            f"multiply-adds and reading all weights once. Peak: {peaks}.",
            "Peak memory: resident memory of the process, without the input images.",
        ),
    )


def _span(values: Sequence[float]) -> str:
    low, high = format_ms(min(values)), format_ms(max(values))
    return low if low == high else f"{low} to {high}"


def _environment_table(group: Group) -> Table:
    environment = group.environment
    commits = dict.fromkeys(row.latency.environment.git_commit or "unknown" for row in group.rows)
    rows = (
        ("CPU", environment.processor),
        ("cores", str(environment.num_cores)),
        ("memory", format_bytes(environment.memory_bytes)),
        ("GPU", "; ".join(environment.gpus) or "none: GPU rows are not measured"),
        ("system", environment.system),
        ("Python", environment.python),
        ("libraries", ", ".join(f"{k} {v}" for k, v in environment.libraries.items())),
        ("commit", ", ".join(commits)),
        ("date", _dates(group.rows)),
    )
    return Table(("", "value"), rows, frozenset(("", "value")))


def _detail_table(group: Group) -> Table:
    columns = ("row", "scenario", "calls", "warm-up calls", "turns", "turns differ by", "p95 ms")
    columns += ("mean ms", "measured (UTC)", "accuracy (UTC)", "program", "weights")
    rows = tuple(
        (
            f"{row.label} {title(row.latency.runtime, row.latency.precision)}",
            row.latency.scenario.replace("_", " "),
            f"{row.latency.num_iterations:,}",
            f"{row.latency.num_warmup:,}",
            str(row.latency.num_turns),
            format_percent(relative_spread(row.latency.turn_p50_ms), 0),
            format_ms(row.latency.p95_ms),
            format_ms(row.latency.mean_ms),
            f"{row.latency.started_at:%Y-%m-%d %H:%M}",
            f"{row.accuracy.started_at:%Y-%m-%d %H:%M}",
            row.latency.program_sha256[:7],
            row.latency.checkpoint_sha256[:7],
        )
        for row in group.rows
    )
    return Table(columns, rows, frozenset(("row", "scenario", "program", "weights")))


def _paper_sections(rows: Sequence[Row]) -> list[Section]:
    is_measured = any(
        any("V100" in gpu for gpu in row.latency.environment.gpus)
        and row.latency.precision == "fp16"
        and row.latency.batch_size == 16
        for row in rows
    )
    if is_measured:
        return []
    points = ", ".join(f"{name} {ms} ms" for name, ms, _ in PAPER)
    line = f"{points} (Tan and Le 2021, table 7: V100, FP16, batch 16): not measured here: no V100."
    return [Section("The paper's latency", paragraphs=(line,))]
