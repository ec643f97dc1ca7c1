"""Planned times -> requests sent at them -> latencies, each counted from the planned time."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import aiohttp
import numpy as np

Schedule = Literal["poisson", "fixed"]

T = TypeVar("T")

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

    async def send_all(session: aiohttp.ClientSession) -> Answers:
        start = time.perf_counter() + 0.01
        tasks: list[asyncio.Task[tuple[float, int, float]]] = []
        for index, planned in enumerate(times):
            remaining = start + planned - time.perf_counter()
            if remaining > 0:
                await asyncio.sleep(remaining)
            tasks.append(asyncio.create_task(_send(session, target, index, start + planned)))
        results = await asyncio.gather(*tasks)
        return _answers(results, time.perf_counter() - start, time.process_time() - own_start)

    own_start = time.process_time()
    return _with_session(send_all)


def send_in_turn(target: Target, num_clients: int, seconds: float) -> Answers:
    """Have clients send a picture as soon as the one before is answered (closed loop).

    Args:
        target: where to.
        num_clients: pictures on their way at once.
        seconds: after which none is sent any more.
    """

    async def send_all(session: aiohttp.ClientSession) -> Answers:
        start = time.perf_counter()
        results: list[tuple[float, int, float]] = []

        async def client(number: int) -> None:
            index = number
            while not results or time.perf_counter() < start + seconds:
                results.append(await _send(session, target, index, time.perf_counter()))
                index += num_clients

        await asyncio.gather(*map(client, range(num_clients)))
        return _answers(results, time.perf_counter() - start, time.process_time() - own_start)

    own_start = time.process_time()
    return _with_session(send_all)


def _with_session(send_all: Callable[[aiohttp.ClientSession], Coroutine[Any, Any, T]]) -> T:
    async def run() -> T:
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0)  # a limit would hold requests back
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            return await send_all(session)

    return asyncio.run(run())


async def _send(
    session: aiohttp.ClientSession, target: Target, index: int, planned: float
) -> tuple[float, int, float]:
    lag_s = time.perf_counter() - planned
    body = target.bodies[index % len(target.bodies)]
    headers = {"Content-Type": target.content_type}
    try:
        async with session.post(target.address, data=body, headers=headers) as response:
            await response.read()
            status = response.status
    except (aiohttp.ClientError, TimeoutError):
        status = 0
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
