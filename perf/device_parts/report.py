"""Records of a folder -> report.md."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median
from typing import Any

from efficientnet.measuring.turns import ratio
from efficientnet.network.variants import get_variant
from efficientnet.reporting import tables
from efficientnet.reporting.tables import NOTHING, Table, format_percent, format_ratio
from perf.device_parts import records
from perf.device_parts.records import LatencyMeasured, Line, TrainingMeasured, ends_by_job

PAPER_VARIANTS = ("v2-s", "v2-m", "v2-l")
PAPER_BATCH_SIZE, PAPER_PRECISION = 16, "fp16"
PAPER_COLUMN = "the paper's ms (V100, another device)"

PRECISION_ORDER = ("fp16", "bf16", "fp32")

DRY_RUN = (
    "**A dry run: on a CPU, with the smallest networks and few repetitions. No number here means "
    "anything.**"
)
HOW = """## How the networks were measured

- p50, p90: a call that waits for the device before and after, with other images than the one
  before; the programs of a job take turns. p90 only of 100 calls or more.
- / eager: median of the turns' ratios to the eager model that took turns with it, in the same
  precision and region; below 1 is faster.
- region: images and logits are float32, on the device or in host memory; changing the format is
  part of a call, and of a CUDA graph the copy of the images into it. fp32 is without TF32.
- batch (best): of most images/s of the eager model; 64 where the part network has not told.
- rel. error, top-1 alike: 64 images beside eager float32; the largest error of a logit, in standard
  deviations of all logits, and how many images have the same best class.
- ready in s: building, compiling, capturing, and the first call; not the export of an artifact.
- Weights are random, batch norm settled on real images: the classes are close to each other, and
  top-1 differs sooner than of trained weights, whose tolerances refuse exports here, too."""

Cells = dict[str, Callable[[Any], str]]
"""A table's columns: what each tells of a record."""


def document(lines: Sequence[Line]) -> str:
    """Write the report of all that is there so far."""
    calls = [line for line in lines if isinstance(line, records.CallStart)]
    parts = [_head(calls), _jobs(lines)]
    latencies = latest(line for line in lines if isinstance(line, LatencyMeasured))
    parts += [_tests(lines), _limits(lines), _paper(latencies)]
    parts += [_variant(name, latencies) for name in dict.fromkeys(x.variant for x in latencies)]
    if latencies:
        parts.append(HOW)
    parts += [_training(lines), _loader(lines), _problems(lines)]
    return "\n\n".join(filter(None, parts)) + "\n"


def latest(latencies: Iterable[LatencyMeasured]) -> list[LatencyMeasured]:
    """Keep the last of those that measure the same; one with times before one with a problem."""
    found: dict[tuple[object, ...], LatencyMeasured] = {}
    for x in latencies:
        key = (x.job, x.variant, x.method, x.precision, x.batch_size, x.region)
        if key not in found or x.problem is None or found[key].problem is not None:
            found[key] = x
    return list(found.values())


def _head(calls: Sequence[records.CallStart]) -> str:
    call = calls[-1]
    environment = call.environment
    versions = environment.libraries
    named = ("torch", "triton", "torchvision", "onnxruntime", "onnxruntime-gpu", "tensorrt")
    named += ("tensorrt_rtx", "numpy")
    libraries = ", ".join(f"{name} {versions[name]}" for name in named if name in versions)
    facts = [
        ("device", call.device),
        ("compute capability", call.compute_capability or NOTHING),
        ("GPU, memory, driver", "; ".join(environment.gpus) or NOTHING),
        ("CUDA and cuDNN of torch", f"{call.cuda or NOTHING}, {call.cudnn or NOTHING}"),
        ("libraries", libraries),
        ("Python, system", f"{environment.python}, {environment.system}"),
        ("CPU", f"{environment.processor}, {environment.num_cores} cores"),
        ("commit", environment.git_commit or "unknown"),
        ("calls (UTC)", ", ".join(f"{c.started_at:%Y-%m-%d %H:%M:%S}" for c in calls)),
    ]
    table = Table(("", " "), tuple(facts), frozenset(("", " "))).markdown()
    title = f"# {call.device}: what a call of perf/device.py found\n"
    return "\n".join([title, *([DRY_RUN, ""] if call.is_dry_run else []), table])


JOB_CELLS: Cells = {
    "job": lambda x: x.job,
    "status": lambda x: x.status,
    "why": lambda x: x.reason or NOTHING,
    "s": lambda x: f"{x.seconds:.0f}",
}


def _jobs(lines: Sequence[Line]) -> str:
    ends = ends_by_job(lines).values()
    if not ends:
        return "## Jobs\n\nNone has ended yet."
    counts = Counter(end.status for end in ends)
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    if not counts.keys() <= set(records.FINAL):
        summary += (
            ". The same call with this folder as --output does what is not done. What a job "
            "measured before it ended is below"
        )
    return f"## Jobs\n\n{summary}.\n\n{_table(ends, JOB_CELLS)}"


