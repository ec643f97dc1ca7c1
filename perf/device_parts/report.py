"""Records of a folder -> report.md."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median
from typing import Any

from efficientnet.network.variants import get_variant
from efficientnet.reporting.tables import (
    NOTHING,
    Table,
    format_bytes,
    format_ms,
    format_percent,
    format_rate,
    format_ratio,
)
from perf.device_parts.records import (
    CallStart,
    GpuState,
    JobEnd,
    LatencyMeasured,
    LimitMeasured,
    Line,
    LoaderMeasured,
    PytestMeasured,
    TrainingMeasured,
    ends_by_job,
)

PAPER_VARIANTS = ("v2-s", "v2-m", "v2-l")
PAPER_BATCH_SIZE, PAPER_PRECISION = 16, "fp16"
PAPER_COLUMN = "the paper's ms (V100, another device)"

PRECISION_ORDER = ("fp16", "bf16", "fp32")

DRY_RUN = (
    "**A dry run: on a CPU, with the smallest networks and few repetitions. No number here means "
    "anything.**"
)
HOW = """## How the networks were measured

- p50, p90: wall time of a call that waits for the device before and after, each with other images
  than the one before; the programs of a job take turns. p90 only of 100 calls or more.
- images/s: images by the time of all turns, at the same batch.
- / eager: median of the turns' ratios to the time of the eager model that took turns with it, in
  the same precision and region; below 1 is faster.
- region: images and logits are float32, on the device or in host memory; changing the format is
  part of a call, and of a CUDA graph the copy of the images into it. fp32 is without TF32.
- batch (best): the one of most images/s of the eager model, of each precision; 64 where the part
  network has not told.
- rel. error, top-1 alike: 64 images beside eager float32; the largest error of a logit, in standard
  deviations of all logits, and how many images have the same best class.
