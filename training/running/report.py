"""What a run came to -> report.md and confusion.png in its directory."""

import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from efficientnet.formats.class_accuracy import MAX_CLASSES_WITHOUT_TOP5, is_at_chance
from efficientnet.images.datasets import data_name
from efficientnet.machine.atomic import write_bytes, write_text
from efficientnet.machine.environment import current_environment
from efficientnet.reporting.class_table import class_table
from efficientnet.reporting.tables import NOTHING, Table, format_bytes, format_percent, format_rate
from training.learning.evaluation import MAX_CONFUSION_CLASSES, Evaluation
from training.recipe.config import TrainConfig, config_to_json, flat_values
from training.running.drawing import LINE, MUTED, TEXT, draw_png
from training.running.metrics import CURVES_FILE, EpochMetrics
from training.running.progress import format_seconds
from training.running.run_folder import REPORT_FILE, Run

CONFUSION_FILE = "confusion.png"

NUM_CONFUSED_PAIRS = 5

# Beyond it the counts would be smaller than can be read.
MAX_CLASSES_WITH_COUNTS = 20
MAX_LABEL_CHARACTERS = 18
# A share of mistakes that is drawn dark red even where there is no worse one.
MIN_SCALE_END = 0.1
MIN_SIDE_INCHES = 5.5

HITS = LinearSegmentedColormap.from_list("hits", ["#f3f7fb", "#9ec3e6", "#1f5f9e"])
MISSES = LinearSegmentedColormap.from_list("misses", ["#ffffff", "#f6b48f", "#b3261e"])


@dataclass(frozen=True)
class FinalEvaluation:
    """The trained weights, or their average, on the held-out images at one size."""

    weights: Literal["averaged", "raw"]
    image_size: int
    """Pixels."""
    result: Evaluation


def write_report(run: Run, evaluations: Sequence[FinalEvaluation]) -> Path:
    """Write confusion.png, and report.md last: where it stands, the run is complete."""
    directory, config, dataset = run.directory, run.config, run.dataset
    class_names, num_val = dataset.class_names, len(dataset.val)
    epochs = [EpochMetrics(**epoch) for epoch in run.state.history]
    final = next(
        e for e in evaluations if e.weights == "averaged" and e.image_size == config.eval_image_size
    )
    subject = f"{config.variant} on {data_name(config.data)}"
    top1, matrix = format_percent(final.result.top1), final.result.confusion
    classes = final.result.classes
    largest = f"always naming the largest class, {class_names[classes.largest]},"
    is_chance = is_at_chance(final.result.top1, classes.largest_share, num_val)
    verdict = f" (not clearly above {largest.rstrip(',')})" if is_chance else ""
    if matrix is not None:
        title = f"{subject}: {top1} top-1 of {num_val:,} held-out images"
        write_bytes(directory / CONFUSION_FILE, draw_confusion(matrix, class_names, title))
    parts = [
        f"# {subject}: {top1} top-1{verdict} in {format_seconds(epochs[-1].elapsed_s)}",
        f"{largest[0].upper()}{largest[1:]} would have "
        f"{format_percent(classes.largest_share)} top-1. Balanced accuracy, the mean of the "
        f"classes' recalls: {format_percent(classes.balanced)}.",
        f"The averaged weights at {final.image_size} px on {num_val:,} held-out images, after "
        f"{len(epochs)} epoch{'s' * (len(epochs) > 1)} over {len(dataset.train):,} training images "
        f"of {len(class_names):,} classes on {run.ranks.describe()}; the time is "
        "that of training and evaluation. " + _best_epoch(epochs),
        "## Evaluation",
        evaluation_table(evaluations, run).markdown(),
        "Averaged: the moving average, which is what is deployed. Raw: the last step's. The loss "
        "is the cross entropy without label smoothing.",
        "## Classes",
        class_table(classes, class_names).markdown(),
        "Recall: the part of a class's images that is given that class.",
        "## Stages",
        stage_table(run).markdown(),
        "Without evaluation. Memory: the most that the device had in use during the stage, or the "
        "process where there is no GPU (with the libraries' own).",
        "## Curves",
        f"![Loss, top-1 and learning rate over the time of training]({CURVES_FILE})",
        "## Confusion",
        *_confusion_parts(matrix, class_names),
        "## Recipe",
        *([f"{config.recipe}: {config.recipe_reason}."] if config.recipe_reason else []),
        recipe_table(config).markdown(),
        "## Environment",
        environment_table(run).markdown(),
    ]
    write_text(directory / REPORT_FILE, "\n\n".join(parts) + "\n")
    return directory / REPORT_FILE


