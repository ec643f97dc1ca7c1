"""A request -> its answer, over a connection that may be kept, in little time of the processor.

Clients that share the machine with what they measure are measured, too: aiohttp's take about a
millisecond for a picture, as long as the service takes beside decoding it and the network.
"""

import asyncio
import socket
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import uvloop

T = TypeVar("T")

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Reply:
    """The head of an answer; its body has come, too."""

    status: int
    fields: dict[bytes, bytes]
    """Their names in small letters."""


class Connection(asyncio.Protocol):
    """Asks a server on this machine, one thing at a time; of what it answers, a length is known."""

    all_open: ClassVar[set["Connection"]] = set()

    def __init__(self) -> None:
        self.is_open = False
        self._received = b""
        self._reply: asyncio.Future[Reply] | None = None

    @classmethod
    async def opened(cls, port: int, source: str = "") -> "Connection":
        """Connect.

        Args:
            port: of the server.
            source: address that the connection comes from; empty = any.

        Raises:
            OSError: nobody listens, or this side has no port or descriptor left.
        """
        loop, opened = asyncio.get_running_loop(), socket.socket()
        try:
            opened.setblocking(False)
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if source:
                opened.bind((source, 0))
            await loop.sock_connect(opened, (HOST, port))
            _, connection = await loop.create_connection(cls, sock=opened)
        except BaseException:
            opened.close()
            raise
        return connection

    async def ask(self, head: bytes, body: bytes, timeout_s: float) -> Reply:
        """Send a request, and wait for the whole answer.

        Raises:
            ConnectionError: it ended before, or took longer.
        """
        loop = asyncio.get_running_loop()
        self._reply = loop.create_future()
        if not self.is_open:
            raise ConnectionResetError
        self._transport.writelines((head, body))
        late = loop.call_later(timeout_s, self.close)
        try:
            reply = await self._reply
        finally:
            late.cancel()
        if reply.fields.get(b"connection") == b"close":
            self.close()
        return reply

    def close(self) -> None:
        """End it; what is under way is lost."""
        if self.is_open:
            self.is_open = False
            self._transport.abort()

    def connection_made(self, transport: Any) -> None:
        """Take a transport: of asyncio.Protocol."""
        self._transport = transport
        self.is_open = True
        self.all_open.add(self)

    def data_received(self, data: bytes) -> None:
        """Take a part of an answer: of asyncio.Protocol."""
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end or self._reply is None or self._reply.done():
            return
        first, *lines = head.split(b"\r\n")
        pairs = (line.split(b":", 1) for line in lines)
        fields = {name.lower(): value.strip() for name, value in pairs}
        if b"content-length" not in fields:
            self._reply.set_exception(ValueError(f"an answer without Content-Length: {head!r}"))
        elif len(body) >= int(fields[b"content-length"]):
            self._received = b""
            self._reply.set_result(Reply(int(first.split()[1]), fields))

    def connection_lost(self, exc: Exception | None) -> None:
        """Hear of the end: of asyncio.Protocol."""
        self.is_open = False
        self.all_open.discard(self)
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(ConnectionResetError())


def post_head(path: str, content_type: str, num_bytes: int, is_last: bool = False) -> bytes:
    """Write the head of a request; after the last one, the server ends the connection."""
    lines = [
        f"POST {path} HTTP/1.1",
        f"Host: {HOST}",
        f"Content-Type: {content_type}",
        f"Content-Length: {num_bytes}",
    ]
    if is_last:
        lines.append("Connection: close")
    return "\r\n".join((*lines, "", "")).encode()


def run_clients(work: Coroutine[Any, Any, T]) -> T:
    """Run what asks in the loop that the service runs in: a third of the time of asyncio's."""

    async def run() -> T:
        try:
            return await work
        finally:
            for connection in tuple(Connection.all_open):
                connection.close()
            while Connection.all_open:
                await asyncio.sleep(0)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())
