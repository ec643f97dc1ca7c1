"""What a load test measured -> record, tables and picture."""

import io
import math
from collections.abc import Sequence
from typing import Literal, get_args

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict, Field

from efficientnet.measuring.clock import percentile
from efficientnet.reporting.publishing import Measured, published_directory
from efficientnet.reporting.tables import NOTHING, Table, format_ms, format_percent, format_rate
from perf.service_load.load_generator import Answers, Schedule

SECTION = "load"

Peer = Literal["litserve", "fastapi"]
Service = Literal["batched", "unbatched", Peer]

TITLES: dict[Service, str] = {
    "batched": "service",
    "unbatched": "service without batching",
    "litserve": "LitServe",
    "fastapi": "FastAPI",
}
COLORS: dict[Service, str] = {
    "batched": "#1f77d0",
    "unbatched": "#9aa4af",
    "litserve": "#7b3fb5",
    "fastapi": "#c2571a",
}

# Share of the requests that must be answered within the bound.
SHARE_IN_TIME = 0.99


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Point(_Frozen):
    """A service at one rate of planned requests."""

    service: Service
    schedule: Schedule
    offered_per_s: float
    """Planned requests a second."""
    num_requests: int
    answered_per_s: float
    """Answers of status 200, from the first planned time to the last answer."""
    in_time_per_s: float
    """Goodput: planned requests a second that were answered within the bound."""
    share_in_time: float
    p50_ms: float | None
    """None where more than half were refused or failed."""
    p99_ms: float | None
    """None where there were too few requests, or more than one of 100 refused or failed."""
    num_refused: int
    num_failed: int
    generator_lag_p99_ms: float
    """How late requests were sent; included in the latencies."""


class SingleClient(_Frozen):
    """One request at a time."""

    plain_p50_ms: float
    """Decode, preprocess and infer, called in a loop with all threads."""
    service_p50_ms: dict[Service, float]


class Saturated(_Frozen):
    """As much as there can be, images a second."""

    plain_images_per_s: dict[int, float]
    """Of one process a core, with a thread each, by batch size."""
    service_images_per_s: dict[Service, float]
    num_clients: int
    generator_cores: dict[Service, float]
    """Processors that the clients kept busy, which the service did not have."""

    @property
    def best_plain(self) -> float:
        """The best of the plain loops."""
        return max(self.plain_images_per_s.values())


class LoadRecord(Measured):
    """What one run measured."""

    format_version: Literal[1] = 1
    variant: str
    runtime: str
    precision: str
    image_size: int
    program_sha256: str
    num_photos: int
    batch: int
    seconds: float
    num_turns: int
    bound_ms: float
    single: SingleClient
    saturated: Saturated
    points: tuple[Point, ...]
    skipped: dict[Peer, str] = Field(default={})
    """Peers that were to be measured and could not, with the reason."""
    cores_busy_elsewhere: float | None
    """While the plain loop of one process was measured alone."""

    @property
    def slug(self) -> str:
        """Name of its files."""
        return f"{SECTION}-{self.variant}-{self.runtime}-{self.precision}"

    def goodput(self, service: Service, schedule: Schedule) -> float | None:
        """Return the most requests a second of which enough were answered in time."""
        rates = [
            point.in_time_per_s
            for point in self.points
            if (point.service, point.schedule) == (service, schedule)
            and point.share_in_time >= SHARE_IN_TIME
        ]
        return max(rates, default=None)


def to_point(
    service: Service,
    schedule: Schedule,
    rate: float,
    answers: Sequence[Answers],
    bound_ms: float,
    seconds: float,
) -> Point:
    """Sum a service's turns at one rate up.

    Args:
        service: which.
        schedule: of the plan.
        rate: planned, requests a second.
        answers: of each turn.
        bound_ms: what counts as in time.
        seconds: length of the plans together.
    """
    latencies = [ms for a in answers for ms in a.latencies_ms]
    num_in_time = sum(ms <= bound_ms for ms in latencies)
    return Point(
        service=service,
        schedule=schedule,
        offered_per_s=rate,
        num_requests=len(latencies),
        answered_per_s=sum(a.num_answered for a in answers) / sum(a.seconds for a in answers),
        in_time_per_s=num_in_time / seconds,
        share_in_time=num_in_time / len(latencies),
        p50_ms=_finite(percentile(latencies, 50)),
        p99_ms=_finite(percentile(latencies, 99)),
        num_refused=sum(a.num_refused for a in answers),
        num_failed=sum(a.num_failed for a in answers),
        generator_lag_p99_ms=float(np.percentile([lag for a in answers for lag in a.lags_ms], 99)),
    )


