"""A service in trouble -> what its clients saw, beside what is promised: a record a drill."""

import asyncio
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
from pydantic import BaseModel, ConfigDict

from efficientnet import PROJECT_ROOT
from efficientnet.formats.artifact import MANIFEST_FILE, read_artifact
from efficientnet.images.datasets import read_photos
from efficientnet.machine.atomic import write_text
from efficientnet.machine.environment import current_environment
from efficientnet.reporting.publishing import Measured, find_section, publish_part
from efficientnet.reporting.tables import Table
from perf.service_load.config import DrillName, DrillsConfig
from perf.service_load.drill_clients import (
    LOST,
    REFUSED_CONNECTION,
    Lateness,
    Seen,
    send,
    send_at_rate,
    send_in_turn,
    upload_slowly,
)
from perf.service_load.http_client import run_clients
from perf.service_load.load_contenders import RunningService, running_service

SECTION = "drills"

OVERLOAD = 10
MAX_REFUSAL_MS = 20.0
# Of the time that as many pictures take as have places.
MAX_QUEUES = 2.0
RECOVERY_S = 5.0
# Of the median before and after, which differ by themselves.
MAX_SLOWDOWN = 1.5
MAX_GAP_S = 2.0
# Of the capacity, as the new workers take some to get ready.
LOAD_OF_CHANGE = 0.25
# 200,000 requests that each left this behind would have left 20 MB.
MAX_BYTES_PER_REQUEST = 100.0

NUM_CLIENTS = 32
NUM_ALONE = 20
LONGEST_RESTART_S = 60.0

log = logging.getLogger(__name__)


