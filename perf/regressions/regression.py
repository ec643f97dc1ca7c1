"""Two revisions -> programs of one checkpoint, in turns -> a verdict that a build can act on."""

import json
import logging
import os
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from efficientnet.errors import PipelineError
from efficientnet.formats.records import AccuracyRecord, read_records
from efficientnet.images.preprocess import preprocess
from efficientnet.machine.atomic import write_text
from efficientnet.machine.environment import current_environment, num_usable_cores
from efficientnet.measuring.intervals import RatioInterval, bootstrap_ratio, mcnemar_p_value
from efficientnet.measuring.programs import images_for, read_program
from efficientnet.reporting.publishing import Measured
from efficientnet.reporting.tables import Table, format_ms, format_percent, format_ratio
from perf.measurements.accuracy import SIGNIFICANCE, paired_hits
from perf.regressions.config import RegressionConfig
from perf.regressions.revisions import Revision, extract, take_turns

Finding = Literal["regression", "inconclusive", "no regression", "faster"]

# The worst first: what a summary begins with.
ORDER: tuple[Finding, ...] = ("regression", "inconclusive", "faster", "no regression")

BASE, HEAD, AGAIN = "base", "head", "base again"

NUM_IMAGES = 256

SUMMARY_FILE, RECORD_FILE, BENCHMARK_FILE = "summary.md", "regression.json", "benchmark.json"

EXPORT_COMMANDS = {"ort": "export/ort.py", "ov": "export/ov.py"}

T = TypeVar("T")

log = logging.getLogger(__name__)


class RegressionFoundError(PipelineError):
    """The head is slower or less accurate."""


class ProgramComparison(BaseModel):
    """A program of both revisions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    samples_ms: dict[str, tuple[tuple[tuple[float, ...], ...], ...]]
    """Of base, head and base again: of each process, of each of its turns, every call."""
    ratio: float
    """Head over base: median of the ratios of the medians within a round."""
    low: float
    high: float
    """99 % interval."""
    noise_low: float
    noise_high: float
    """The same of base again over base, an A/A pair."""
    latency: Finding
    base_top1: float
    head_top1: float
    num_images: int
    p_value: float | None
    """McNemar's, of a difference in accuracy; None where a revision does not tell which images were
    right."""
    accuracy: Finding


class RegressionRecord(Measured):
    """All programs of one comparison."""

    format_version: int = 1
    base: str
    head: str
    """Commits."""
    max_slowdown: float
    num_threads: int
    turn_seconds: float
    programs: tuple[ProgramComparison, ...]

    @property
    def finding(self) -> Finding:
        """The worst of all."""
        found = {f for program in self.programs for f in (program.latency, program.accuracy)}
        return next(finding for finding in ORDER if finding in found)


def main(config: RegressionConfig) -> Path:
    """Build both revisions, measure them in turns and write the verdict; return the summary's path.

    Raises:
        RegressionFoundError: the head is slower or less accurate; the files have been written.
        RevisionError: a revision is not there, or does not build or run.
    """
    started_at, num_threads = datetime.now(UTC), config.threads or num_usable_cores()
    with tempfile.TemporaryDirectory(prefix="latency-ci-") as name:
        folder = Path(name)
        base = extract(config.base, folder / "base")
        head = extract(config.head, folder / "head")
        log.info("base %s, head %s; %d threads", base.commit[:12], head.commit[:12], num_threads)
        checkpoint = config.checkpoint or _train(base, config.variant, folder)
        checkpoint = checkpoint.resolve()
        images = _write_images(checkpoint, folder)
        programs = [
            _compare(export, base, head, checkpoint, images, config, num_threads, folder)
            for export in config.exports
        ]
    record = RegressionRecord(
        environment=current_environment(),
        started_at=started_at,
        base=base.commit,
        head=head.commit,
        max_slowdown=config.max_slowdown,
        num_threads=num_threads,
        turn_seconds=config.turn_seconds,
        programs=tuple(programs),
    )
    text = summary_of(record)
    write_text(config.output / RECORD_FILE, record.model_dump_json() + "\n")
    write_text(config.output / BENCHMARK_FILE, benchmark_json(record))
    write_text(config.output / SUMMARY_FILE, text)
    if step_summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(step_summary).open("a", encoding="utf-8") as file:
            file.write(text)
    log.info("%s", table_of(record).aligned_text())
    for sentence in verdict_of(record):
        log.info("%s", sentence)
    if record.finding == "regression":
        worst = "; ".join(verdict_of(record))
        raise RegressionFoundError(f"{worst} See {config.output / SUMMARY_FILE}")
    return config.output / SUMMARY_FILE


def judge_latency(ratio: RatioInterval, noise: RatioInterval, max_slowdown: float) -> Finding:
    """Tell what an interval means, beside that of a pair of equals.

    A difference within what equals show is none; where equals differ by more than is asked for,
    nothing smaller than that can be told.
    """
    noise_width = max(noise.high - 1, 1 - noise.low, 0.0)
    if ratio.low > 1 + max_slowdown and ratio.ratio > 1 + noise_width:
        return "regression"
    if ratio.high < 1 and ratio.ratio < 1 - max(noise_width, max_slowdown):
        return "faster"
    if ratio.high <= 1 + max_slowdown and noise_width <= max_slowdown:
        return "no regression"
    return "inconclusive"


def judge_accuracy(base: AccuracyRecord, head: AccuracyRecord) -> tuple[Finding, float | None]:
    """Tell whether the head classifies fewer images rightly, and McNemar's probability."""
    if base.dataset_sha256 != head.dataset_sha256:
        return "inconclusive", None
    pair = paired_hits(base, head)
    if pair is None:
        # The base does not tell which images were right.
        return ("no regression" if head.top1 >= base.top1 else "inconclusive"), None
    p_value = mcnemar_p_value(*pair)
    if head.top1 >= base.top1:
        return "no regression", p_value
    return ("regression" if p_value < SIGNIFICANCE else "inconclusive"), p_value


