"""Clients of a service in trouble -> what each saw: status, seconds, headers that matter."""

import asyncio
import contextlib
import errno
import itertools
import resource
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp

T = TypeVar("T")

REQUEST_TIMEOUT_S = 90.0

# Of the loopback network, which clients with a connection for each request come from in turn: one
# address has 28,000 ports, and keeps each for a minute after its use.
SOURCES = tuple(f"127.0.2.{number}" for number in range(1, 101))

# In the place of a status: nobody listens any more, or the connection broke without an answer.
REFUSED_CONNECTION, LOST = 0, -1


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


async def send(session: aiohttp.ClientSession, address: str, picture: bytes) -> Seen:
    """Send a picture.

    Raises:
        OSError: this side has no port or descriptor left, which tells nothing of the service.
    """
    started = time.monotonic()
    headers = {"Content-Type": "image/jpeg"}
    try:
        async with session.post(address, data=picture, headers=headers) as answer:
            await answer.read()
            return Seen(
                answer.status,
                started,
                time.monotonic() - started,
                "Retry-After" in answer.headers,
                answer.headers.get("X-Artifact-SHA256", ""),
            )
    except aiohttp.ClientConnectorError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.EMFILE, errno.ENFILE):
            raise
        return Seen(REFUSED_CONNECTION, started, time.monotonic() - started)
    except (aiohttp.ClientError, TimeoutError):
        return Seen(LOST, started, time.monotonic() - started)


async def send_at_rate(
    session: aiohttp.ClientSession,
    address: str,
    pictures: Sequence[bytes],
    rate: float,
    seconds: float,
    meanwhile: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> list[Seen]:
    """Send pictures evenly, whether or not earlier ones are answered, up to MAX_OPEN of them.

    Args:
        session: of the clients.
        address: that takes a picture as the body.
        pictures: sent in turn.
        rate: a second.
        seconds: for which they are sent, fewer where there is no room for more.
        meanwhile: what happens beside it.
    """
    beside = [asyncio.create_task(meanwhile())] if meanwhile else []
    start = time.monotonic()
    tasks: list[asyncio.Task[Seen]] = []
    room = asyncio.Semaphore(MAX_OPEN)
    for index, picture in zip(range(max(1, round(rate * seconds))), itertools.cycle(pictures)):
        remaining = start + index / rate - time.monotonic()
        if remaining > 0:
            await asyncio.sleep(remaining)
        await room.acquire()
        if time.monotonic() - start > seconds:
            break
        task = asyncio.create_task(send(session, address, picture))
        task.add_done_callback(lambda _: room.release())
        tasks.append(task)
    seen = await asyncio.gather(*tasks)
    await asyncio.gather(*beside)
    return seen


async def send_in_turn(
    session: aiohttp.ClientSession,
    address: str,
    pictures: Sequence[bytes],
    num_clients: int,
    is_over: Callable[[int], bool],
) -> list[Seen]:
    """Have clients send a picture as soon as the one before is answered.

    Args:
        session: of the clients.
        address: see send_at_rate.
        pictures: sent in turn.
        num_clients: pictures on their way at once.
        is_over: told how many have been sent.
    """
    seen: list[Seen] = []
    sources = itertools.cycle(pictures)
    num_sent = 0

    async def client() -> None:
        nonlocal num_sent
        while not is_over(num_sent):
            num_sent += 1
            seen.append(await send(session, address, next(sources)))

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


def with_session(
    work: Callable[[aiohttp.ClientSession], Coroutine[Any, Any, T]], is_fresh: bool = False
) -> T:
    """Run what sends requests, without a limit to its connections.

    Args:
        work: given the session.
        is_fresh: whether each request has a connection and an address of its own, as those of many
            clients: one that was left open may be closed while the next request is on its way.
    """
    sources = itertools.cycle(SOURCES)

    def open_socket(info: tuple[Any, ...]) -> socket.socket:
        opened = socket.socket(*info[:3])
        if is_fresh:
            opened.bind((next(sources), 0))
        return opened

    async def run() -> T:
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        connector = aiohttp.TCPConnector(
            limit=0, family=socket.AF_INET, force_close=is_fresh, socket_factory=open_socket
        )
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            return await work(session)

    return asyncio.run(run())