def evaluation_table(evaluations: Sequence[FinalEvaluation], run: Run) -> Table:
    """Lay out the final evaluations."""
    num_classes = len(evaluations[0].result.classes.images)
    has_top5 = num_classes > MAX_CLASSES_WITHOUT_TOP5
    rows: list[tuple[str, ...]] = []
    for evaluation in evaluations:
        size = evaluation.image_size
        uses = ["evaluation"] if size == run.config.eval_image_size else []
        uses += ["last stage"] if size == run.stages[-1].image_size else []
        result = evaluation.result
        rows.append(
            (
                evaluation.weights,
                f"{size} px",
                " and ".join(uses),
                format_percent(result.top1, 2),
                *([format_percent(result.top5, 2)] if has_top5 else []),
                format_percent(result.classes.balanced, 2),
                f"{result.loss:.4f}",
            )
        )
    top5 = ("top-5",) if has_top5 else ()
    columns = ("weights", "size", "which is that of", "top-1", *top5, "balanced", "loss")
    return Table(columns, tuple(rows), frozenset({"weights", "which is that of"}))


def stage_table(run: Run) -> Table:
    """Lay out what each stage was trained with and what it took."""
    columns = ("stage", "size", "RandAugment", "Mixup", "CutMix", "dropout", "passes x images")
    columns += ("steps", "time", "images/s", "memory")
    rows: list[tuple[str, ...]] = []
    for stage in run.stages:
        took = run.state.stages[stage.index]
        micro_batch_size = run.plan.micro_batch_sizes[stage.index]
        rows.append(
            (
                str(stage.index + 1),
                f"{stage.image_size} px",
                _value(stage.randaugment_magnitude),
                _value(stage.mixup_alpha),
                _value(stage.cutmix_alpha),
                _value(stage.dropout_rate),
                f"{run.config.batch_size // micro_batch_size} x {micro_batch_size}",
                f"{run.plan.num_steps_of_stage(stage.index):,}",
                format_seconds(took.seconds),
                format_rate(took.num_images / took.seconds) if took.seconds else NOTHING,
                format_bytes(took.peak_memory_bytes) if took.peak_memory_bytes else NOTHING,
            )
        )
    return Table(columns, tuple(rows))


def recipe_table(config: TrainConfig) -> Table:
    """List every value of the recipe, under the names of the flags."""
    values = flat_values(config_to_json(config)).items()
    rows = tuple((name, _setting(value)) for name, value in values)
    return Table(("setting", "value"), rows, frozenset({"setting", "value"}))


def environment_table(run: Run) -> Table:
    """List where the run was trained."""
    environment = current_environment()
    memory = format_bytes(environment.memory_bytes)
    rows = (
        ("device", run.ranks.describe()),
        *(("GPU", gpu) for gpu in environment.gpus),
        ("CPU", f"{environment.processor}, {environment.num_cores} cores, {memory}"),
        ("system", f"{environment.system}, Python {environment.python}"),
        ("libraries", ", ".join(f"{n} {v}" for n, v in environment.libraries.items())),
        ("commit", environment.git_commit or NOTHING),
    )
    return Table(("what", "is"), rows, frozenset({"what", "is"}))


def confused_pairs(
    matrix: Sequence[Sequence[int]], num_pairs: int = NUM_CONFUSED_PAIRS
) -> list[tuple[int, int, int]]:
    """Return (true class, predicted class, images) of the most frequent mistakes, at least one."""
    mistakes = [
        (true, predicted, count)
        for true, row in enumerate(matrix)
        for predicted, count in enumerate(row)
        if count and true != predicted
    ]
    # Of equal counts the one that hits the larger part of its class comes first.
    mistakes.sort(key=lambda pair: (-pair[2], -pair[2] / sum(matrix[pair[0]])))
    return mistakes[:num_pairs]


