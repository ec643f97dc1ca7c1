"""Programs of a device -> choice.png: time against top-1, the Pareto front, the choice."""

import io
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from efficientnet.runtimes.names import RUNTIMES
from perf.choosing.candidates import Candidate
from perf.choosing.config import ChooseConfig
from perf.pages.plots import COLORS, LIGHT, MARKERS

SIZE_INCHES = (7.2, 5.0)
DOTS_PER_INCH = 200


def draw_choice(
    candidates: Sequence[Candidate], chosen: Candidate, config: ChooseConfig, title: str
) -> bytes:
    """Draw those that have both a time and an accuracy, and return a PNG."""
    shown = [
        (c, c.latency_ms, 100 * c.top1, [100 * end for end in c.top1_interval])
        for c in candidates
        if c.latency_ms is not None and c.top1 is not None and c.top1_interval is not None
    ]
    palette = LIGHT
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 9.5}):
        figure = Figure(SIZE_INCHES, DOTS_PER_INCH, facecolor=palette.page, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_facecolor(palette.page)
        axes.axvline(config.budget_ms, color=palette.muted, lw=1, ls="--")
        axes.annotate(
            f"budget {config.budget_ms:g} ms",
            (config.budget_ms, 0.01),
            (-4, 2),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            rotation=90,
            ha="right",
            color=palette.muted,
        )
        if config.min_top1 is not None:
            axes.axhline(100 * config.min_top1, color=palette.muted, lw=1, ls=":")
        for index, runtime in enumerate(dict.fromkeys(c.runtime for c, *_ in shown)):
            own = [entry for entry in shown if entry[0].runtime == runtime]
            axes.errorbar(
                [time_ms for _, time_ms, _, _ in own],
                [top1 for _, _, top1, _ in own],
                yerr=[[t - i[0] for _, _, t, i in own], [i[1] - t for _, _, t, i in own]],
                fmt=MARKERS[index % len(MARKERS)],
                color=COLORS[index % len(COLORS)],
                ecolor=palette.line,
                elinewidth=1,
                ms=6,
                label=RUNTIMES[runtime].title if runtime in RUNTIMES else runtime,
            )
        points = sorted((time_ms, top1) for c, time_ms, top1, _ in shown if c.is_on_front)
        xs, ys = zip(*points, strict=True) if points else ((), ())
        axes.step(xs, ys, where="post", color=palette.text, lw=1.2, label="Pareto front", zorder=4)
        for candidate, time_ms, top1, _ in shown:
            if candidate.is_on_front or candidate is chosen:
                axes.annotate(
                    f"{candidate.variant} {candidate.precision}",
                    (time_ms, top1),
                    (6, 6),
                    textcoords="offset points",
                    color=palette.text,
                    parse_math=False,
                    weight="bold" if candidate is chosen else "normal",
                    size=8.5,
                )
            if candidate is chosen:
                axes.plot(
                    [time_ms], [top1], "o", ms=14, mfc="none", mec=palette.text, mew=1.6,
                    label="chosen",
                )  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(colors=palette.muted, color=palette.line, labelsize=8.5)
        axes.grid(color=palette.line, lw=0.5)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_color(palette.line)
        hidden = len(candidates) - len(shown)
        caption = f"p{config.percentile} of a call at batch 1, ms (log); bars: 95 % interval"
        if hidden:
            caption += f"; {hidden} without accuracy or with too few calls not drawn"
        axes.set_xlabel(caption, color=palette.muted)
        axes.set_ylabel("top-1, %", color=palette.muted)
        axes.set_title(title, loc="left", color=palette.text, size=10, parse_math=False)
        axes.legend(loc="lower right", frameon=False, labelcolor=palette.text, fontsize=8.5)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", facecolor=palette.page, metadata={"Software": None})
    return picture.getvalue()
