"""Epochs of a run -> metrics.jsonl and curves.png."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict

from efficientnet.atomic import write_bytes, write_text

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"


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
    images_per_s: float
    """In training, evaluation excluded."""
    elapsed_s: float
    """Training and evaluation since the run began."""


def write_metrics(run: Path, epochs: Sequence[EpochMetrics]) -> None:
    """Write metrics.jsonl, whole or not at all."""
    write_text(run / METRICS_FILE, "".join(epoch.model_dump_json() + "\n" for epoch in epochs))


def read_metrics(run: Path) -> list[EpochMetrics]:
    """Read metrics.jsonl."""
    lines = (run / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return [EpochMetrics(**json.loads(line)) for line in lines]


def draw_curves(run: Path, epochs: Sequence[EpochMetrics], title: str) -> Path:
    """Draw loss and top-1 over time, with the stages as bands."""
    minutes = [epoch.elapsed_s / 60 for epoch in epochs]
    # Not pyplot, which may only be used by one thread: this is drawn beside the training.
    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    loss, top1 = figure.subplots(2, 1, sharex=True)
    loss.plot(minutes, [e.train_loss for e in epochs], "o-", ms=3, label="train (augmented)")
    loss.plot(minutes, [e.val_loss for e in epochs], "o-", ms=3, label="held-out")
    loss.set_ylabel("loss")
    loss.legend(loc="upper right", frameon=False)
    top1.plot(minutes, [100 * e.top1 for e in epochs], "o-", ms=3, color="tab:green")
    top1.set_ylabel("top-1 on held-out images, %")
    top1.set_xlabel("time, minutes")
    last = epochs[-1]
    top1.annotate(
        f"{100 * last.top1:.1f} %",
        (minutes[-1], 100 * last.top1),
        textcoords="offset points",
        xytext=(-6, -14),
        ha="right",
    )
    for axes in (loss, top1):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        _draw_bands(axes, epochs, has_labels=axes is loss)
    top1.set_xlim(0, minutes[-1] * 1.02)
    figure.suptitle(title)
    png = io.BytesIO()
    figure.savefig(png, dpi=120, format="png")
    write_bytes(run / CURVES_FILE, png.getvalue())
    return run / CURVES_FILE


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
