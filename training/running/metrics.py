"""Epochs of a run -> metrics.jsonl and curves.png."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict

from efficientnet.machine.atomic import write_bytes, write_text
from training.running.drawing import draw_png
from training.running.progress import format_seconds

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"

MAX_VALUES_OUTSIDE = 3

# Times the loss of guessing, ln(classes), from which on a mean training loss is no chance, and a
# held-out loss no mere overconfidence.
WORSE_THAN_GUESSING, EXPLODED = 1.1, 3.0


class EpochMetrics(BaseModel):
    """One line of metrics.jsonl."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: int
    """Epochs trained, from 1."""
    step: int
    """Optimizer steps trained."""
    stage: int
    """Stage of the epoch's last step, from 1."""
    image_size: int
    """Pixels, of the same step."""
    learning_rate: float
    """Of the same step."""
    train_loss: float
    """Mean over the epoch, with augmentation and label smoothing."""
    val_loss: float
    """Of the averaged weights, without either."""
    top1: float
    top5: float
    balanced_accuracy: float | None = None
    """Mean over the classes of the share that is classified rightly, of the averaged weights."""
    images_per_s: float
    """In training, evaluation excluded."""
    elapsed_s: float
    """Training and evaluation since the run began."""


def describe(metrics: EpochMetrics, num_epochs: int, num_stages: int) -> str:
    """Write an epoch as one line for the log."""
    return (
        f"epoch {metrics.epoch:3d}/{num_epochs}  stage {metrics.stage}/{num_stages}  "
        f"{metrics.image_size:3d} px  loss {metrics.train_loss:.3f}  "
        f"held-out loss {metrics.val_loss:.3f}  top-1 {100 * metrics.top1:5.1f} %  "
        f"{metrics.images_per_s:5.0f} images/s  {format_seconds(metrics.elapsed_s)}"
    )


def signs_of_failure(metrics: EpochMetrics, num_classes: int) -> list[str]:
    """Tell what is wrong with an epoch's losses: they are compared with those of guessing."""
    guessing = math.log(num_classes)
    signs: list[str] = []
    # A uniform guess has this loss whatever the labels are smoothed or mixed with.
    if metrics.train_loss > WORSE_THAN_GUESSING * guessing and metrics.epoch > 1:
        signs.append(
            f"the training loss {metrics.train_loss:.3g} is worse than guessing ({guessing:.2f}): "
            "if it does not fall, stop, and lower --optimizer.learning-rate"
        )
    if metrics.val_loss > EXPLODED * guessing:
        signs.append(
            f"the held-out loss {metrics.val_loss:,.5g} has exploded, guessing has {guessing:.2f}: "
            "the learning rate is too high (--optimizer.learning-rate), or the steps are too few "
            "for batch norm's statistics (--batch-norm-momentum) and the moving average"
        )
    return signs


def write_metrics(run: Path, epochs: Sequence[EpochMetrics]) -> None:
    """Write metrics.jsonl, whole or not at all."""
    write_text(run / METRICS_FILE, "".join(epoch.model_dump_json() + "\n" for epoch in epochs))


def read_metrics(run: Path) -> list[EpochMetrics]:
    """Read metrics.jsonl."""
    lines = (run / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return [EpochMetrics(**json.loads(line)) for line in lines]


def draw_curves(run: Path, epochs: Sequence[EpochMetrics], title: str, num_classes: int) -> Path:
    """Draw loss, top-1 and learning rate over time, with the stages as bands.

    The loss axis ends a little above the loss of guessing; what is higher is marked at its upper
    edge with its value, so that a spike does not flatten the rest.
    """
    picture = draw_png((9, 8.5), lambda figure: _draw(figure, epochs, title, num_classes), 120)
    write_bytes(run / CURVES_FILE, picture)
    return run / CURVES_FILE


def _draw(figure: Figure, epochs: Sequence[EpochMetrics], title: str, num_classes: int) -> None:
    minutes = [epoch.elapsed_s / 60 for epoch in epochs]
    loss, top1, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1.2))
    end = loss_axis_end(epochs, num_classes)
    train, held_out = [e.train_loss for e in epochs], [e.val_loss for e in epochs]
    _draw_clipped(loss, minutes, train, end, "train (augmented)")
    _draw_clipped(loss, minutes, held_out, end, "held-out (averaged weights)")
    guessing = math.log(num_classes)
    loss.axhline(guessing, ls=":", lw=1, color="gray", label=f"guessing: {guessing:.2f}")
    loss.set_ylim(0, end)
    loss.set_ylabel("loss")
    loss.legend(loc="upper right", framealpha=0.8, edgecolor="none")
    top1.plot(minutes, [100 * e.top1 for e in epochs], "o-", ms=3, color="tab:green")
    top1.set_ylabel("top-1 on held-out images, %")
    rate.plot(minutes, [e.learning_rate for e in epochs], "o-", ms=3, color="tab:purple")
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    rate.set_xlabel("time, minutes")
    last = epochs[-1]
    top1.annotate(
        f"{100 * last.top1:.1f} %",
        (minutes[-1], 100 * last.top1),
        textcoords="offset points",
        xytext=(-6, -14),
        ha="right",
    )
    for axes in (loss, top1, rate):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        _draw_bands(axes, epochs, has_labels=axes is loss)
    top1.set_xlim(0, minutes[-1] * 1.02)
    figure.suptitle(title)


def loss_axis_end(epochs: Sequence[EpochMetrics], num_classes: int) -> float:
    """Return the upper end of the loss axis: all losses below it, or 1.5 times that of guessing."""
    highest = max(max(epoch.train_loss, epoch.val_loss) for epoch in epochs)
    return min(1.1 * highest, 1.5 * math.log(num_classes))


def _draw_clipped(
    axes: Axes, minutes: Sequence[float], values: Sequence[float], end: float, label: str
) -> None:
    (line,) = axes.plot(minutes, values, "o-", ms=3, label=label)
    outside = [(x, value) for x, value in zip(minutes, values, strict=True) if value > end]
    edge = [0.98 * end] * len(outside)
    axes.plot([x for x, _ in outside], edge, "^", color=line.get_color(), ms=7)
    # Few have a value, the highest ones: more could not be read.
    for x, value in sorted(outside, key=lambda point: -point[1])[:MAX_VALUES_OUTSIDE]:
        axes.annotate(
            f"{value:,.3g}",
            (x, end),
            textcoords="offset points",
            xytext=(6, -10),
            fontsize=8,
            color=line.get_color(),
        )


def _draw_bands(axes: Axes, epochs: Sequence[EpochMetrics], has_labels: bool) -> None:
    begin, num_stages = 0.0, max(epoch.stage for epoch in epochs)
    for index, epoch in enumerate(epochs):
        is_last_of_stage = index + 1 == len(epochs) or epochs[index + 1].stage != epoch.stage
        if not is_last_of_stage:
            continue
        end = epoch.elapsed_s / 60
        axes.axvspan(begin, end, color="tab:blue", alpha=0.16 * epoch.stage / num_stages, lw=0)
        if has_labels:
            axes.annotate(
                f"stage {epoch.stage}\n{epoch.image_size} px",
                ((begin + end) / 2, 1.0),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                fontsize=8,
            )
        begin = end