def _tests(lines: Sequence[Line]) -> str:
    tests = [line for line in lines if isinstance(line, records.PytestMeasured)]
    if not tests:
        return ""
    last = tests[-1]
    counts = Counter(last.outcomes.values())
    summary = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    text = f"## Tests that need a GPU\n\n{summary or 'none has ended'}."
    if not last.is_complete:
        text += " pytest was ended before all had run: its time was over."
    bad = [test for test, outcome in last.outcomes.items() if outcome in ("failed", "error")]
    if bad:
        text += "\n\n" + "\n".join(f"- {last.outcomes[test]}: {test}" for test in bad)
        text += "\n\n" + _verbatim(last.last_lines)
    return text


def _scaled(limit: records.LimitMeasured, value: float | None) -> str:
    return f"{value / (1e9 if limit.unit == 'bytes/s' else 1e12):.4g}" if value else NOTHING


LIMIT_CELLS: Cells = {
    "what": lambda x: x.what,
    "unit": lambda x: "GB/s" if x.unit == "bytes/s" else "TFLOP/s",
    "best": lambda x: _scaled(x, x.best),
    "median": lambda x: _scaled(x, x.median),
    "data sheet": lambda x: _scaled(x, x.data_sheet),
    "best / sheet": lambda x: format_percent(x.best / x.data_sheet) if x.data_sheet else NOTHING,
    "runs": lambda x: str(len(x.samples_us)),
    "GPU": lambda x: _slowed(x.gpu),
}


def _limits(lines: Sequence[Line]) -> str:
    limits = {line.what: line for line in lines if isinstance(line, records.LimitMeasured)}
    return f"## Limits\n\n{_table(limits.values(), LIMIT_CELLS)}" if limits else ""


# Columns of the networks' tables.
CELLS: Cells = {
    "network": lambda x: x.variant,
    "px": lambda x: str(x.image_size),
    "precision": lambda x: x.precision,
    "batch": lambda x: f"{x.batch_size}{' (best)' if x.is_best_batch else ''}",
    "program": lambda x: f"{x.method} ({x.job})" if x.method == "eager" else x.method,
    "program (job)": lambda x: f"{x.method} ({x.job})",
    "region": lambda x: x.region,
    "p50 ms": lambda x: tables.format_ms(x.p50_ms),
    "p90 ms": lambda x: tables.format_ms(x.p90_ms),
    "calls": lambda x: str(x.num_calls or NOTHING),
    "images/s": lambda x: tables.format_rate(x.images_per_s),
    "/ eager": lambda x: format_ratio(x.of_eager),
    "rel. error": lambda x: f"{x.parity.max_relative_error:.1e}" if x.parity else NOTHING,
    "top-1 alike": lambda x: format_percent(x.parity.top1_agreement) if x.parity else NOTHING,
    "ready in s": lambda x: NOTHING if x.prepare_s is None else f"{x.prepare_s:.1f}",
    PAPER_COLUMN: lambda x: tables.format_ms(_papers_ms(x)),
    "GPU, or why not": lambda x: x.problem or _slowed(x.gpu),
}
PAPERS_CASE = ("network", "px", "program (job)", "region", "p50 ms", PAPER_COLUMN)

# Columns whose cells are set flush left.
WORDS = frozenset(
    ("what", "unit", "GPU", "network", "precision", "program", "program (job)", "region", "job")
) | {"GPU, or why not", "whose", "fed by", "status", "why", "images", "loader"}


def _table(found: Iterable[Any], cells: Cells, notes: Iterable[str] = ()) -> str:
    rows = tuple(tuple(cell(x) for cell in cells.values()) for x in found)
    return Table(tuple(cells), rows, WORDS, tuple(notes)).markdown()


def _papers_ms(x: LatencyMeasured) -> float | None:
    # What the paper prints, where it is its case.
    published = get_variant(x.variant).published if x.variant in PAPER_VARIANTS else None
    if published is None or (x.precision, x.batch_size) != (PAPER_PRECISION, PAPER_BATCH_SIZE):
        return None
    return published.latency_ms


def _paper(latencies: Sequence[LatencyMeasured]) -> str:
    papers = [x for x in latencies if _papers_ms(x) is not None]
    if not papers:
        return ""
    papers.sort(key=lambda x: PAPER_VARIANTS.index(x.variant))
    cells = {column: CELLS[column] for column in PAPERS_CASE}
    return f"## The V2 paper's case: fp16, 16 images\n\n{_table(papers, cells)}"


def _variant(variant: str, latencies: Sequence[LatencyMeasured]) -> str:
    own = [x for x in latencies if x.variant == variant]
    own.sort(key=lambda x: (PRECISION_ORDER.index(x.precision), x.batch_size, x.region))
    left_out = {"network", "px", "program (job)", PAPER_COLUMN}
    cells = {column: cell for column, cell in CELLS.items() if column not in left_out}
    return f"## {variant}, {own[0].image_size} px\n\n{_table(own, cells)}"


def _fed_by(r: dict[str, Any]) -> str:
    return f"loader, {r['num_workers']} workers" if r["is_loader_fed"] else "synthetic images"


def _speed(r: dict[str, Any]) -> str:
    return "out of memory" if r["images_per_s"] is None else tables.format_rate(r["images_per_s"])


