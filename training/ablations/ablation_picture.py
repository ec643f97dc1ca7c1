"""AblationRecord -> a PNG: top-1 over training time, and top-1 by magnitude and image size."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from training.ablations import ablation_plan as plan
from training.ablations import ablation_results as results
from training.ablations.ablation_results import AblationRecord
from training.running.drawing import LINE, MUTED, TEXT, draw_png
from training.studies.spread import Spread, spread

COLORS = {
    plan.PROGRESSIVE_ADAPTIVE: "#1f5f9e",
    plan.PROGRESSIVE: "#7fb2e5",
    plan.FIXED: "#3d444d",
    plan.RANDOM: "#e8a06a",
    plan.RANDOM_ADAPTIVE: "#b3421e",
}
SHADES = LinearSegmentedColormap.from_list("shades", ["#f6f9fc", "#8fbce6"])


def draw(record: AblationRecord) -> bytes:
    """Draw top-1 over time by schedule, and by magnitude and size beside the paper's; a PNG."""
    has_schedules, has_magnitudes = record.has("schedules"), record.has("magnitudes")
    widths = [1.6] * has_schedules + [1.0, 1.0] * has_magnitudes

    def draw_panels(figure: Figure) -> None:
        panels = list(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])
        if has_schedules:
            _draw_schedules(panels.pop(0), record)
        if has_magnitudes:
            ours, papers = panels
            sizes, magnitudes = record.image_sizes, record.magnitudes
            title = f"Magnitude by size: {record.variant} on {record.name}"
            _draw_grid(ours, results.magnitude_grid(record), sizes, magnitudes, title)
            sizes, magnitudes = results.PAPER_SIZES, results.PAPER_MAGNITUDES
            title = "The paper: ImageNet, Table 5"
            _draw_grid(papers, results.paper_grid(), sizes, magnitudes, title)

    return draw_png((4.1 * sum(widths) + 0.4, 4.8), draw_panels, 150)


def _draw_schedules(axes: Axes, record: AblationRecord) -> None:
    for name, color in COLORS.items():
        runs, values = record.of(name), results.points(record, name)
        seconds = [run.seconds for run in runs]
        time_s, top1 = spread(seconds), spread(values)
        axes.plot(seconds, values, "o", ms=3, color=color, alpha=0.55, mew=0)
        axes.errorbar(
            time_s.mean,
            top1.mean,
            xerr=time_s.std or 0,
            yerr=top1.std or 0,
            fmt="s" if name == plan.FIXED else "o" if "progressive" in name else "D",
            ms=9,
            mec="white",
            color=color,
            capsize=3,
            lw=1.3,
            label=f"{name}: {top1.text()} %",
        )
    axes.set_title("Top-1 over training time, by schedule", loc="left", weight="bold", color=TEXT)
    axes.set_xlabel("seconds in training (small dots: the seeds)", color=MUTED)
    axes.set_ylabel(f"top-1 at {record.image_sizes[2]} px, %", color=MUTED)
    axes.margins(0.1, 0.15)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.6, color=LINE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=MUTED)
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.13),
        ncols=2,
        frameon=False,
        labelcolor=TEXT,
        fontsize=8.5,
    )


def _draw_grid(
    axes: Axes,
    grid: Sequence[Sequence[Spread]],
    sizes: Sequence[int],
    magnitudes: Sequence[float],
    title: str,
) -> None:
    means = np.asarray([[cell.mean for cell in row] for row in grid])  # [magnitude, size]
    behind = means - means.max(axis=0)
    axes.imshow(behind, cmap=SHADES, vmin=min(behind.min(), -0.1), vmax=0, aspect="auto")
    for (row, column), value in np.ndenumerate(behind):
        cell = grid[row][column]
        std = "" if cell.std is None else f"\n± {cell.std:.2g}"
        axes.text(
            column,
            row,
            f"{cell.mean:.1f}{std}",
            ha="center",
            va="center",
            color=TEXT,
            weight="bold" if value == 0 else "normal",
        )
        if value == 0:
            box = Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, fill=False, ec=TEXT, lw=2)
            axes.add_patch(box)
    axes.set_xticks(range(len(sizes)), [f"{size} px" for size in sizes])
    axes.set_yticks(range(len(magnitudes)), [f"{m:g}" for m in magnitudes])
    axes.set_ylabel("RandAugment magnitude", color=MUTED)
    axes.set_xlabel("top-1, %; framed: best of a size, lighter: further behind it", color=MUTED)
    axes.set_title(title, loc="left", weight="bold", color=TEXT)
    axes.tick_params(length=0, colors=TEXT)
    axes.spines[:].set_visible(False)
