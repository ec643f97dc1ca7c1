"""Planned times -> requests sent at them -> latencies, each counted from the planned time."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

import numpy as np

from perf.service_load.http_client import Connection, post_head, run_clients

Schedule = Literal["poisson", "fixed"]

REQUEST_TIMEOUT_S = 60.0

# Latency of a request that was refused or failed.
NEVER = float("inf")


@dataclass(frozen=True)
class Target:
    """Where requests go, and what they hold."""

    address: str
    bodies: Sequence[bytes]
    """Sent one after the other, from the first again after the last."""
    content_type: str = "image/jpeg"  # the service looks at what it is


@dataclass(frozen=True)
class Answers:
    """What came of the requests of a turn."""

    latencies_ms: tuple[float, ...]
    """From the planned time to the last byte of the answer, in the order of the plan; infinite
    where it was refused or failed."""
    num_refused: int
    """Answers of status 429 and 503."""
    num_failed: int
    """Other statuses but 200, and connections that broke."""
    seconds: float
    """From the first planned time to the last answer."""
    lags_ms: tuple[float, ...]
    """How late each was sent."""
    generator_s: float
    """CPU time of the process that sent them."""

    @property
    def num_answered(self) -> int:
        """Answers of status 200."""
        return len(self.latencies_ms) - self.num_refused - self.num_failed


def planned_times(schedule: Schedule, rate: float, seconds: float, seed: int) -> list[float]:
    """Plan when requests are sent, in seconds from the start; at least one.

    Args:
        schedule: poisson: at random, each moment as likely as any other; fixed: evenly.
        rate: requests a second.
        seconds: length of the plan.
        seed: of what is random.
    """
    if schedule == "fixed":
        return [index / rate for index in range(max(1, round(rate * seconds)))]
    gaps = np.random.default_rng(seed).exponential(1 / rate, max(1, round(2 * rate * seconds)) + 50)
    times = np.cumsum(gaps) - gaps[0]
    return times[times < seconds].tolist()


def in_forms(address: str, pictures: Sequence[bytes]) -> Target:
    """Put pictures into forms, as the field `image`."""
    head = b'--picture\r\nContent-Disposition: form-data; name="image"; filename="p"\r\n\r\n'
    bodies = [head + picture + b"\r\n--picture--\r\n" for picture in pictures]
    return Target(address, bodies, "multipart/form-data; boundary=picture")


def send_planned(target: Target, times: Sequence[float]) -> Answers:
    """Send a picture at each of the times (open loop).

    Args:
        target: where to.
        times: seconds from now.
    """

    async def send_all() -> Answers:
        start = time.perf_counter() + 0.01
        tasks: list[asyncio.Task[tuple[float, int, float]]] = []
        for index, planned in enumerate(times):
            remaining = start + planned - time.perf_counter()
            if remaining > 0:
                await asyncio.sleep(remaining)
            tasks.append(asyncio.create_task(_send(clients, index, start + planned)))
        results = await asyncio.gather(*tasks)
        return _answers(results, time.perf_counter() - start, time.process_time() - own_start)

    clients, own_start = _Clients(target), time.process_time()
    return run_clients(send_all())


def send_in_turn(target: Target, num_clients: int, seconds: float) -> Answers:
    """Have clients send a picture as soon as the one before is answered (closed loop).

    Args:
        target: where to.
        num_clients: pictures on their way at once.
        seconds: after which none is sent any more.
    """

    async def send_all() -> Answers:
        start = time.perf_counter()
        results: list[tuple[float, int, float]] = []

        async def client(number: int) -> None:
            index = number
            while not results or time.perf_counter() < start + seconds:
                results.append(await _send(clients, index, time.perf_counter()))
                index += num_clients

        await asyncio.gather(*map(client, range(num_clients)))
        return _answers(results, time.perf_counter() - start, time.process_time() - own_start)

    clients, own_start = _Clients(target), time.process_time()
    return run_clients(send_all())


class _Clients:
    """Connections to a target, as many as are needed at once."""

    def __init__(self, target: Target) -> None:
        address = urlsplit(target.address)
        self._port = address.port or 80
        self._bodies = target.bodies
        self._heads = [
            post_head(address.path, target.content_type, len(body)) for body in target.bodies
        ]
        self._idle: list[Connection] = []

    async def status_of(self, index: int) -> int:
        """Send a body; return the status of the answer, 0 where the connection broke."""
        index %= len(self._bodies)
        try:
            connection = self._idle.pop() if self._idle else await Connection.opened(self._port)
            reply = await connection.ask(self._heads[index], self._bodies[index], REQUEST_TIMEOUT_S)
        except OSError:
            return 0
        if connection.is_open:
            self._idle.append(connection)
        return reply.status


async def _send(clients: _Clients, index: int, planned: float) -> tuple[float, int, float]:
    lag_s = time.perf_counter() - planned
    status = await clients.status_of(index)
    return time.perf_counter() - planned, status, lag_s


def _answers(
    results: Sequence[tuple[float, int, float]], seconds: float, generator_s: float
) -> Answers:
    statuses = [status for _, status, _ in results]
    num_refused = sum(status in (429, 503) for status in statuses)
    return Answers(
        latencies_ms=tuple(1000 * s if status == 200 else NEVER for s, status, _ in results),
        num_refused=num_refused,
        num_failed=len(results) - num_refused - statuses.count(200),
        seconds=seconds,
        lags_ms=tuple(1000 * lag for _, _, lag in results),
        generator_s=generator_s,
    )
