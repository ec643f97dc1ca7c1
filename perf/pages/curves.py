"""Rows, layers and history -> pictures for report.md, beside the bars of plots.py."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from efficientnet.formats.records import LatencyRecord
from efficientnet.measuring.intervals import wilson_interval
from efficientnet.runtimes.names import title
from perf.layer_times.layer_tables import ProgramLayers, least_ms
from perf.measurements.scenarios import BATCH16, SERVER, SINGLE_STREAM, Scenario
from perf.pages.document import PAPER, machine_name
from perf.pages.history import Line
from perf.pages.plots import COLORS, LIGHT, MARKERS
from perf.pages.rows import Group, Row

# What one picture can show of lines that are told apart.
MAX_LINES = 8
MAX_LAYERS = 15
MAX_ERROR_BARS = 200

SIZE_INCHES = (7.2, 4.2)
DOTS_PER_INCH = 160


def draw_tradeoff(group: Group) -> bytes | None:
    """Draw latency against accuracy with the Pareto front; at batch 16 the paper's points too."""
    shown = [s for s in (SINGLE_STREAM, BATCH16) if any(r.latency.p50_ms for r in group.of(s))]
    if not shown:
        return None

    def draw(figure: Figure) -> None:
        for axes, scenario in zip(_panels(figure, len(shown)), shown, strict=True):
            _tradeoff(axes, [r for r in group.of(scenario) if r.latency.p50_ms], scenario)

    return _picture(draw, len(shown))


def draw_batches(group: Group) -> bytes | None:
    """Draw time and images a second against batch, of programs measured at several sizes."""
    programs: dict[tuple[object, ...], dict[int, LatencyRecord]] = {}
    for row in group.rows:
        record = row.latency
        if row.scenario != SERVER and record.p50_ms:
            key = (record.program_sha256, record.runtime, record.num_threads, record.timed_region)
            programs.setdefault(key, {})[record.batch_size] = record
    lines = [own for own in programs.values() if len(own) > 1]
    # The most images a second first.
    lines.sort(key=lambda own: -max(r.throughput_images_per_s for r in own.values()))
    if not lines:
        return None

    def draw(figure: Figure) -> None:
        time, rate = _panels(figure, 2)
        for index, own in enumerate(lines[:MAX_LINES]):
            sizes = sorted(own)
            style = _style(index)
            name = _name(next(iter(own.values())))
            time.plot(sizes, [own[size].p50_ms or 0 for size in sizes], label=name, **style)
            rate.plot(sizes, [own[size].throughput_images_per_s for size in sizes], **style)
        every = sorted({size for own in lines[:MAX_LINES] for size in own})
        for axes, text in ((time, "p50 of a call, ms (log)"), (rate, "images/s (log)")):
            _set_log(axes, "y")
            axes.set(xscale="log", xticks=every, xticklabels=every)
            axes.xaxis.set_minor_locator(NullLocator())
            _finish(axes, text, "images in a call", _most(len(lines)))

    return _picture(draw, 2)


def draw_samples(group: Group, folder: Path) -> bytes | None:
    """Draw the share of calls that end within a time, of the fastest rows at batch 1."""
    rows = sorted(
        (row for row in group.of(SINGLE_STREAM) if row.latency.p50_ms),
        key=lambda row: row.latency.p50_ms or 0,
    )[:MAX_LINES]
    samples_of = [(row, samples) for row in rows if (samples := _samples(row, folder)) is not None]
    if not samples_of:
        return None

    def draw(figure: Figure) -> None:
        (axes,) = _panels(figure, 1)
        for index, (row, own) in enumerate(samples_of):
            samples = np.sort(own)
            shares = 100 * np.arange(1, len(samples) + 1) / len(samples)
            axes.step(samples, shares, where="post", color=COLORS[index], label=_name(row.latency))
        _set_log(axes, "x")
        _finish(axes, "% of calls within", f"ms of a call {SINGLE_STREAM.where} (log)", "")

    return _picture(draw, 1)