def verdict_of(record: RegressionRecord) -> list[str]:
    """Say of each program what was found, the worst first."""
    sentences: list[tuple[int, str]] = []
    for program in record.programs:
        speed = f"{abs(program.ratio - 1):.1%}"
        interval = f"ratio {program.ratio:.3f}, {program.low:.3f} to {program.high:.3f}"
        noise = f"equals: {program.noise_low:.3f} to {program.noise_high:.3f}"
        words: dict[Finding, str] = {
            "regression": f"{speed} slower",
            "inconclusive": "inconclusive, the machine's noise allows no verdict",
            "no regression": f"not slower by {record.max_slowdown:.0%} or more",
            "faster": f"{speed} faster",
        }
        text = f"{program.name}: {words[program.latency]} ({interval}; {noise})."
        sentences.append((ORDER.index(program.latency), text))
        if program.accuracy != "no regression":
            word = "less accurate" if program.accuracy == "regression" else "accuracy inconclusive"
            text = (
                f"{program.name}: {word}, top-1 {format_percent(program.head_top1)} against "
                f"{format_percent(program.base_top1)} of {program.num_images:,} images."
            )
            sentences.append((ORDER.index(program.accuracy), text))
    return [text for _, text in sorted(sentences, key=lambda entry: entry[0])]


def summary_of(record: RegressionRecord) -> str:
    """Write the verdict, the table and how it was measured."""
    first = record.programs[0].samples_ms[BASE]
    sentences = "\n".join(f"- {sentence}" for sentence in verdict_of(record))
    return (
        f"## Latency: {record.finding}\n\n{sentences}\n\n{table_of(record).markdown()}\n\n"
        f"Base {record.base[:12]}, head {record.head[:12]}, built and measured on one machine "
        f"({record.environment.processor}, {record.num_threads} threads), "
        f"{record.started_at:%Y-%m-%d %H:%M} UTC: {len(first)} fresh processes of each, "
        f"{len(first[0])} turns of {record.turn_seconds:g} s in random order. Ratio: median of "
        "the ratios within a round, with its 99 % bootstrap interval. Equals: the base in a "
        "second process, which is the noise. All samples are in regression.json.\n"
    )


def table_of(record: RegressionRecord) -> Table:
    """Lay the programs out."""
    columns = ("program", "latency", "base ms", "head ms", "head / base", "99 %", "equals")
    columns += ("accuracy", "top-1 base", "top-1 head")
    rows = tuple(
        (
            program.name,
            program.latency,
            format_ms(_median(program, BASE)),
            format_ms(_median(program, HEAD)),
            format_ratio(program.ratio),
            f"{program.low:.3f} to {program.high:.3f}",
            f"{program.noise_low:.3f} to {program.noise_high:.3f}",
            program.accuracy,
            format_percent(program.base_top1),
            format_percent(program.head_top1),
        )
        for program in record.programs
    )
    return Table(columns, rows, frozenset(("program", "latency", "accuracy")))


