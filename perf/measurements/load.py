"""The service under load, beside a plain loop of the same program -> record, table and picture."""

import io
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

from efficientnet.formats.artifact import read_artifact
from efficientnet.machine.atomic import write_bytes, write_text
from efficientnet.machine.environment import current_environment, num_usable_cores
from efficientnet.measuring.machine_use import CpuUse
from efficientnet.reporting.publishing import (
    Measured,
    find_section,
    publish_part,
    published_directory,
)
from efficientnet.reporting.tables import NOTHING, Table, format_ms, format_percent, format_rate
from perf.measurements.config import LoadConfig
from perf.measurements.load_contenders import PlainLoop, running_service
from perf.measurements.load_generator import (
    Answers,
    Schedule,
    planned_times,
    send_in_turn,
    send_planned,
)
from perf.measurements.photo_contenders import read_photos

SECTION = "load"

Service = Literal["batched", "unbatched"]

TITLES = {"batched": "service", "unbatched": "service without batching"}

# Of a bound that is not given, in medians of the plain loop.
BOUND_FACTOR = 5
# Share of the requests that must be answered within the bound.
SHARE_IN_TIME = 0.99

# Requests that a p99 needs to mean something.
LEAST_FOR_P99 = 1000

WARM_UP_S = 1.0

COLORS = {"batched": "#1f77d0", "unbatched": "#9aa4af"}

log = logging.getLogger(__name__)


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


def main(config: LoadConfig) -> Path:
    """Measure, and return the table's file.

    Raises:
        ArtifactError: missing, damaged, or not ours.
        PreprocessingError: there are no photos.
        PublishError: docs/results.md has no place for the table; nothing is measured then.
        LoadError: a program ended, or did not get ready.
    """
    if config.publish:
        find_section(config.readme, SECTION)
    record = measure(config)
    folder = config.output.parent
    if config.publish:
        folder = published_directory(record.started_at, [record.environment])
        write_bytes(folder / f"{record.slug}.png", draw(record))
        publish_part(record, f"{record.slug}.json", config.readme, SECTION, to_markdown)
    else:
        write_text(config.output, record.model_dump_json(indent=1) + "\n")
        write_bytes(folder / f"{record.slug}.png", draw(record))
    table = folder / f"{record.slug}.md"
    write_text(table, to_markdown(record, picture=f"{record.slug}.png"))
    return table


def measure(config: LoadConfig) -> LoadRecord:
    """Let all contenders take turns."""
    artifact = config.artifact.absolute()
    manifest = read_artifact(artifact)
    pictures = read_photos(config.photos)[: config.num_photos]
    started_at, turn_s = datetime.now(UTC), config.seconds / config.turns
    with ExitStack() as stack:
        log.info("open %s, two services and %d loops", artifact, 1 + num_usable_cores())
        alone = stack.enter_context(PlainLoop(artifact, pictures, num_usable_cores()))
        loops = [
            stack.enter_context(PlainLoop(artifact, pictures, 1)) for _ in range(num_usable_cores())
        ]
        addresses: dict[Service, str] = {}
        for service, batch in (("batched", config.batch), ("unbatched", 1)):
            root = stack.enter_context(
                running_service(artifact, CLASSIFIER_NETWORK_BATCH=str(batch))
            )
            addresses[service] = f"{root}/classify"
            send_in_turn(addresses[service], pictures, config.clients, min(WARM_UP_S, turn_s))

        single, elsewhere = _single(alone, addresses, pictures, config, turn_s)
        saturated = _saturated(loops, addresses, pictures, config, turn_s)
        bound_ms = config.bound_ms or BOUND_FACTOR * single.plain_p50_ms
        rates = [factor * saturated.best_plain for factor in config.rates]
        points: list[Point] = []
        for schedule in config.schedules:
            for rate in tqdm(rates, schedule, unit="rate", disable=None, leave=False):
                points += _at_rate(addresses, pictures, config, turn_s, schedule, rate, bound_ms)
    return LoadRecord(
        variant=manifest.variant,
        runtime=manifest.runtime,
        precision=manifest.precision,
        image_size=manifest.preprocess.image_size,
        program_sha256=manifest.program_sha256,
        num_photos=len(pictures),
        batch=config.batch,
        seconds=config.seconds,
        num_turns=config.turns,
        bound_ms=bound_ms,
        single=single,
        saturated=saturated,
        points=tuple(points),
        cores_busy_elsewhere=elsewhere,
        environment=current_environment(),
        started_at=started_at,
    )


def _single(
    alone: PlainLoop,
    addresses: dict[Service, str],
    pictures: Sequence[bytes],
    config: LoadConfig,
    turn_s: float,
) -> tuple[SingleClient, float | None]:
    plain_ms: list[float] = []
    service_ms: dict[Service, list[float]] = {name: [] for name in addresses}
    elsewhere: list[float] = []

    def loop() -> None:
        before = CpuUse.now()
        alone.begin(turn_s, 1)
        plain_ms.extend(1000 * s for s in alone.answer())
        # The loop's own threads are a process of their own here.
        busy = before.cores_busy_elsewhere()
        if busy is not None:
            elsewhere.append(busy)

    def ask(name: Service) -> Callable[[], None]:
        return lambda: service_ms[name].extend(
            send_in_turn(addresses[name], pictures, 1, turn_s).latencies_ms
        )

    _take_turns([loop, *map(ask, addresses)], config.turns, "single client")
    medians = {name: float(np.median(ms)) for name, ms in service_ms.items()}
    single = SingleClient(plain_p50_ms=float(np.median(plain_ms)), service_p50_ms=medians)
    return single, float(np.mean(elsewhere)) if elsewhere else None


