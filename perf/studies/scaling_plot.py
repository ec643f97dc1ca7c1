"""Times by program and number of threads -> scaling.png, beside times shared without loss."""

import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from perf.pages.plots import COLORS, LIGHT, MARKERS, Palette

DOTS_PER_INCH = 200
SIZE_INCHES = (5.4, 4.0)


def draw_scaling(
    lines: Mapping[str, Sequence[tuple[int, float]]], title: str, palette: Palette = LIGHT
) -> bytes:
    """Draw a line for each program, and return a PNG.

    Args:
        lines: by program, numbers of threads, ascending, and the milliseconds of a call.
        title: what stands above.
        palette: colors.
    """
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 9.5}):
        figure = Figure(SIZE_INCHES, DOTS_PER_INCH, facecolor=palette.page, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_facecolor(palette.page)
        for index, (name, points) in enumerate(lines.items()):
            threads = [count for count, _ in points]
            color = COLORS[index % len(COLORS)]
            fewest, longest = points[0]
            ideal = [longest * fewest / count for count in threads]
            axes.plot(threads, ideal, color=color, lw=0.8, ls=":")
            axes.plot(
                threads,
                [ms for _, ms in points],
                marker=MARKERS[index % len(MARKERS)],
                color=color,
                lw=1.4,
                ms=6,
                label=name,
            )
        counts = sorted({count for points in lines.values() for count, _ in points})
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(counts))
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_locator(NullLocator())
        axes.tick_params(colors=palette.muted, color=palette.line, labelsize=8.5)
        axes.grid(color=palette.line, lw=0.5)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_color(palette.line)
        axes.set_xlabel("threads; dotted: time that is shared without loss", color=palette.muted)
        axes.set_ylabel("p50 of a call, ms (log)", color=palette.muted)
        axes.set_title(title, loc="left", color=palette.text, size=9.5, parse_math=False)
        axes.legend(frameon=False, labelcolor=palette.text, fontsize=8.5)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", facecolor=palette.page, metadata={"Software": None})
    return picture.getvalue()