def draw_layers(programs: Sequence[ProgramLayers]) -> bytes | None:
    """Draw the slowest layers of programs and what limits each, one panel for a program."""
    shown = programs[:4]
    if not shown:
        return None

    def draw(figure: Figure) -> None:
        for axes, program in zip(_panels(figure, len(shown)), shown, strict=True):
            layers = sorted(program.layers, key=lambda layer: -layer.ms)[:MAX_LAYERS]
            places = range(len(layers))
            axes.barh(places, [layer.ms for layer in layers], color=COLORS[5])
            for place, layer in zip(places, layers, strict=True):
                least = least_ms(program, layer)
                if least is not None:
                    axes.vlines(least, place - 0.4, place + 0.4, color=LIGHT.text, lw=2)
            axes.set_yticks(places, [layer.module or layer.name for layer in layers], size=7)
            axes.invert_yaxis()
            name = f"{program.variant}, {title(program.runtime, program.precision)}"
            _finish(
                axes, "", "ms of the slowest layers; line: the least that its limit allows", name
            )

    return _picture(draw, len(shown))


def draw_history(lines: Sequence[Line]) -> bytes | None:
    """Draw medians over commits, of one image and the programs with the most commits first."""
    shown = sorted(lines, key=lambda line: (line.batch, -len(line.points)))[:MAX_LINES]
    if not shown:
        return None
    points = sorted({(p.date, p.commit) for line in shown for p in line.points})
    places = {commit: place for place, (_, commit) in enumerate(points)}

    def draw(figure: Figure) -> None:
        (axes,) = _panels(figure, 1)
        for index, line in enumerate(shown):
            at = [places[p.commit] for p in line.points]
            name = f"{line.network} {line.runtime} {line.precision}, batch {line.batch}"
            axes.plot(at, [p.p50 for p in line.points], label=name, **_style(index))
        every = -(-len(points) // 10)
        ticks = list(range(0, len(points), every))
        axes.set_xticks(ticks, [points[i][1][:7] for i in ticks])
        # Above the lines is room for their names.
        axes.set_ylim(0, 1.7 * max(p.p50 for line in shown for p in line.points))
        machines = "; ".join(dict.fromkeys(line.machine for line in shown))
        _finish(axes, "p50 of a call, ms", f"commit, oldest first; {machines}", _most(len(lines)))
        axes.legend(frameon=False, fontsize=7, loc="upper left", ncols=2)

    return _picture(draw, 1)


def _tradeoff(axes: Axes, rows: Sequence[Row], scenario: Scenario) -> None:
    for index, runtime in enumerate(dict.fromkeys(row.latency.runtime for row in rows)):
        own = [row for row in rows if row.latency.runtime == runtime]
        times_ms = [row.latency.p50_ms or 0 for row in own]
        top1s = [100 * row.accuracy.top1 for row in own]
        if len(rows) <= MAX_ERROR_BARS:
            errors = np.transpose([_interval(row) for row in own])
            axes.errorbar(times_ms, top1s, yerr=errors, fmt="none", ecolor=LIGHT.line, zorder=1)
        size = 5 if len(rows) <= MAX_ERROR_BARS else 2
        name = title(runtime, "").strip()
        axes.plot(times_ms, top1s, ls="", ms=size, label=name, **_style(index))
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.latency.p50_ms, -row.accuracy.top1)):
        if not front or row.accuracy.top1 > front[-1].accuracy.top1:
            front.append(row)
    x, y = [r.latency.p50_ms or 0 for r in front], [100 * r.accuracy.top1 for r in front]
    axes.step(x, y, where="post", color=LIGHT.text, lw=1.2, label="Pareto front")
    for row, time_ms, top1 in list(zip(front, x, y, strict=True))[:MAX_LINES]:
        name = f"{row.label} {row.latency.precision}"
        axes.annotate(name, (time_ms, top1), (5, 5), textcoords="offset points", size=7.5)
    if scenario == BATCH16:
        text = "the paper, V100 fp16: another device, ImageNet"
        times_ms, top1s = [ms for _, ms, _ in PAPER], [top1 for _, _, top1 in PAPER]
        axes.plot(times_ms, top1s, "D", mfc="none", color=LIGHT.muted, label=text)
        for name, time_ms, top1 in PAPER:
            axes.annotate(name, (time_ms, top1), (5, -10), textcoords="offset points", size=7.5)
    _set_log(axes, "x")
    _finish(axes, "top-1, % (bars: 95 % interval)", f"p50 of a call {scenario.where}, ms (log)", "")