# Of a line and timm's record of the same job.
TRAINING_CELLS: Cells = {
    "job": lambda x: x[0].job,
    "network": lambda x: x[0].record["variant"],
    "px": lambda x: str(x[0].record["image_size"]),
    "batch": lambda x: str(x[0].record["micro_batch_size"]),
    "precision": lambda x: x[0].record["precision"],
    "whose": lambda x: x[0].record["contender"],
    "fed by": lambda x: _fed_by(x[0].record),
    "images/s": lambda x: _speed(x[0].record),
    "p50 ms": lambda x: tables.format_ms(x[0].record["step_p50_ms"]),
    "/ timm's speed": lambda x: _of_timm(x[0].record, x[1]),
    "steps": lambda x: str(x[0].record["num_steps"]),
    "memory": lambda x: _or_nothing(tables.format_bytes, x[0].record["peak_memory_bytes"]),
    "MFU": lambda x: _or_nothing(format_percent, x[0].record["mfu"]),
}


def _or_nothing(write: Callable[[Any], str], value: float | None) -> str:
    return NOTHING if value is None else write(value)


def _of_timm(own: dict[str, Any], timm: dict[str, Any] | None) -> str:
    if not timm or not own["turn_p50_ms"] or not timm["turn_p50_ms"]:
        return NOTHING
    pairs = zip(timm["turn_p50_ms"], own["turn_p50_ms"], strict=False)
    return format_ratio(median(theirs / mine for theirs, mine in pairs))


def _training(lines: Sequence[Line]) -> str:
    # Of a job that was run again, the later ones: they are written together.
    found: dict[tuple[object, ...], TrainingMeasured] = {}
    for line in lines:
        if isinstance(line, TrainingMeasured):
            record = line.record
            key = (line.job, record["contender"], record["is_loader_fed"], record["is_compiled"])
            found[key] = line
    if not found:
        return ""
    timm = {x.job: x.record for x in found.values() if x.record["contender"] == "timm"}
    note = (
        "By training/speed.py: forward, backward, update and moving average. timm again: the same "
        "a second time, which is the noise."
    )
    rows = [(line, timm.get(line.job)) for line in found.values()]
    notes = (*_fed_notes(list(found.values())), note)
    return f"## Training step\n\n{_table(rows, TRAINING_CELLS, notes)}"


def _fed_notes(lines: Sequence[TrainingMeasured]) -> Iterator[str]:
    for fed in (line for line in lines if line.record["is_loader_fed"]):
        for plain in lines:
            speeds = fed.record["images_per_s"], plain.record["images_per_s"]
            if plain.job == fed.job and not plain.record["is_loader_fed"] and all(speeds):
                share = format_percent(speeds[0] / speeds[1])
                yield f"Fed by the loader the step has {share} of its speed on synthetic images."


# Of the name of a loader and all that was measured at one image size.
LOADER_CELLS: Cells = {
    "images": lambda x: f"{x[1]['image_size']} px",
    "loader": lambda x: x[0],
    "images/s": lambda x: tables.format_rate(median(x[1]["images_per_s"][x[0]])),
    "/ timm's": lambda x: format_ratio(
        ratio(x[1]["images_per_s"][x[0]], x[1]["images_per_s"]["timm"]).median
    ),
    "core ms an image": lambda x: tables.format_ms(median(x[1]["core_ms_per_image"][x[0]])),
}


def _loader(lines: Sequence[Line]) -> str:
    reports = [line.record for line in lines if isinstance(line, records.LoaderMeasured)]
    if not reports:
        return ""
    report = reports[-1]
    note = (
        f"By training/loader_speed.py: {report['num_images']} JPEG files, {report['num_workers']} "
        f"workers, batches of {report['batch_size']}, no training. cpu, device: where RandAugment "
        "of ours runs."
    )
    rows = [(name, case) for case in report["cases"] for name in case["images_per_s"]]
    return f"## Loader alone\n\n{_table(rows, LOADER_CELLS, [note])}"


def _problems(lines: Sequence[Line]) -> str:
    parts = [
        f"### {end.job}: {end.status}\n\n{end.reason}\n\n{_verbatim(end.stderr)}"
        for end in ends_by_job(lines).values()
        if end.stderr
    ]
    return "\n\n".join(["## What jobs said that did not end well", *parts]) if parts else ""


def _verbatim(lines: Sequence[str]) -> str:
    return "```text\n" + "\n".join(line.replace("```", "'''") for line in lines) + "\n```"


def _slowed(gpu: records.GpuState | None) -> str:
    if gpu is None:
        return NOTHING
    words: list[str] = []
    if gpu.sm_clock_mhz is not None:
        low, high = gpu.sm_clock_mhz
        words.append(f"{low:.0f} to {high:.0f} MHz")
    if gpu.max_temperature_c is not None:
        words.append(f"{gpu.max_temperature_c:.0f} °C")
    if gpu.slowed_by:
        words.append(f"held down by {', '.join(gpu.slowed_by)}")
    return ", ".join(words) or NOTHING