def to_markdown(record: LoadRecord, picture: str | None = None) -> str:
    """Write the tables and how they were measured.

    Args:
        record: what was measured.
        picture: its address; None = from docs/ to where it is published.
    """
    if picture is None:
        folder = published_directory(record.started_at, [record.environment])
        picture = f"../{folder.as_posix()}/{record.slug}.png"
    title = f"{record.variant}, {record.runtime} {record.precision}"
    return (
        f"### {title}, {record.image_size} px\n\n"
        f"{_summary(record).markdown()}\n\n"
        f"![Answers in time by rate]({picture})\n\n"
        f"{_by_rate(record).markdown()}\n\n"
        f"{record.environment.num_cores} cores of {record.environment.processor}, "
        f"{record.started_at:%Y-%m-%d} UTC, {record.num_photos} photos as bodies of "
        f"`POST /classify`, {record.seconds:g} s each in {record.num_turns} turns, batches of up "
        f"to {record.batch}. Latency counts from the planned time; in time: within "
        f"{record.bound_ms:.0f} ms. The goodput is that of the highest rate of which 99 of 100 "
        "were in time. The clients ran on the same cores, and took "
        f"{record.saturated.generator_cores['batched']:.2f} of one when the service was "
        "saturated."
        f"{_of_peers(record)}\n"
    )


def _of_peers(record: LoadRecord) -> str:
    names = [name for name in record.single.service_p50_ms if name in get_args(Peer)]
    how = {
        "litserve": "LitServe (a process a core, batches in each, 2 ms for them to fill; pictures "
        "in forms, since it takes no other)",
        "fastapi": "FastAPI (a process a core, a picture at a time in each)",
    }
    said = f" Peers, of the same artifact: {'; '.join(how[n] for n in names)}." if names else ""
    return said + "".join(
        f" {TITLES[name]} was not measured: {reason}." for name, reason in record.skipped.items()
    )


def draw(record: LoadRecord) -> bytes:
    """Draw the answers in time over the planned requests, and return a PNG."""
    schedules = list(dict.fromkeys(point.schedule for point in record.points))
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 10}):
        figure = Figure((5.4, 3.4 * len(schedules)), 200, layout="constrained")
        FigureCanvasAgg(figure)
        for index, schedule in enumerate(schedules):
            axes = figure.add_subplot(len(schedules), 1, index + 1)
            for service in record.single.service_p50_ms:
                own = sorted(
                    (p.offered_per_s, p.in_time_per_s)
                    for p in record.points
                    if (p.service, p.schedule) == (service, schedule)
                )
                axes.plot(
                    *zip(*own, strict=True), "o-", color=COLORS[service], label=TITLES[service]
                )
            limit = max(p.offered_per_s for p in record.points)
            axes.plot([0, limit], [0, limit], ":", color="#59636e", label="all in time")
            best = record.saturated.best_plain
            axes.axvline(best, color="#59636e", linewidth=1, label="best plain loop")
            axes.set_xlim(0)
            axes.set_ylim(0)
            axes.set_title(f"{record.variant} {record.runtime} {record.precision}, {schedule}")
            axes.set_xlabel("planned requests a second")
            axes.set_ylabel(f"answered in {record.bound_ms:.0f} ms, a second")
            axes.legend(loc="upper left", fontsize=8)  # nothing is answered before it is asked
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _summary(record: LoadRecord) -> Table:
    single, saturated = record.single, record.saturated
    columns = ("", "single client p50 ms", "above the loop ms", "saturated images/s")
    columns += ("of the best loop", *(f"goodput {s}" for s in ("poisson", "fixed")))
    plain = [
        (
            f"plain loop, a process a core, batch {size}",
            format_ms(single.plain_p50_ms) if size == 1 else NOTHING,
            NOTHING,
            format_rate(rate),
            format_percent(rate / saturated.best_plain, 0),
            NOTHING,
            NOTHING,
        )
        for size, rate in saturated.plain_images_per_s.items()
    ]
    services = [
        (
            TITLES[name],
            format_ms(p50),
            format_ms(p50 - single.plain_p50_ms) if p50 > single.plain_p50_ms else "0",
            format_rate(saturated.service_images_per_s[name]),
            format_percent(saturated.service_images_per_s[name] / saturated.best_plain, 0),
            *(_or_nothing(record.goodput(name, schedule)) for schedule in ("poisson", "fixed")),
        )
        for name, p50 in single.service_p50_ms.items()
    ]
    return Table(columns, (*plain, *services), frozenset(columns[:1]))


def _by_rate(record: LoadRecord) -> Table:
    columns = ("schedule", "planned/s", "", "in time/s", "in time", "p50 ms", "p99 ms", "refused")
    columns += ("failed", "sent late, p99 ms")
    rows = tuple(
        (
            point.schedule,
            format_rate(point.offered_per_s),
            TITLES[point.service],
            format_rate(point.in_time_per_s) if point.in_time_per_s else "0",
            format_percent(point.share_in_time),
            NOTHING if point.p50_ms is None else format_ms(point.p50_ms),
            NOTHING if point.p99_ms is None else format_ms(point.p99_ms),
            str(point.num_refused),
            str(point.num_failed),
            f"{point.generator_lag_p99_ms:.1f}",
        )
        for point in record.points
    )
    return Table(columns, rows, frozenset(("schedule", "")))


def _or_nothing(rate: float | None) -> str:
    return NOTHING if rate is None else format_rate(rate)


def _finite(milliseconds: float | None) -> float | None:
    return milliseconds if milliseconds is not None and math.isfinite(milliseconds) else None