def _interval(row: Row) -> tuple[float, float]:
    accuracy = row.accuracy
    low, high = wilson_interval(round(accuracy.top1 * accuracy.num_images), accuracy.num_images)
    return 100 * max(0, accuracy.top1 - low), 100 * max(0, high - accuracy.top1)


def _samples(row: Row, folder: Path) -> np.ndarray | None:
    samples = row.latency.samples_ms
    if not isinstance(samples, str):
        return np.asarray(samples)
    return np.load(folder / samples) if (folder / samples).is_file() else None


def _name(record: LatencyRecord) -> str:
    program = title(record.runtime, record.precision)
    return f"{record.variant}, {record.image_size} px, {program}"


def _most(count: int) -> str:
    return f"{MAX_LINES} of {count:,}" if count > MAX_LINES else ""


def _style(index: int) -> dict[str, Any]:
    return {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}


def _panels(figure: Figure, count: int) -> list[Axes]:
    return list(figure.subplots(count, 1, squeeze=False)[:, 0])


def _set_log(axes: Axes, which: Literal["x", "y"]) -> None:
    # Numbers as they are, and not as powers of ten.
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_data_interval()
    axes.set(**{f"{which}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 8 * low else range(1, 10)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())


def _finish(axes: Axes, y: str, x: str, heading: str) -> None:
    axes.set_ylabel(y, color=LIGHT.muted)
    axes.set_xlabel(x, color=LIGHT.muted)
    axes.set_title(heading, loc="left", size=9, parse_math=False)
    axes.grid(color=LIGHT.line, lw=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(colors=LIGHT.muted, labelsize=8)
    for spine in axes.spines.values():
        spine.set_color(LIGHT.line)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, loc="lower right")


def _picture(draw: Callable[[Figure], None], num_panels: int) -> bytes:
    width, height = SIZE_INCHES
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 9, "text.parse_math": False}):
        figure = Figure((width, height * num_panels), DOTS_PER_INCH, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def draw_all(
    groups: Sequence[Group], folder: Path, layers: Sequence[ProgramLayers], lines: Sequence[Line]
) -> dict[str, tuple[str, bytes]]:
    """Draw what there is; return text and PNG of each by the name of its file.

    Args:
        groups: a picture of each, numbered where there are several.
        folder: where files of samples lie that records name.
        layers: see draw_layers.
        lines: see draw_history.
    """
    pictures: dict[str, tuple[str, bytes | None]] = {}
    for number, group in enumerate(groups, start=1):
        suffix = f"-{number}" if len(groups) > 1 else ""
        where = f", {machine_name(group.environment)}"
        pictures[f"tradeoff{suffix}.png"] = (
            "Latency against accuracy" + where,
            draw_tradeoff(group),
        )
        pictures[f"batches{suffix}.png"] = ("Against batch size" + where, draw_batches(group))
        pictures[f"samples{suffix}.png"] = (
            "Distribution of samples" + where,
            draw_samples(group, folder),
        )
    pictures["layers.png"] = ("Layers and their limits", draw_layers(layers))
    pictures["history.png"] = ("Medians over commits", draw_history(lines))
    return {name: (text, made) for name, (text, made) in pictures.items() if made is not None}