class Finding(BaseModel):
    """One figure of a drill."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: str
    found: str
    promised: str = ""
    is_kept: bool | None = None
    """None: nothing is promised."""


class DrillRecord(Measured):
    """What one drill showed."""

    format_version: Literal[1] = 1
    drill: DrillName
    title: str
    variant: str
    runtime: str
    precision: str
    image_size: int
    program_sha256: str
    num_photos: int
    findings: tuple[Finding, ...]


class Scene:
    """What a drill works with.

    Args:
        config: of the command.
    """

    def __init__(self, config: DrillsConfig) -> None:
        self.config = config
        self.artifact = config.artifact.absolute()
        self.pictures = read_photos(config.photos)[: config.num_photos]
        self.short_s = config.seconds / 3

    def alone(self, service: RunningService) -> list[Seen]:
        """Let one client send some pictures, one after the other."""
        return run_clients(
            send_in_turn(service.port, self.pictures, 1, lambda sent: sent >= NUM_ALONE)
        )

    def capacity(self, service: RunningService, seconds: float) -> float:
        """Return how many pictures a second are answered when clients wait for each answer."""
        started = time.monotonic()
        seen = run_clients(
            send_in_turn(
                service.port,
                self.pictures,
                NUM_CLIENTS,
                lambda _: time.monotonic() > started + seconds,
            )
        )
        return sum(s.is_answered for s in seen) / (time.monotonic() - started)


def main(config: DrillsConfig) -> Path:
    """Do the drills, and return the folder of what they showed.

    Raises:
        ArtifactError: missing, damaged, or not ours.
        PreprocessingError: there are no photos.
        PublishError: docs/serving.md has no place for the tables; nothing is done then.
        LoadError: a service ended, or did not get ready.
    """
    if config.publish:
        find_section(config.readme, SECTION)
    manifest = read_artifact(config.artifact)
    scene = Scene(config)
    for drill in config.drills:
        title, act = DRILLS[drill]
        log.info("%s: %s", drill, title)
        started_at = datetime.now(UTC)
        record = DrillRecord(
            drill=drill,
            title=title,
            variant=manifest.variant,
            runtime=manifest.runtime,
            precision=manifest.precision,
            image_size=manifest.preprocess.image_size,
            program_sha256=manifest.program_sha256,
            num_photos=len(scene.pictures),
            findings=tuple(act(scene)),
            environment=current_environment(),
            started_at=started_at,
        )
        for finding in record.findings:
            log.info("  %s: %s%s", finding.what, finding.found, _mark(finding))
        if config.publish:
            publish_part(record, f"{SECTION}-{drill}.json", config.readme, SECTION, to_markdown)
        write_text(config.output / f"{drill}.json", record.model_dump_json(indent=1) + "\n")
        write_text(config.output / f"{drill}.md", to_markdown(record))
    return config.output


def to_markdown(record: DrillRecord) -> str:
    """Write the table of a drill."""
    rows = tuple((f.what, f.found, f.promised + _mark(f)) for f in record.findings)
    table = Table(("", "found", "promised"), rows, frozenset(("", "found", "promised")))
    return (
        f"**{record.title}**\n\n{table.markdown()}\n\n"
        f"{record.variant}, {record.runtime} {record.precision}, {record.image_size} px, "
        f"{record.num_photos} photos; {record.environment.num_cores} cores of "
        f"{record.environment.processor}, the clients on the same ones; "
        f"{record.started_at:%Y-%m-%d} UTC.\n"
    )


@contextmanager
def on_cores(cores: Collection[int]) -> Generator[None]:
    """Have this thread, and the processes that it starts, on some cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def overload(scene: Scene) -> list[Finding]:
    """Ten times what it can do."""
    own, *rest = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        with on_cores(rest or [own]):
            service = stack.enter_context(running_service(scene.artifact))
        # Clients that computed on the service's cores would be late, and take its time.
        stack.enter_context(on_cores([own]))
        before = scene.alone(service)
        capacity = scene.capacity(service, min(10.0, scene.short_s))
        bytes_before, most = _bytes_of(service), [0]

        async def watch() -> None:
            end = time.monotonic() + scene.config.seconds
            while time.monotonic() < end:
                most[0] = max(most[0], _bytes_of(service))
                await asyncio.sleep(0.5)

        lateness, cpu_before = Lateness([]), time.process_time()
        seen = _at_rate(scene, service, OVERLOAD * capacity, scene.config.seconds, watch, lateness)
        clients_s = time.process_time() - cpu_before
        time.sleep(RECOVERY_S)
        after = scene.alone(service)
        places = _info_of(service)["limits"]["max_concurrency"]
    sending_s = max(s.sent_at for s in seen) - min(s.sent_at for s in seen)
    accepted = [s for s in seen if s.is_answered]
    refused = [s for s in seen if s.is_refused]
    others = len(seen) - len(accepted) - len(refused)
    slowdown = _percentile(after, 50) / _percentile(before, 50)
    refusal = _percentile(refused, 99) if refused else 0.0
    full_ms = 1000 * places / capacity
    return [
        Finding(what="capacity", found=f"{capacity:.1f} pictures/s"),
        Finding(
            what="sent",
            found=f"{len(seen)} in {sending_s:.0f} s: {_statuses(seen)}",
            promised="200, 429 and 503 only",
            is_kept=not others,
        ),
        Finding(
            what="clients",
            found=f"on {'a core of their own' if rest else 'the only core'}, of which they take "
            f"{clients_s / sending_s:.2f}; late themselves by {lateness.p99_ms:.1f} ms (p99)",
        ),
        Finding(
            what="accepted, p50 and p99",
            found=_milliseconds(accepted),
            promised=f"p99 at most {MAX_QUEUES:g} times what all {places} places take at capacity",
            is_kept=bool(accepted) and _percentile(accepted, 99) <= MAX_QUEUES * full_ms,
        ),
        Finding(
            what="refused, p50 and p99",
            found=_milliseconds(refused),
            promised=f"p99 at most {MAX_REFUSAL_MS:g} ms",
            is_kept=refusal <= MAX_REFUSAL_MS,
        ),
        Finding(
            what="refusals with Retry-After",
            found=f"{sum(s.has_retry_after for s in refused)} of {len(refused)}",
            promised="all",
            is_kept=all(s.has_retry_after for s in refused),
        ),
        Finding(
            what="memory",
            found=f"{bytes_before / 1e6:.0f} MB before, at most {most[0] / 1e6:.0f} MB",
        ),
        Finding(
            what=f"one client {RECOVERY_S:g} s later, p50 and p99",
            found=f"{_milliseconds(after)}; before {_milliseconds(before)}",
            promised=f"p50 at most {MAX_SLOWDOWN} times that before",
            is_kept=slowdown <= MAX_SLOWDOWN,
        ),
    ]


