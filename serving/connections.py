"""Connections of uvicorn -> those that say nothing, or are too many of one address, are closed."""

import time
from collections.abc import Iterable
from typing import Any

from serving.answers import Problem
from serving.refusals import PROBLEM_TYPE

# In which a request's head, its first line and its headers, must have come.
HEAD_S = 10.0

# What a refused client is still sending is read for so long: closed before, the connection would
# be reset, and the refusal lost on its way.
LINGER_S = 5.0


def limited(protocol_class: type[Any], max_per_address: int) -> type[Any]:
    """Return a protocol that answers 429 to more connections of an address than that."""

    class Limited(protocol_class):
        _is_refused = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if self.client is None:  # a Unix socket's
                return
            address = self.client[0]
            # This one is among them.
            if sum(c.client is not None and c.client[0] == address for c in self.connections) > (
                max_per_address
            ):
                self._is_refused = True
                self.connections.discard(self)
                transport.write(_refusal(address, max_per_address))
                transport.write_eof()
                self.loop.call_later(LINGER_S, transport.close)

        def data_received(self, data: bytes) -> None:
            if not self._is_refused:
                super().data_received(data)

    return Limited


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
    body = (
        Problem.of(
            "overloaded",
            f"there are {max_per_address} connections from {address}, and more are not taken; use "
            "one for several requests",
        )
        .model_dump_json()
        .encode()
    )
    head = (
        f"HTTP/1.1 429 Too Many Requests\r\nContent-Type: {PROBLEM_TYPE}\r\n"
        f"Content-Length: {len(body)}\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
