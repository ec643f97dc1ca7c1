"""Artifacts and checkpoints -> top-1 and top-5 of each on all held-out images: AccuracyRecords."""

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from efficientnet.formats.class_accuracy import (
    MAX_CLASSES_WITHOUT_TOP5,
    count_classes,
    is_at_chance,
)
from efficientnet.formats.records import AccuracyRecord, append_record, pack_hits
from efficientnet.images.datasets import Dataset, data_name, sha256_of_samples
from efficientnet.machine.environment import current_environment
from efficientnet.measuring.intervals import mcnemar_p_value, wilson_interval
from efficientnet.measuring.programs import Program, images_for, read_programs, require_writable
from efficientnet.reporting.class_table import class_table
from efficientnet.reporting.tables import Table, format_percent
from efficientnet.runtimes import open_runtime
from efficientnet.runtimes.probabilities import top_classes
from perf.measurements.config import AccuracyConfig
from perf.measurements.predictions import Predictions, predict, write_predictions

DEFAULT_BATCH_SIZE = 32

# Of a difference that is told.
SIGNIFICANCE = 0.05

log = logging.getLogger(__name__)


def main(config: AccuracyConfig) -> Path:
    """Classify all held-out images with each program and append the records."""
    programs = read_programs(config.paths)
    if config.predictions is not None and len(programs) > 1:
        raise ValueError(
            f"--predictions takes the answers of one program, there are {len(programs)}: name one, "
            f"for instance {programs[0].path}"
        )
    batch_sizes = [_batch_size(program, config.batch_size) for program in programs]
    datasets = [images_for(program, config.data, needs_labels=True) for program in programs]
    require_writable(config.output, "--output")
    if config.predictions is not None:
        require_writable(config.predictions, "--predictions")
    records: list[AccuracyRecord] = []
    for program, dataset, batch_size in zip(programs, datasets, batch_sizes, strict=True):
        started_at = datetime.now(UTC)
        log.info("%s: %d held-out images of %s", program.path, len(dataset.val), dataset.source)
        predictions = predict(open_runtime(program.path), dataset.val, batch_size)
        for problem in predictions.broken:
            log.warning("left out, cannot be decoded: %s", problem)
        record = _make_record(program, dataset, predictions, started_at)
        if config.predictions is not None:
            write_predictions(config.predictions, predictions)
            log.info("predictions: %s", config.predictions)
        append_record(config.output, record)
        records.append(record)
        if record.class_accuracy is not None:
            table = class_table(record.class_accuracy, record.class_names)
            log.info("%s\n%s", program.path, table.aligned_text())
    table = result_table([program.path for program in programs], records)
    log.info("%s", table.aligned_text())
    for note in table.notes:
        log.warning("%s", note)
    pairs = paired_table([program.path for program in programs], records)
    if pairs.rows:
        log.info("%s", pairs.aligned_text())
    return config.output


def result_table(paths: Sequence[Path], records: Sequence[AccuracyRecord]) -> Table:
    """Lay out what each program reached, and what naming the largest class would reach."""
    has_top5 = any((r.num_classes or 0) > MAX_CLASSES_WITHOUT_TOP5 for r in records)
    rows: list[tuple[str, ...]] = []
    notes: dict[str, None] = {}
    for path, record in zip(paths, records, strict=True):
        classes = record.class_accuracy
        assert classes is not None, "records made here have their classes"
        name, share = record.class_names[classes.largest], classes.largest_share
        if is_at_chance(record.top1, share, record.num_images):
            notes[f"{path}: not clearly above always naming '{name}'."] = None
        rows.append(
            (
                str(path),
                format_percent(record.top1),
                _interval(record),
                *([format_percent(record.top5)] if has_top5 else []),
                format_percent(classes.balanced),
                f"{format_percent(share)} ({name})",
                f"{record.num_images:,}",
            )
        )
    top5 = ("top-5",) if has_top5 else ()
    columns = ("program", "top-1", "95 %", *top5, "balanced", "largest class", "images")
    return Table(columns, tuple(rows), frozenset(columns[:1]), tuple(notes))


def paired_table(paths: Sequence[Path], records: Sequence[AccuracyRecord]) -> Table:
    """Compare each program with the first on the same images; those of other images are left out.

    Far fewer images tell two programs apart so than by their intervals: all that both classify
    rightly, or both wrongly, say nothing of which is better.
    """
    rows: list[tuple[str, ...]] = []
    for path, record in zip(paths[1:], records[1:], strict=True):
        pair = paired_hits(records[0], record)
        if pair is None:
            continue
        only_first, only_other = pair
        p_value = mcnemar_p_value(only_first, only_other)
        told = "no difference told"
        if p_value < SIGNIFICANCE:
            told = "less accurate" if only_first > only_other else "more accurate"
        points = 100 * (only_other - only_first) / record.num_images
        rows.append(
            (str(path), str(only_first), str(only_other), f"{points:+.1f}", f"{p_value:.2g}", told)
        )
    columns = (f"beside {paths[0]}", "right there only", "right here only", "points")
    columns += ("McNemar p", "")
    return Table(columns, tuple(rows), frozenset((columns[0], "")))


def paired_hits(one: AccuracyRecord, other: AccuracyRecord) -> tuple[int, int] | None:
    """Count the images that only the one, and only the other classifies rightly.

    None when they are of different images, or a record does not tell which were right.
    """
    if one.dataset_sha256 != other.dataset_sha256 or one.is_hit is None or other.is_hit is None:
        return None
    pairs = list(zip(one.is_hit, other.is_hit, strict=True))
    return pairs.count((True, False)), pairs.count((False, True))


def _interval(record: AccuracyRecord) -> str:
    low, high = wilson_interval(round(record.top1 * record.num_images), record.num_images)
    return f"{format_percent(low)} to {format_percent(high)}"


def top_k_accuracy(predictions: Predictions, k: int) -> float:
    """Return the share of images whose label is among the k most probable classes.

    With fewer than k classes it is among them always.
    """
    labels = np.asarray([sample.label for sample in predictions.samples])
    best = top_classes(predictions.probabilities, k)
    return float((best == labels[:, None]).any(axis=1).mean())


def _batch_size(program: Program, asked: int | None) -> int:
    most = program.max_batch_size
    if asked is None:
        return DEFAULT_BATCH_SIZE if most is None else min(DEFAULT_BATCH_SIZE, most)
    if most is not None and asked > most:
        raise ValueError(
            f"--batch-size is {asked}, {program.path} takes at most {most} images in a call; "
            "lower it, or export with a larger --batch"
        )
    return asked


def _make_record(
    program: Program, dataset: Dataset, predictions: Predictions, started_at: datetime
) -> AccuracyRecord:
    labels = [sample.label for sample in predictions.samples]
    guesses = [int(guess) for guess in top_classes(predictions.probabilities, 1)[:, 0]]
    names = dataset.class_names
    counted = count_classes(labels, guesses, len(names))
    return AccuracyRecord(
        **program.identity,
        data=data_name(dataset.source),
        environment=current_environment(),
        started_at=started_at,
        top1=top_k_accuracy(predictions, 1),
        top5=top_k_accuracy(predictions, 5),
        num_images=len(labels),
        classes=tuple(c for c in zip(names, counted.images, counted.hits, strict=True) if c[1]),
        num_classes=len(names),
        dataset_sha256=sha256_of_samples(predictions.samples),
        hits=pack_hits([guess == label for guess, label in zip(guesses, labels, strict=True)]),
    )
