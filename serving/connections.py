"""Connections of uvicorn -> ended where they are silent or too many, refused when all is full."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from starlette.types import Scope

from serving.refusals import as_http, problem_response

# In which a request's head, its first line and its headers, must have come.
HEAD_S = 10.0

# What a refused client is still sending is read for so long: closed before, the connection would
# be reset, and the answer lost on its way.
LINGER_S = 5.0


# Takes a request of ASGI whose head has come, and gives the whole answer, with `Connection: close`,
# or None where the application is to answer.
Refuser = Callable[[Scope], bytes | None]


def limited(
    protocol_class: type[Any], max_per_address: int, refuser: Refuser = lambda _: None
) -> type[Any]:
    """Return a protocol that answers 429 to more connections of an address than that.

    Where an answer ends a connection whose request is still being sent, the rest is thrown away as
    it comes, without being looked at. An application hears of this by `is_body_coming` in the
    scope, which tells whether there is a rest.

    Args:
        protocol_class: of uvicorn, made with httptools.
        max_per_address: connections.
        refuser: says no where no application needs to be asked.
    """
    num_of = Counter[str]()

    class Limited(protocol_class):
        _address: str | None = None
        _end: asyncio.TimerHandle | None = None
        """Set where what comes is thrown away."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if self.client is None:  # a Unix socket's
                return
            address: str = self.client[0]
            self._address = address
            num_of[address] += 1
            if num_of[address] > max_per_address:
                self.connections.discard(self)
                transport.write(_refusal(address, max_per_address))
                self._uncount()
                self.end_gently()

        def connection_lost(self, exc: Exception | None) -> None:
            self._uncount()
            if self._end:
                self._end.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if not self._end:
                super().data_received(data)

        def _start_asgi_task(self, cycle: Any, app: Any) -> None:
            refusal = refuser(cycle.scope)
            if refusal is None:
                super()._start_asgi_task(cycle, app)
                return
            cycle.response_started = cycle.response_complete = True
            self.transport.write(refusal)
            self.end_gently()

        def on_headers_complete(self) -> None:
            super().on_headers_complete()
            cycle = self.cycle
            if cycle is not None and cycle.scope is self.scope:
                self.scope["is_body_coming"] = lambda: cycle.more_body
                cycle.transport = _Gentle(self, cycle)

        def end_gently(self) -> None:
            if self._end or self.transport.is_closing():
                return
            self._end = self.loop.call_later(LINGER_S, self.transport.close)
            self.transport.write_eof()
            self.transport.resume_reading()

        def shutdown(self) -> None:
            if not self._end:  # it ends by itself
                super().shutdown()

        def _uncount(self) -> None:
            if self._address is not None:
                num_of[self._address] -= 1
                if not num_of[self._address]:
                    del num_of[self._address]
                self._address = None

    return Limited


class _Gentle:
    """The transport of one answer: its head and its body go together, in half the time.

    Closed before the request has come, it is not closed at once.
    """

    def __init__(self, protocol: Any, cycle: Any) -> None:
        self._protocol = protocol
        self._cycle = cycle
        self._transport = protocol.transport
        self._head = b""
        self._has_begun = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._head = data
            self._protocol.loop.call_soon(self._send_head)  # where the body comes later
        elif self._head:
            head, self._head = self._head, b""
            self._transport.write(head + data)
        else:
            self._transport.write(data)

    def close(self) -> None:
        self._send_head()
        if self._cycle.more_body:
            self._protocol.end_gently()
        else:
            self._transport.close()

    def _send_head(self) -> None:
        if self._head:
            self._transport.write(self._head)
            self._head = b""


class SilentConnections:
    """Closes connections on which a request's head does not come.

    Bodies have a deadline of their own, and uvicorn closes those that have been answered and are
    not used again.
    """

    def __init__(self) -> None:
        self._since: dict[Any, tuple[object, float]] = {}

    def close(self, connections: Iterable[Any]) -> None:
        """Look at all connections; to be called again and again."""
        now = time.monotonic()
        since: dict[Any, tuple[object, float]] = {}
        for connection in connections:
            # The cycle is uvicorn's request and answer, another for each.
            cycle = connection.cycle
            if cycle is not None and not cycle.response_complete:
                continue
            known, start = self._since.get(connection, (cycle, now))
            since[connection] = (cycle, start if known is cycle else now)
            if now - since[connection][1] > HEAD_S:
                connection.transport.close()
        self._since = since


def _refusal(address: str, max_per_address: int) -> bytes:
    response = problem_response(
        "overloaded",
        f"there are {max_per_address} connections from {address}, and more are not taken; use "
        "one for several requests",
        {"Retry-After": "1", "Connection": "close"},
    )
    return as_http(response, ())
