"""SearchRecord -> PNGs: reward over trials, accuracy against time and size, choices of the best."""

import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from training.running.drawing import LINE, MUTED, TEXT, draw_png
from training.searching.search_record import SearchRecord
from training.searching.search_tables import KINDS, best_trials, shares

BLUE, LIGHT, ORANGE = "#1f5f9e", "#9cc3ea", "#b3421e"
SHADES = ("#1f5f9e", "#7fb2e5", "#c9dff5", "#e8a06a", "#b3421e")


def pictures(record: SearchRecord) -> dict[str, bytes]:
    """Draw what there is to draw: the end of the file's name -> a PNG."""
    if not record.whole:
        return {}
    drawn = {
        "reward": draw_png((7.6, 4.2), lambda figure: _draw_rewards(figure, record)),
        "plane": draw_png((11.0, 4.8), lambda figure: _draw_planes(figure, record)),
        "choices": draw_png((11.0, 4.0), lambda figure: _draw_choices(figure, record)),
    }
    if record.importances:
        size = (6.4, 1.2 + 0.2 * len(record.importances))
        drawn["importance"] = draw_png(size, lambda figure: _draw_importances(figure, record))
    return drawn


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
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(NullFormatter())
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


def _draw_choices(figure: Figure, record: SearchRecord) -> None:
    best, stages = best_trials(record), range(1, len(record.space.backbone.stages) + 1)
    panels = figure.subplots(1, len(KINDS), sharey=True)
    for axes, (kind, title) in zip(panels, KINDS.items(), strict=True):
        every = [shares(record.space, best, f"stage{stage}.{kind}") for stage in stages]
        bottoms = [0.0] * len(stages)
        choices = sorted({choice for share in every for choice in share}, key=str)
        for choice, color in zip(choices, SHADES, strict=False):
            heights = [100 * share.get(choice, 0.0) for share in every]
            axes.bar(list(stages), heights, 0.75, bottoms, color=color, label=str(choice))
            bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
        _style(axes, title, "stage", f"of the best {len(best)}, %" if axes is panels[0] else "")
        axes.set_xticks(list(stages))
        axes.set_ylim(0, 100)
        axes.legend(
            frameon=False, labelcolor=TEXT, fontsize=8, ncols=3, loc="upper center",
            bbox_to_anchor=(0.5, -0.16),
        )  # fmt: skip


def _draw_importances(figure: Figure, record: SearchRecord) -> None:
    axes, rows = figure.add_subplot(), list(reversed(record.importances.items()))
    axes.barh([name for name, _ in rows], [100 * share for _, share in rows], color=BLUE)
    _style(axes, "What the reward depends on (fANOVA)", "of its variance, %", "")
