"""Rows -> latency.png: time of a call and images a second, the eager model as reference."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from efficientnet.reporting.tables import format_ms, format_rate, format_ratio
from efficientnet.runtimes.names import title
from perf.measurements.scenarios import SCENARIOS, Scenario
from perf.pages.document import machine_name
from perf.pages.rows import Group, Row

# Narrow, so that the text can still be read on a phone.
WIDTH_INCHES = 5.4
ROW_INCHES = 0.62
TITLE_INCHES = 0.5
AXIS_INCHES = 0.65
PLACE_INCHES = 0.2
DOTS_PER_INCH = 220

TEXT_SIZE = 10.5
# A name and a value share the line above a bar; longer ones are set smaller.
MAX_CHARACTERS = 56

# Of a panel; a picture of thousands is none.
MAX_BARS = 24

# A tail many times the median would leave nothing of the bars; what lies beyond is marked.
MAX_TAIL = 1.6

# Told apart with any kind of color vision (Okabe and Ito), and by shape.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclass(frozen=True)
class Palette:
    """Colors of a picture."""

    page: str
    text: str
    muted: str
    line: str
    eager: str
    other: str


LIGHT = Palette("#ffffff", "#1f2328", "#59636e", "#d8dee4", "#9aa4af", "#1f77d0")


def draw(groups: Sequence[Group], palette: Palette = LIGHT) -> bytes:
    """Draw a panel for each scenario of each group, one below the other, and return a PNG.

    A bar of a time is the median, the tick after it p90 and the dot p99; a percentile of
    too few calls is not drawn. Of many rows the first ones are shown, in the scenario's order.
    """
    panels: list[tuple[Group, list[Row], Scenario]] = []
    for group in groups:
        for scenario in SCENARIOS.values():
            if rows := group.of(scenario):
                panels.append((group, rows[:MAX_BARS], scenario))
    axis = AXIS_INCHES + (PLACE_INCHES if len(groups) > 1 else 0)
    heights = [TITLE_INCHES + ROW_INCHES * len(rows) + axis for _, rows, _ in panels]
    with mpl.rc_context(
        {"font.family": "DejaVu Sans", "font.size": TEXT_SIZE, "hatch.linewidth": 1.5}
    ):
        figure = Figure((WIDTH_INCHES, sum(heights)), DOTS_PER_INCH, facecolor=palette.page)
        FigureCanvasAgg(figure)
        top = sum(heights)
        for (group, rows, scenario), height in zip(panels, heights, strict=True):
            axes = figure.add_axes(
                (
                    0.03,
                    (top - height + axis) / sum(heights),
                    0.94,
                    (ROW_INCHES * len(rows)) / sum(heights),
                )
            )
            top -= height
            place = machine_name(group.environment) if len(groups) > 1 else ""
            _draw_panel(axes, rows, scenario, place, palette)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", facecolor=palette.page, metadata={"Software": None})
    return picture.getvalue()


def _draw_panel(
    axes: Axes, rows: Sequence[Row], scenario: Scenario, place: str, palette: Palette
) -> None:
    is_time = scenario.compares == "time"
    values = [
        (row.latency.p50_ms or 0.0) if is_time else row.latency.throughput_images_per_s
        for row in rows
    ]
    tails = [row.latency.p99_ms or row.latency.p90_ms or 0.0 for row in rows] if is_time else []
    longest = max(values) or 1.0
    limit = 1.04 * min(max([longest, *tails]), MAX_TAIL * longest)
    names = _names(rows)
    for position, (row, value, name) in enumerate(zip(rows, values, names, strict=True)):
        color = palette.eager if row.is_eager else palette.other
        hatch = "////" if row.instabilities else None
        axes.barh(position, value, 0.36, color=color, hatch=hatch, edgecolor=palette.page, lw=0)
        if is_time:
            _draw_tail(axes, row, position, limit, palette)
        _draw_reference(axes, row, position, is_time, palette)
        _write_labels(axes, row, position, name, is_time, palette)
    axes.set_xlim(0, limit)
    axes.set_ylim(len(rows) - 0.55, -0.8)
    axes.set_yticks([])
    heading = f"Images/s {scenario.where} (more is better)"
    if is_time:
        heading = f"Time of a call {scenario.where}, ms (less is better)"
    axes.set_title(heading, loc="left", color=palette.text, weight="bold", size=11.5, pad=8)
    legend = [
        "bar: p50, tick: p90, dot: p99" if is_time else "",
        "line across: eager" if any(row.eager and not row.is_eager for row in rows) else "",
        "hatched: not stable" if any(row.instabilities for row in rows) else "",
    ]
    caption = "\n".join(filter(None, ("; ".join(filter(None, legend)), place)))
    axes.set_xlabel(caption, loc="left", color=palette.muted, size=9)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.tick_params(axis="x", colors=palette.muted, labelsize=9, length=3, color=palette.line)
    axes.set_facecolor(palette.page)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(palette.line)


def _draw_reference(axes: Axes, row: Row, position: int, is_time: bool, palette: Palette) -> None:
    if row.eager is None or row.is_eager:
        return
    eager = row.eager.latency
    value = eager.p50_ms if is_time else eager.throughput_images_per_s
    if value is not None:
        axes.vlines(value, position - 0.2, position + 0.2, color=palette.eager, lw=2, zorder=3)


def _draw_tail(axes: Axes, row: Row, position: int, limit: float, palette: Palette) -> None:
    p50, p90, p99 = row.latency.p50_ms, row.latency.p90_ms, row.latency.p99_ms
    end = p99 or p90
    if p50 is None or end is None:
        return
    style = {"color": palette.text, "lw": 1.2, "solid_capstyle": "butt"}
    axes.plot([p50, min(end, limit)], [position, position], **style)
    if p90 is not None and p90 <= limit:
        axes.plot([p90, p90], [position - 0.12, position + 0.12], **style)
    if p99 is not None and p99 <= limit:
        axes.plot([p99], [position], marker="o", ms=4.5, color=palette.text, clip_on=False)
    if end > limit:
        axes.plot([limit], [position], marker=">", ms=5, color=palette.text, clip_on=False)
        percent = "p99" if p99 else "p90"
        axes.annotate(
            f"{percent} {format_ms(end)}",
            (limit, position),
            (-8, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            size=8.5,
            color=palette.muted,
        )


def _write_labels(
    axes: Axes, row: Row, position: int, name: str, is_time: bool, palette: Palette
) -> None:
    record = row.latency
    if not is_time:
        value = f"{format_rate(record.throughput_images_per_s)} (batch {record.batch_size})"
        ratio = row.ratio
        comparison = f", {format_ratio(ratio)} times eager"
    elif record.p50_ms is not None:
        value, ratio = f"{format_ms(record.p50_ms)} ms", row.ratio
        comparison = f", {format_ratio(ratio)} of eager"
    else:
        value, ratio, comparison = "too few calls", None, ""
    if ratio is None or row.is_eager:
        comparison = ""
    across = axes.get_yaxis_transform()
    value += comparison
    style = {
        "transform": across,
        "color": palette.text,
        "va": "bottom",
        "parse_math": False,
        "size": TEXT_SIZE * min(1, MAX_CHARACTERS / len(name + value)),
    }
    axes.text(0, position - 0.27, name, ha="left", **style)
    axes.text(1, position - 0.27, value, ha="right", **style)


def _names(rows: Sequence[Row]) -> list[str]:
    """Name the rows with what tells them apart."""
    has_several_threads = len({row.latency.num_threads for row in rows}) > 1
    has_several_sizes = len({(row.label, row.latency.image_size) for row in rows}) > len(
        {row.label for row in rows}
    )
    return [
        f"{row.label}, {title(row.latency.runtime, row.latency.precision)}"
        + (f", {row.latency.image_size} px" if has_several_sizes else "")
        + (f", {row.latency.num_threads} threads" if has_several_threads else "")
        for row in rows
    ]