def benchmark_json(record: RegressionRecord) -> str:
    """Write the head's times as github-action-benchmark reads them (customSmallerIsBetter)."""
    entries = [
        {
            "name": f"{program.name}, median call",
            "unit": "ms",
            "value": _median(program, HEAD),
            "range": f"{program.low:.3f} to {program.high:.3f} of base",
            "extra": f"{record.environment.processor}, {record.num_threads} threads",
        }
        for program in record.programs
    ]
    return json.dumps(entries, indent=1)


def _median(program: ProgramComparison, which: str) -> float:
    return statistics.median(
        statistics.median(turn) for process in program.samples_ms[which] for turn in process
    )


def _train(base: Revision, variant: str, folder: Path) -> Path:
    log.info("training %s on the embedded digits, by the base", variant)
    flags = ["--epochs", "4", "--output", str(folder / "runs"), "--num-workers", "0"]
    return folder / base.run(["training/run.py", variant, *flags], folder)


def _write_images(checkpoint: Path, folder: Path) -> Path:
    program = read_program(checkpoint)
    samples = images_for(program, None).val[:NUM_IMAGES]
    path = folder / "images.npy"
    np.save(path, np.stack([preprocess(s.read(), program.preprocess) for s in samples]))
    return path


def _compare(
    export: str,
    base: Revision,
    head: Revision,
    checkpoint: Path,
    images: Path,
    config: RegressionConfig,
    num_threads: int,
    folder: Path,
) -> ProgramComparison:
    # Side by side, like the accuracies below: nothing is measured then.
    programs = _of_both(base, head, lambda r: _build(r, export, checkpoint, folder))
    contenders = {
        BASE: (base, programs[0]),
        HEAD: (head, programs[1]),
        AGAIN: (base, programs[0]),
    }
    generator = random.Random()
    samples: dict[str, list[list[list[float]]]] = {name: [] for name in contenders}
    for number in range(config.processes):
        log.info("%s: processes %d of %d", export, number + 1, config.processes)
        found = take_turns(
            contenders, images, num_threads, config.rounds, config.turn_seconds, generator
        )
        for name, own in found.items():
            samples[name].append(own)
    ratio = bootstrap_ratio(_ratios(samples[HEAD], samples[BASE]))
    noise = bootstrap_ratio(_ratios(samples[AGAIN], samples[BASE]))
    program_of = dict(zip((base, head), programs, strict=True))
    accuracies = _of_both(
        base,
        head,
        lambda r: _accuracy(r, program_of[r], folder / f"accuracy-{r.tree.name}-{export}.jsonl"),
    )
    accuracy, p_value = judge_accuracy(*accuracies)
    return ProgramComparison(
        name=f"{accuracies[0].variant} {export}",
        samples_ms={
            name: tuple(tuple(tuple(turn) for turn in process) for process in own)
            for name, own in samples.items()
        },
        ratio=ratio.ratio,
        low=ratio.low,
        high=ratio.high,
        noise_low=noise.low,
        noise_high=noise.high,
        latency=judge_latency(ratio, noise, config.max_slowdown),
        base_top1=accuracies[0].top1,
        head_top1=accuracies[1].top1,
        num_images=accuracies[0].num_images,
        p_value=p_value,
        accuracy=accuracy,
    )


def _of_both(base: Revision, head: Revision, of: Callable[[Revision], T]) -> tuple[T, T]:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(of, (base, head))
    return first, second


def _build(revision: Revision, export: str, checkpoint: Path, folder: Path) -> Path:
    if export not in EXPORT_COMMANDS:
        return checkpoint
    output = folder / f"{revision.tree.name}-{export}"
    log.info("%s: building with %s", revision.name, EXPORT_COMMANDS[export])
    flags = ["--checkpoint", str(checkpoint), "--output", str(output)]
    revision.run([EXPORT_COMMANDS[export], *flags, "--precision", "fp32"], folder)
    return output


def _accuracy(revision: Revision, program: Path, path: Path) -> AccuracyRecord:
    revision.run(["perf/accuracy.py", str(program), "--output", str(path)], path.parent)
    return read_records(path, AccuracyRecord)[-1]


def _ratios(
    own: Sequence[Sequence[Sequence[float]]], base: Sequence[Sequence[Sequence[float]]]
) -> list[list[float]]:
    return [
        [statistics.median(a) / statistics.median(b) for a, b in zip(mine, theirs, strict=True)]
        for mine, theirs in zip(own, base, strict=True)
    ]