def slow_clients(scene: Scene) -> list[Finding]:
    """Clients that send a byte a second."""
    with running_service(scene.artifact) as service:
        before = scene.alone(service)

        async def act() -> tuple[list[int], list[Seen]]:
            crowd = asyncio.gather(
                *(
                    upload_slowly(service.port, number, scene.short_s)
                    for number in range(scene.config.slow_clients)
                )
            )
            await asyncio.sleep(1)
            seen = await send_in_turn(service.port, scene.pictures, 1, lambda _: crowd.done())
            return await crowd, seen

        statuses, seen = run_clients(act())
    counts = Counter({0: "no answer yet", LOST: "closed"}.get(s, str(s)) for s in statuses)
    return [
        Finding(
            what="slow clients", found=", ".join(f"{n} x {s}" for s, n in counts.most_common())
        ),
        Finding(
            what="another client meanwhile",
            found=f"{len(seen)} pictures: {_statuses(seen)}",
            promised="200 only",
            is_kept=all(s.is_answered for s in seen),
        ),
        Finding(what="p50 and p99", found=f"{_milliseconds(seen)}; before {_milliseconds(before)}"),
    ]


def kill(scene: Scene) -> list[Finding]:
    """A worker of two is killed in mid-load."""
    with running_service(scene.artifact, CLASSIFIER_WORKERS="2") as service:
        rate = 0.5 * scene.capacity(service, min(5.0, scene.short_s))
        killed_at, back = [0.0], [0.0]

        async def end_one() -> None:
            await asyncio.sleep(scene.short_s / 3)
            workers = _workers(service)
            killed_at[0] = time.monotonic()
            workers[0].kill()
            while len(_workers(service)) < 2 and time.monotonic() < killed_at[0] + 60:
                await asyncio.sleep(0.02)
            back[0] = time.monotonic()

        seen = _at_rate(scene, service, rate, scene.short_s, end_one)
    answered = sorted(s.sent_at + s.seconds for s in seen if s.is_answered)
    following = [moment for moment in answered if moment > killed_at[0]]
    gap_s = following[0] - killed_at[0] if following else float("inf")
    failed = [s for s in seen if not s.is_answered]
    on_their_way = [s for s in seen if s.sent_at <= killed_at[0] <= s.sent_at + s.seconds]
    return [
        Finding(what="sent", found=f"{len(seen)} at {rate:.1f} a second: {_statuses(seen)}"),
        Finding(
            what="lost",
            found=f"{len(failed)}; {len(on_their_way)} were on their way",
            promised="none but those of the worker that was killed",
            is_kept=all(s in on_their_way for s in failed),
        ),
        Finding(
            what="next answer after",
            found=f"{gap_s:.2f} s",
            promised=f"at most {MAX_GAP_S:g} s",
            is_kept=gap_s <= MAX_GAP_S,
        ),
        Finding(what="another process is there after", found=f"{back[0] - killed_at[0]:.2f} s"),
    ]


def drain(scene: Scene) -> list[Finding]:
    """SIGTERM in mid-load."""
    with running_service(scene.artifact, CLASSIFIER_WORKERS="2") as service:
        rate = 0.5 * scene.capacity(service, min(5.0, scene.short_s))
        sent_at, not_ready_at, ended_at = [0.0], [0.0], [0.0]

        async def terminate() -> None:
            await asyncio.sleep(scene.short_s / 3)
            sent_at[0] = time.monotonic()
            service.process.send_signal(signal.SIGTERM)
            while service.process.poll() is None:
                status = await asyncio.to_thread(_status_of, f"{service.address}/readyz")
                if status != 200 and not not_ready_at[0]:
                    not_ready_at[0] = time.monotonic()
                await asyncio.sleep(0.02)
            ended_at[0] = time.monotonic()

        seen = _at_rate(scene, service, rate, scene.short_s, terminate)
    last_taken = max((s.sent_at for s in seen if s.is_answered), default=0.0)
    none_taken = [s.sent_at for s in seen if s.status == REFUSED_CONNECTION]
    return [
        Finding(what="sent", found=f"{len(seen)} at {rate:.1f} a second: {_statuses(seen)}"),
        Finding(
            what="not ready after",
            found=f"{not_ready_at[0] - sent_at[0]:.2f} s",
            promised="before connections are refused",
            is_kept=0 < not_ready_at[0] < min(none_taken, default=float("inf")),
        ),
        Finding(what="pictures are taken for", found=f"{last_taken - sent_at[0]:.2f} s more"),
        _none_lost(seen),
        Finding(what="ended after", found=f"{ended_at[0] - sent_at[0]:.2f} s"),
    ]


