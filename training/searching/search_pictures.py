"""SearchRecord -> PNGs: reward over trials, and accuracy against time and size."""

import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter

from training.running.pictures import LINE, MUTED, TEXT, draw_png
from training.searching.search_record import SearchRecord

BLUE, LIGHT, ORANGE = "#1f5f9e", "#9cc3ea", "#b3421e"


def pictures(record: SearchRecord) -> dict[str, bytes]:
    """Draw what there is to draw: the end of the file's name -> a PNG."""
    if not record.whole:
        return {}
    return {
        "reward": draw_png((7.6, 4.2), lambda figure: _draw_rewards(figure, record)),
        "plane": draw_png((11.0, 4.8), lambda figure: _draw_planes(figure, record)),
    }


def _style(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", weight="bold", color=TEXT)
    axes.set_xlabel(x, color=MUTED)
    axes.set_ylabel(y, color=MUTED)
    axes.grid(alpha=0.6, color=LINE)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=MUTED)


def _draw_rewards(figure: Figure, record: SearchRecord) -> None:
    axes, whole = figure.add_subplot(), record.whole
    numbers = [trial.number for trial in whole]
    rewards = [trial.reward or 0.0 for trial in whole]
    best = [max(rewards[: i + 1]) for i in range(len(rewards))]
    axes.plot(numbers, rewards, "o", ms=4, color=LIGHT, mew=0, label="a network")
    axes.step(numbers, best, where="post", color=BLUE, lw=1.8, label="best so far")
    for outcome, color in (("pruned", MUTED), ("failed", ORANGE)):
        lost = [trial.number for trial in record.trials if trial.outcome == outcome]
        if lost:
            low = [min(rewards)] * len(lost)
            axes.plot(lost, low, "|", ms=7, color=color, label=f"{outcome}: {len(lost)}")
    _style(axes, f"Reward over trials: {record.name}", "trial", "reward")
    axes.legend(frameon=False, labelcolor=TEXT, fontsize=8.5, loc="lower right")


def _draw_planes(figure: Figure, record: SearchRecord) -> None:
    panels = figure.subplots(1, 2)
    # A network that was not trained to its end says nothing of its accuracy.
    for axes, ratio, name in (
        (panels[0], lambda row: row.step_ratio, "time of a training step"),
        (panels[1], lambda row: row.size_ratio, "parameters"),
    ):
        whole = [t for t in record.whole if t.top1 is not None and ratio(t) is not None]
        points = [(ratio(trial), 100 * (trial.top1 or 0.0)) for trial in whole]
        axes.scatter(
            *zip(*points, strict=True),
            c=[trial.reward or 0.0 for trial in whole],
            cmap="Blues",
            s=18,
            edgecolors=MUTED,
            linewidths=0.3,
        )
        front = pareto_front(points)
        axes.step(*zip(*front, strict=True), where="post", color=BLUE, lw=1.2, label="front")
        best = record.best_trial
        assert best is not None
        top1 = 100 * (best.top1 or 0.0)
        axes.plot(ratio(best), top1, "*", ms=15, color=ORANGE, mec="white", label="found")
        names = {run.name: run.role for run in record.compared if run.role != "found"}
        for number, (own, role) in enumerate(names.items()):
            runs = [run for run in record.compared if run.name == own and run.role != "found"]
            axes.plot(
                statistics.fmean(ratio(run) for run in runs),
                statistics.fmean(100 * run.minival_top1 for run in runs),
                "sD^v<>"[number % 6],
                ms=8,
                color=TEXT,
                mec="white",
                label=f"{own}{' (reference)' if role == 'reference' else ''}",
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(FormatStrFormatter("%g"))
        axes.tick_params(axis="x", which="minor", labelsize=7, colors=MUTED)
        reference = record.setting["reference"]
        _style(axes, f"Accuracy against {name}", f"{name}, {reference} = 1", "top-1, minival, %")
    panels[0].legend(frameon=False, labelcolor=TEXT, fontsize=8.5, loc="lower right")


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points, by rising x, than which none has a smaller x and a larger y."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front