def draw_confusion(
    matrix: Sequence[Sequence[int]], class_names: Sequence[str], title: str
) -> bytes:
    """Draw true classes over predicted ones and return a PNG.

    Colors are shares of the true class: hits blue, mistakes red and on a scale that lets few of
    them be seen. The counts stand in the cells where there is room.
    """
    counts = np.asarray(matrix, dtype=np.int64)  # [true, predicted]
    num_classes = len(counts)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    has_counts = num_classes <= MAX_CLASSES_WITH_COUNTS
    side = 3.2 + (0.42 * num_classes if has_counts else 6.0 + 0.03 * num_classes)
    side = max(side, MIN_SIDE_INCHES)
    label_size = 9.0 if has_counts else min(8.0, 500 / num_classes)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        is_hit = np.eye(num_classes, dtype=bool)
        # The root, so that one mistake among fifty images is still seen.
        norm = PowerNorm(0.5, 0, max(MIN_SCALE_END, float(shares[~is_hit].max(initial=0))))
        misses = axes.imshow(np.ma.array(shares, mask=is_hit), cmap=MISSES, norm=norm)
        axes.imshow(np.ma.array(shares, mask=~is_hit), cmap=HITS, vmin=0, vmax=1)
        if has_counts:
            _write_counts(axes, counts, shares, norm)
        _label_axes(axes, class_names, label_size)
        heading = textwrap.fill(title, int(9 * side))
        axes.set_title(heading, loc="left", color=TEXT, weight="bold", size=10.5, pad=10)
        bar = figure.colorbar(misses, ax=axes, shrink=0.6, aspect=28, pad=0.02)
        bar.set_label("mistakes, share of the true class", color=MUTED, size=9)
        bar.ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        bar.ax.tick_params(labelsize=8, colors=MUTED, color=LINE)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]

    with warnings.catch_warnings():
        # Class names in a script that the font does not have are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        return draw_png((side + 1.2, side), draw, 160)


def _label_axes(axes: Axes, class_names: Sequence[str], label_size: float) -> None:
    names, num_classes = [_shorten(name) for name in class_names], len(class_names)
    is_upright = max(map(len, names)) <= 3 and num_classes <= MAX_CLASSES_WITH_COUNTS
    axes.set_xticks(range(num_classes), names, rotation=0 if is_upright else 90)
    axes.set_yticks(range(num_classes), names)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)
    axes.tick_params(length=0, labelsize=label_size, labelcolor=TEXT, pad=3)
    axes.set_xticks(np.arange(num_classes + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(num_classes + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=LINE, lw=0.8 if num_classes <= MAX_CLASSES_WITH_COUNTS else 0.25)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_color(LINE)
    axes.set_xlabel("predicted", color=MUTED)
    axes.set_ylabel("true", color=MUTED)


def _write_counts(
    axes: Axes, counts: NDArray[np.int64], shares: NDArray[np.float64], norm: PowerNorm
) -> None:
    for (true, predicted), count in np.ndenumerate(counts):
        if not count:
            continue
        share = shares[true, predicted]
        is_dark = (share if true == predicted else float(norm(share))) > 0.65
        size, color = 9 if count < 1000 else 7, "white" if is_dark else TEXT
        axes.text(predicted, true, f"{count:,}", ha="center", va="center", size=size, color=color)


def _confusion_parts(
    matrix: Sequence[Sequence[int]] | None, class_names: Sequence[str]
) -> list[str]:
    if matrix is None:
        return [
            f"No picture and no pairs: {len(class_names):,} classes, and up to "
            f"{MAX_CONFUSION_CLASSES} can be looked at."
        ]
    picture = f"![Predicted over true classes]({CONFUSION_FILE})"
    pairs = confused_pairs(matrix)
    if not pairs:
        return [picture, "Not one held-out image is mistaken for another class."]
    rows = tuple(
        (class_names[i], class_names[j], f"{count:,}", format_percent(count / sum(matrix[i])))
        for i, j, count in pairs
    )
    columns = ("class", "taken for", "images", "of the class")
    return [picture, Table(columns, rows, frozenset(columns[:2])).markdown()]


def _best_epoch(epochs: Sequence[EpochMetrics]) -> str:
    best = max(epochs, key=lambda epoch: epoch.top1)
    if best.top1 <= epochs[-1].top1:
        return "No epoch was better than the last."
    return f"Epoch {best.epoch} was better: {format_percent(best.top1)}."


def _value(value: float) -> str:
    return f"{value:.3g}" if value else NOTHING


def _setting(value: object) -> str:
    if isinstance(value, list):
        return " ".join(_setting(part) for part in value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _shorten(name: str) -> str:
    too_long = len(name) > MAX_LABEL_CHARACTERS
    return f"{name[: MAX_LABEL_CHARACTERS - 1]}…" if too_long else name