def lost(seen: Sequence[Seen]) -> list[Seen]:
    """Return those that were taken, and neither answered nor told to come again."""
    return [s for s in seen if s.status not in (200, 429, 503, REFUSED_CONNECTION)]


def _none_lost(seen: Sequence[Seen]) -> Finding:
    broken = lost(seen)
    return Finding(
        what="accepted and then lost",
        found=str(len(broken)),
        promised="none",
        is_kept=not broken,
    )


def change(scene: Scene) -> list[Finding]:
    """Another artifact is given to the service in mid-load."""
    with (
        tempfile.TemporaryDirectory(prefix="efficientnet-drill-") as scratch,
        running_service(scene.artifact, "--allow-change", CLASSIFIER_WORKERS="2") as service,
    ):
        other = _copy(scene.artifact, Path(scratch) / "other")
        _rename(other)
        (old, *_) = {s.artifact for s in scene.alone(service)}
        rate = LOAD_OF_CHANGE * scene.capacity(service, min(5.0, scene.short_s))
        before = _at_rate(scene, service, rate, scene.short_s / 3)
        command = [sys.executable, str(PROJECT_ROOT / "serving" / "change.py")]
        command += ["--to", str(other), "--port", str(service.port)]
        meanwhile, started = list[Seen](), time.monotonic()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as changing:
            while changing.poll() is None:
                meanwhile += _at_rate(scene, service, rate, 1.0)
        seconds = time.monotonic() - started
        after = _at_rate(scene, service, rate, scene.short_s / 3)
    seen = [*before, *meanwhile, *after]
    by_old = sum(s.artifact == old for s in seen if s.is_answered)
    by_new = sum(s.artifact != old for s in seen if s.is_answered)
    return [
        Finding(
            what="sent",
            found=f"{len(seen)} at {rate:.1f} a second: {_statuses(seen)}",
            promised="200 only",
            is_kept=all(s.is_answered for s in seen),
        ),
        _none_lost(seen),
        Finding(
            what="answered",
            found=f"{by_old} by the old one, {by_new} by the new one",
            promised="both; after the command's end by the new one",
            is_kept=changing.returncode == 0
            and by_old > 0 < by_new
            and all(s.artifact != old for s in after),
        ),
        Finding(what="the command took", found=f"{seconds:.1f} s"),
        Finding(
            what="meanwhile, p50 and p99",
            found=f"{_milliseconds(meanwhile)}; before {_milliseconds(before)}",
        ),
    ]


def artifact(scene: Scene) -> list[Finding]:
    """The artifact on the disk changes, and a worker is killed after it."""
    return [_changed(scene, how, change) for how, change in CHANGES.items()]


def _changed(scene: Scene, how: str, change: Callable[[Path], None]) -> Finding:
    with tempfile.TemporaryDirectory(prefix="efficientnet-drill-") as scratch:
        copy = _copy(scene.artifact, Path(scratch) / "artifact")
        with running_service(copy) as service:
            (old, *_) = {s.artifact for s in scene.alone(service)}
            change(copy)
            unchanged = {(s.status, s.artifact) for s in scene.alone(service)}
            (worker,) = _workers(service)
            worker.kill()
            deadline = time.monotonic() + LONGEST_RESTART_S
            said: Seen | None = None
            while time.monotonic() < deadline and (said is None or said.status < 1):
                time.sleep(0.1)
                said = _one(scene, service)
            status = _status_of(f"{service.address}/readyz")
    found = {200: "the old one answers" if said and said.artifact == old else "ANOTHER ANSWERS"}
    now = found.get(said.status, f"{said.status}") if said else "nothing answers"
    return Finding(
        what=how,
        found=f"running worker: {'goes on' if unchanged == {(200, old)} else 'CHANGED'}; "
        f"new worker: {now}, /readyz {status}",
        promised="the old one goes on, in a new worker, too; or not ready",
        is_kept=unchanged == {(200, old)}
        and said is not None
        and ((said.status, said.artifact, status) == (200, old, 200) or status == 503),
    )