- ready in s: building, compiling, capturing, and the first call; not the export of an artifact.
- Weights are random, batch norm settled on real images. The classes are close to each other: top-1
  differs sooner than of trained weights. An export is refused by the tolerances of trained ones."""


def document(lines: Sequence[Line]) -> str:
    """Write the report of all that is there so far."""
    calls = [line for line in lines if isinstance(line, CallStart)]
    parts = [_head(calls), _jobs(lines)]
    latencies = latest(line for line in lines if isinstance(line, LatencyMeasured))
    parts += [_tests(lines), _limits(lines), _paper(latencies)]
    parts += [_variant(name, latencies) for name in dict.fromkeys(x.variant for x in latencies)]
    if latencies:
        parts.append(HOW)
    parts += [_training(lines), _loader(lines), _problems(lines)]
    return "\n\n".join(filter(None, parts)) + "\n"


def latest(records: Iterable[LatencyMeasured]) -> list[LatencyMeasured]:
    """Keep the last of those that measure the same; one with times before one with a problem."""
    found: dict[tuple[object, ...], LatencyMeasured] = {}
    for x in records:
        key = (x.job, x.variant, x.method, x.precision, x.batch_size, x.region)
        if key not in found or x.problem is None or found[key].problem is not None:
            found[key] = x
    return list(found.values())


def _head(calls: Sequence[CallStart]) -> str:
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


def _jobs(lines: Sequence[Line]) -> str:
    rows = [
        (end.job, end.status, end.reason or NOTHING, f"{end.seconds:.0f}")
        for end in ends_by_job(lines).values()
    ]
    if not rows:
        return "## Jobs\n\nNone has ended yet."
    table = Table(("job", "status", "why", "s"), tuple(rows), frozenset(("job", "status", "why")))
    counts = Counter(status for _, status, _, _ in rows)
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    left = [end for end in ends_by_job(lines).values() if end.status not in ("done", "skipped")]
    hint = ""
    if left:
        hint = (
            "\n\nThe same call with this folder as --output does what is not done. What a job "
            "measured before it ended is below."
        )
    return f"## Jobs\n\n{summary}.{hint}\n\n{table.markdown()}"


def _tests(lines: Sequence[Line]) -> str:
    tests = [line for line in lines if isinstance(line, PytestMeasured)]
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


def _limits(lines: Sequence[Line]) -> str:
    limits = {line.what: line for line in lines if isinstance(line, LimitMeasured)}
    if not limits:
        return ""
    rows: list[tuple[str, ...]] = []
    for limit in limits.values():
        unit, scale = ("GB/s", 1e9) if limit.unit == "bytes/s" else ("TFLOP/s", 1e12)
        sheet = limit.data_sheet
        rows.append(
            (
                limit.what,
                unit,
                f"{limit.best / scale:.4g}",
                f"{limit.median / scale:.4g}",
                f"{sheet / scale:.4g}" if sheet else NOTHING,
                format_percent(limit.best / sheet) if sheet else NOTHING,
                str(len(limit.samples_us)),
                _slowed(limit.gpu),
            )
        )
    columns = ("what", "unit", "best", "median", "data sheet", "best / sheet", "runs", "GPU")
    words = frozenset(("what", "unit", "GPU"))
    return f"## Limits\n\n{Table(columns, tuple(rows), words).markdown()}"


# Columns of the networks' tables.
CELLS: dict[str, Callable[[LatencyMeasured], str]] = {
    "network": lambda x: x.variant,
    "px": lambda x: str(x.image_size),
    "precision": lambda x: x.precision,
    "batch": lambda x: f"{x.batch_size}{' (best)' if x.is_best_batch else ''}",
    "program": lambda x: f"{x.method} ({x.job})" if x.method == "eager" else x.method,
    "program (job)": lambda x: f"{x.method} ({x.job})",
    "region": lambda x: x.region,
    "p50 ms": lambda x: format_ms(x.p50_ms),
    "p90 ms": lambda x: format_ms(x.p90_ms),
    "calls": lambda x: str(x.num_calls or NOTHING),
    "images/s": lambda x: NOTHING if x.images_per_s is None else format_rate(x.images_per_s),
    "/ eager": lambda x: format_ratio(x.of_eager),
    "rel. error": lambda x: f"{x.parity.max_relative_error:.1e}" if x.parity else NOTHING,
    "top-1 alike": lambda x: format_percent(x.parity.top1_agreement) if x.parity else NOTHING,
    "ready in s": lambda x: NOTHING if x.prepare_s is None else f"{x.prepare_s:.1f}",
    PAPER_COLUMN: lambda x: format_ms(_papers_ms(x)),
    "GPU, or why not": lambda x: x.problem or _slowed(x.gpu),
}
WORDS = ("network", "precision", "program", "program (job)", "region", "GPU, or why not")
PAPERS_CASE = ("network", "px", "program (job)", "region", "p50 ms", PAPER_COLUMN)


def _latency_table(latencies: Sequence[LatencyMeasured], columns: Sequence[str]) -> str:
    rows = tuple(tuple(CELLS[column](x) for column in columns) for x in latencies)
    return Table(tuple(columns), rows, frozenset(WORDS)).markdown()


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
    return f"## The V2 paper's case: fp16, 16 images\n\n{_latency_table(papers, PAPERS_CASE)}"


def _variant(variant: str, latencies: Sequence[LatencyMeasured]) -> str:
    own = [x for x in latencies if x.variant == variant]
    own.sort(key=lambda x: (PRECISION_ORDER.index(x.precision), x.batch_size, x.region))
    left_out = {"network", "px", "program (job)"}
    left_out |= set() if variant in PAPER_VARIANTS else {PAPER_COLUMN}
    table = _latency_table(own, [column for column in CELLS if column not in left_out])
    return f"## {variant}, {own[0].image_size} px\n\n{table}"


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
    rows = [_training_row(x, timm.get(x.job)) for x in found.values()]
    columns = ("job", "network", "px", "batch", "precision", "whose", "fed by", "images/s")
    columns += ("p50 ms", "/ timm's speed", "steps", "memory", "MFU")
    words = frozenset(("job", "network", "precision", "whose", "fed by"))
    note = (
        "By training/speed.py: forward, backward, update and moving average. timm again: the same "
        "a second time, which is the noise."
    )
    notes = (*_fed_notes(list(found.values())), note)
    return f"## Training step\n\n{Table(columns, tuple(rows), words, notes).markdown()}"


def _fed_notes(lines: Sequence[TrainingMeasured]) -> Iterator[str]:
    for fed in (line for line in lines if line.record["is_loader_fed"]):
        for plain in lines:
            speeds = fed.record["images_per_s"], plain.record["images_per_s"]
            if plain.job == fed.job and not plain.record["is_loader_fed"] and all(speeds):
                share = format_percent(speeds[0] / speeds[1])
                yield f"Fed by the loader the step has {share} of its speed on synthetic images."


def _training_row(line: TrainingMeasured, timm: dict[str, Any] | None) -> tuple[str, ...]:
    r = line.record
    fed = f"loader, {r['num_workers']} workers" if r["is_loader_fed"] else "synthetic images"
    speed, memory, mfu = r["images_per_s"], r["peak_memory_bytes"], r["mfu"]
    ratio = NOTHING
    if timm and r["turn_p50_ms"] and timm["turn_p50_ms"]:
        pairs = zip(timm["turn_p50_ms"], r["turn_p50_ms"], strict=False)
        ratio = format_ratio(median(theirs / own for theirs, own in pairs))
    return (
        line.job,
        r["variant"],
        str(r["image_size"]),
        str(r["micro_batch_size"]),
        r["precision"],
        r["contender"],
        fed,
        "out of memory" if r["is_out_of_memory"] or speed is None else format_rate(speed),
        format_ms(r["step_p50_ms"]),
        ratio,
        str(r["num_steps"]),
        format_bytes(memory) if memory else NOTHING,
        format_percent(mfu) if mfu is not None else NOTHING,
    )


def _loader(lines: Sequence[Line]) -> str:
    reports = [line.record for line in lines if isinstance(line, LoaderMeasured)]
    if not reports:
        return ""
    report = reports[-1]
    rows = [
        (
            f"{case['image_size']} px",
            name,
            format_rate(median(rates)),
            format_ratio(median(own / t for own, t in zip(rates, _timm(case), strict=True))),
            format_ms(median(case["core_ms_per_image"][name])),
        )
        for case in report["cases"]
        for name, rates in case["images_per_s"].items()
    ]
    columns = ("images", "loader", "images/s", "/ timm's", "core ms an image")
    note = (
        f"By training/loader_speed.py: {report['num_images']} JPEG files, {report['num_workers']} "
        f"workers, batches of {report['batch_size']}, no training. cpu, device: where RandAugment "
        "of ours runs."
    )
    table = Table(columns, tuple(rows), frozenset(("images", "loader")), (note,))
    return f"## Loader alone\n\n{table.markdown()}"


def _timm(case: dict[str, Any]) -> list[float]:
    return case["images_per_s"]["timm"]


def _problems(lines: Sequence[Line]) -> str:
    parts = [
        f"### {end.job}: {end.status}\n\n{end.reason}\n\n{_verbatim(end.stderr)}"
        for end in ends_by_job(lines).values()
        if isinstance(end, JobEnd) and end.stderr
    ]
    return "\n\n".join(["## What jobs said that did not end well", *parts]) if parts else ""


def _verbatim(lines: Sequence[str]) -> str:
    return "```text\n" + "\n".join(line.replace("```", "'''") for line in lines) + "\n```"


def _slowed(gpu: GpuState | None) -> str:
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
