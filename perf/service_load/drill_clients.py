"""Clients of a service in trouble -> what each saw: status, seconds, headers that matter."""

import asyncio
import contextlib
import errno
import itertools
import resource
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from perf.service_load.http_client import Connection, post_head

REQUEST_TIMEOUT_S = 90.0

# Of the loopback network, which clients with a connection for each request come from in turn: one
# address has 28,000 ports, and keeps each for a minute after its use.
SOURCES = tuple(f"127.0.2.{number}" for number in range(1, 101))

# In the place of a status: nobody listens any more, or the connection broke without an answer.
REFUSED_CONNECTION, LOST = 0, -1

# This side has no port or descriptor left.
NOTHING_LEFT = (errno.EADDRNOTAVAIL, errno.EMFILE, errno.ENFILE)

# Between two looks at how late the clients are.
LOOK_S = 0.005

# Requests on their way at once: each takes a descriptor, of which this process has so many.
MAX_OPEN = min(5000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


@dataclass(frozen=True)
class Seen:
    """What a client saw of a request."""

    status: int
    sent_at: float
    """time.monotonic()."""
    seconds: float
    """From being sent to the end of the answer."""
    has_retry_after: bool = False
    artifact: str = ""
    """X-Artifact-SHA256."""

    @property
    def is_answered(self) -> bool:
        """Whether the picture was classified."""
        return self.status == 200

    @property
    def is_refused(self) -> bool:
        """Whether the service said that it has no room."""
        return self.status in (429, 503)


async def send(
    port: int, picture: bytes, source: str = "", kept: list[Connection] | None = None
) -> Seen:
    """Send a picture.

    Args:
        port: of the service, on this machine.
        picture: the body.
        source: address that it comes from; empty = any.
        kept: connections of earlier pictures, one of which is taken and given back; None = the
            picture has one of its own, as those of many clients.

    Raises:
        OSError: this side has no port or descriptor left, which tells nothing of the service.
    """
    started = time.monotonic()
    head = post_head("/classify", "image/jpeg", len(picture), is_last=kept is None)
    try:
        connection = kept.pop() if kept else await Connection.opened(port, source)
    except OSError as error:
        if error.errno in NOTHING_LEFT:
            raise
        return Seen(REFUSED_CONNECTION, started, time.monotonic() - started)
    try:
        reply = await connection.ask(head, picture, REQUEST_TIMEOUT_S)
    except ConnectionError:
        return Seen(LOST, started, time.monotonic() - started)
    seconds = time.monotonic() - started
    if kept is None:
        connection.close()
    elif connection.is_open:
        kept.append(connection)
    artifact = reply.fields.get(b"x-artifact-sha256", b"").decode()
    return Seen(reply.status, started, seconds, b"retry-after" in reply.fields, artifact)


@dataclass
class Lateness:
    """How late the clients themselves were, who have one thread and share the machine's cores."""

    seconds: list[float]

    @property
    def p99_ms(self) -> float:
        """Of looks at what has come, 200 planned in each second."""
        return 1000 * float(np.percentile(self.seconds, 99)) if self.seconds else 0.0

    async def watch(self) -> None:
        """Go on until cancelled."""
        while True:
            planned = time.monotonic() + LOOK_S
            await asyncio.sleep(LOOK_S)
            self.seconds.append(time.monotonic() - planned)


async def send_at_rate(
    port: int,
    pictures: Sequence[bytes],
    rate: float,
    seconds: float,
    meanwhile: Callable[[], Coroutine[Any, Any, None]] | None = None,
    lateness: Lateness | None = None,
) -> list[Seen]:
    """Send pictures evenly, whether or not earlier ones are answered, up to MAX_OPEN of them.

    Args:
        port: of the service.
        pictures: sent in turn.
        rate: a second.
        seconds: for which they are sent, fewer where there is no room for more.
        meanwhile: what happens beside it.
        lateness: of the clients, is told here.
    """
    beside = [asyncio.create_task(meanwhile())] if meanwhile else []
    watching = asyncio.create_task(lateness.watch()) if lateness else None
    start = time.monotonic()
    tasks: list[asyncio.Task[Seen]] = []
    room = asyncio.Semaphore(MAX_OPEN)
    sources = itertools.cycle(SOURCES)
    for index, picture in zip(range(max(1, round(rate * seconds))), itertools.cycle(pictures)):
        remaining = start + index / rate - time.monotonic()
        if remaining > 0:
            await asyncio.sleep(remaining)
        await room.acquire()
        if time.monotonic() - start > seconds:
            break
        task = asyncio.create_task(send(port, picture, next(sources)))
        task.add_done_callback(lambda _: room.release())
        tasks.append(task)
    if watching:
        watching.cancel()
    seen = await asyncio.gather(*tasks)
    await asyncio.gather(*beside)
    return seen


async def send_in_turn(
    port: int,
    pictures: Sequence[bytes],
    num_clients: int,
    is_over: Callable[[int], bool],
) -> list[Seen]:
    """Have clients send a picture as soon as the one before is answered.

    Args:
        port: of the service.
        pictures: sent in turn.
        num_clients: pictures on their way at once.
        is_over: told how many have been sent.
    """
    seen: list[Seen] = []
    kept: list[Connection] = []
    sources = itertools.cycle(pictures)
    num_sent = 0

    async def client() -> None:
        nonlocal num_sent
        while not is_over(num_sent):
            num_sent += 1
            seen.append(await send(port, next(sources), kept=kept))

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return seen


async def upload_slowly(port: int, number: int, seconds: float) -> int:
    """Send a byte of a picture a second; return the status of the answer, or LOST.

    Args:
        port: of the service, on this machine.
        number: of the client, of whom 100 each have an address of their own.
        seconds: after which it gives up.
    """
    head = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
    head += b"Content-Length: 100000\r\n\r\n"
    source = (f"127.0.1.{1 + number // 100}", 0)
    status, writer = LOST, None
    with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=source)
        writer.write(head)
        answer = asyncio.ensure_future(reader.readline())
        end = time.monotonic() + seconds
        while not answer.done() and time.monotonic() < end:
            writer.write(b"\0")
            await asyncio.wait({answer}, timeout=1)
        if answer.done():
            status = int(answer.result().split()[1]) if answer.result() else LOST
        else:
            answer.cancel()
            status = 0
    if writer is not None:
        writer.transport.abort()
    return status