def memory(scene: Scene) -> list[Finding]:
    """Many requests."""
    with running_service(scene.artifact) as service:
        number = scene.config.requests
        sizes: list[tuple[int, int]] = []

        def is_over(num_sent: int) -> bool:
            if num_sent % (number // 100) == 0:
                sizes.append((num_sent, _bytes_of(service)))
            return num_sent >= number

        seen = run_clients(send_in_turn(service.port, scene.pictures, NUM_CLIENTS, is_over))
    steady = sizes[len(sizes) // 5 :]
    sent, held = zip(*steady, strict=True)
    slope = float(np.polyfit(sent, held, 1)[0])
    return [
        Finding(what="sent", found=f"{len(seen)}: {_statuses(seen)}"),
        Finding(
            what="memory",
            found=f"{sizes[0][1] / 1e6:.1f} MB at the start, {steady[0][1] / 1e6:.1f} "
            f"MB after {steady[0][0]}, {steady[-1][1] / 1e6:.1f} MB at the end",
        ),
        Finding(
            what="slope, without the first fifth",
            found=f"{slope:.1f} bytes a request",
            promised=f"at most {MAX_BYTES_PER_REQUEST:g}",
            is_kept=slope <= MAX_BYTES_PER_REQUEST,
        ),
    ]


def _copy(artifact: Path, path: Path) -> Path:
    return Path(shutil.copytree(artifact, path))


def _rename(path: Path) -> None:
    """Make it another artifact, of the same program."""
    manifest = path / MANIFEST_FILE
    manifest.write_text(manifest.read_text() + "\n")


def _swap(path: Path) -> None:
    other = _copy(path, path.with_name("other"))
    _rename(other)
    path.rename(path.with_name("old"))
    other.rename(path)


def _damage(path: Path) -> None:
    program = path / read_artifact(path).program_file
    with program.open("r+b") as file:
        file.seek(program.stat().st_size // 2)
        file.write(b"damaged")


CHANGES: dict[str, Callable[[Path], None]] = {
    "another takes its place": _swap,
    "deleted": shutil.rmtree,
    "written over": _damage,
}

DRILLS: dict[DrillName, tuple[str, Callable[[Scene], list[Finding]]]] = {
    "overload": ("Ten times what it can do", overload),
    "slow-clients": ("Clients that send a byte a second", slow_clients),
    "kill": ("One worker of two is killed under load", kill),
    "drain": ("SIGTERM under load", drain),
    "change": ("The artifact is changed under load", change),
    "artifact": ("The artifact changes, and the only worker is killed", artifact),
    "memory": ("Many requests", memory),
}


def _at_rate(
    scene: Scene,
    service: RunningService,
    rate: float,
    seconds: float,
    meanwhile: Callable | None = None,
    lateness: Lateness | None = None,
) -> list[Seen]:
    return run_clients(
        send_at_rate(service.port, scene.pictures, rate, seconds, meanwhile, lateness)
    )


def _one(scene: Scene, service: RunningService) -> Seen:
    return run_clients(send(service.port, scene.pictures[0]))


def _workers(service: RunningService) -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process(service.process.pid).children()
        if process.status() != psutil.STATUS_ZOMBIE
    ]


def _bytes_of(service: RunningService) -> int:
    processes = [psutil.Process(service.process.pid)]
    processes += processes[0].children(recursive=True)
    return sum(process.memory_full_info().uss for process in processes)


def _info_of(service: RunningService) -> Any:
    with urllib.request.urlopen(f"{service.address}/info", timeout=30) as answer:
        return json.load(answer)


def _status_of(address: str) -> int:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def _percentile(seen: Sequence[Seen], percent: float) -> float:
    return float(np.percentile([1000 * s.seconds for s in seen], percent))


def _milliseconds(seen: Sequence[Seen]) -> str:
    if not seen:
        return "none"
    return f"{_percentile(seen, 50):.1f} and {_percentile(seen, 99):.1f} ms"


def _statuses(seen: Sequence[Seen]) -> str:
    names = {LOST: "broken connection", REFUSED_CONNECTION: "no connection"}
    counts = Counter(names.get(s.status, str(s.status)) for s in seen)
    return ", ".join(f"{number} x {status}" for status, number in counts.most_common())


def _mark(finding: Finding) -> str:
    return "" if finding.is_kept is None else ": kept" if finding.is_kept else ": NOT KEPT"