def _saturated(
    loops: Sequence[PlainLoop],
    addresses: dict[Service, str],
    pictures: Sequence[bytes],
    config: LoadConfig,
    turn_s: float,
) -> Saturated:
    plain: dict[int, list[float]] = {1: [], config.batch: []}
    answers: dict[Service, list[Answers]] = {name: [] for name in addresses}

    def work(batch_size: int) -> Callable[[], None]:
        def run() -> None:
            for loop in loops:
                loop.begin(turn_s, batch_size)
            all_times = [loop.answer() for loop in loops]
            rates = (batch_size * len(times) / sum(times) for times in all_times)
            plain[batch_size].append(sum(rates))

        return run

    def ask(name: Service) -> Callable[[], None]:
        return lambda: answers[name].append(
            send_in_turn(addresses[name], pictures, config.clients, turn_s)
        )

    _take_turns([*map(work, plain), *map(ask, addresses)], config.turns, "saturated")
    return Saturated(
        plain_images_per_s={size: float(np.mean(rates)) for size, rates in plain.items()},
        service_images_per_s={
            name: sum(_num_answered(a) for a in own) / sum(a.seconds for a in own)
            for name, own in answers.items()
        },
        num_clients=config.clients,
        generator_cores={
            name: sum(a.generator_s for a in own) / sum(a.seconds for a in own)
            for name, own in answers.items()
        },
    )


def _at_rate(
    addresses: dict[Service, str],
    pictures: Sequence[bytes],
    config: LoadConfig,
    turn_s: float,
    schedule: Schedule,
    rate: float,
    bound_ms: float,
) -> list[Point]:
    answers: dict[Service, list[Answers]] = {name: [] for name in addresses}

    def ask(name: Service) -> Callable[[], None]:
        def run() -> None:
            # The same plan for both.
            seed = config.seed + len(answers[name])
            times = planned_times(schedule, rate, turn_s, seed)
            answers[name].append(send_planned(addresses[name], pictures, times))

        return run

    _take_turns(list(map(ask, addresses)), config.turns, f"{schedule}, {rate:.1f} a second")
    return [
        to_point(name, schedule, rate, own, bound_ms, config.seconds)
        for name, own in answers.items()
    ]


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
    latencies = np.concatenate([a.latencies_ms for a in answers])
    lags = np.concatenate([a.lags_ms for a in answers])
    num_in_time = int((latencies <= bound_ms).sum())
    return Point(
        service=service,
        schedule=schedule,
        offered_per_s=rate,
        num_requests=len(latencies),
        answered_per_s=sum(map(_num_answered, answers)) / sum(a.seconds for a in answers),
        in_time_per_s=num_in_time / max(seconds, sum(a.seconds for a in answers) - bound_ms / 1000),
        share_in_time=num_in_time / len(latencies),
        p50_ms=_percentile(latencies, 50),
        p99_ms=_percentile(latencies, 99) if len(latencies) >= LEAST_FOR_P99 else None,
        num_refused=sum(a.num_refused for a in answers),
        num_failed=sum(a.num_failed for a in answers),
        generator_lag_p99_ms=float(np.percentile(lags, 99)),
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
        f"`POST /classify`, {record.seconds:g} s each in {record.num_turns} turns, batches of up to "
        f"{record.batch}. Latency counts from the planned time; in time: within "
        f"{record.bound_ms:.0f} ms. The goodput is that of the highest rate of which 99 of 100 were "
        f"in time. The clients ran on the same cores, and took "
        f"{record.saturated.generator_cores['batched']:.2f} of one when the service was saturated.\n"
    )


def draw(record: LoadRecord) -> bytes:
    """Draw the answers in time over the planned requests, and return a PNG."""
    schedules = list(dict.fromkeys(point.schedule for point in record.points))
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 10}):
        figure = Figure((5.4, 3.4 * len(schedules)), 200, layout="constrained")
        FigureCanvasAgg(figure)
        for index, schedule in enumerate(schedules):
            axes = figure.add_subplot(len(schedules), 1, index + 1)
            for service, color in COLORS.items():
                own = sorted(
                    (p.offered_per_s, p.in_time_per_s)
                    for p in record.points
                    if (p.service, p.schedule) == (service, schedule)
                )
                axes.plot(*zip(*own, strict=True), "o-", color=color, label=TITLES[service])
            limit = max(p.offered_per_s for p in record.points)
            axes.plot([0, limit], [0, limit], ":", color="#59636e", label="all in time")
            best = record.saturated.best_plain
            axes.axvline(best, color="#59636e", linewidth=1, label="best plain loop")
            axes.set_xlim(0)
            axes.set_ylim(0)
            axes.set_title(f"{record.variant} {record.runtime} {record.precision}, {schedule}")
            axes.set_xlabel("planned requests a second")
            axes.set_ylabel(f"answered in {record.bound_ms:.0f} ms, a second")
            axes.legend(loc="lower left", fontsize=8)
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


def _num_answered(answers: Answers) -> int:
    return len(answers.latencies_ms) - answers.num_refused - answers.num_failed


def _percentile(values: "np.ndarray", percent: float) -> float | None:
    # Without interpolation, which knows no infinite values.
    found = float(np.percentile(values, percent, method="higher"))
    return found if math.isfinite(found) else None


def _take_turns(contenders: Sequence[Callable[[], None]], num_turns: int, what: str) -> None:
    log.info("%s", what)
    for turn in range(num_turns):
        # There and back: a machine that gets slower or faster meanwhile favors nobody.
        for contender in contenders if turn % 2 == 0 else contenders[::-1]:
            contender()
