"""A listening socket -> one worker process that answers on it: told when it is ready, and drained.

Accepted requests are answered before the process ends, and so are connections that the kernel has
accepted and no process has looked at yet.
"""

import asyncio
import ctypes
import importlib
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from typing import Any

import uvicorn
from bentoml._internal.context import server_context
from starlette.types import Message, Receive, Scope, Send

from serving.admission import Gate, with_cors
from serving.connections import Refuser, SilentConnections, limited
from serving.refusals import cannot_classify, refusal_response
from serving.routes import app, is_path
from serving.settings import BACKLOG, Settings

# Requests that are not answered this long after the last connection was taken are cut off: a client
# may be at its upload for CLASSIFIER_TIMEOUT_S.
GRACE_S = 20

# For handshakes that are under way when the supervisor lets no more begin; then for the connections
# to be taken, and for the first request of each.
HANDSHAKE_S = 0.3
LAST_REQUESTS_S = 1.0

RETRY_AFTER_S = 5

# Of prctl.h.
PR_SET_PDEATHSIG = 1


class DrainingServer(uvicorn.Server):
    """Takes connections when the application can serve, and ends when all have been answered.

    Args:
        config: of uvicorn.
        listener: bound; shared with other workers.
        on_started: called after the application's start; returns whether to take connections.
        on_draining: called at the end's beginning; readiness goes down.
        drain_s: how long new connections come after that.
        max_per_address: connections of one address.
        on_leaving: called when connections are left to other workers; readiness stays.
        longest_s: how long those that there are may last then.
        refuser: see connections.limited.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        listener: socket.socket,
        on_started: Callable[[], bool],
        on_draining: Callable[[], None],
        drain_s: float,
        max_per_address: int,
        on_leaving: Callable[[], None] = lambda: None,
        longest_s: float = 0.0,
        refuser: Refuser = lambda _: None,
    ) -> None:
        super().__init__(config)
        self._refuser = refuser
        self._on_leaving = on_leaving
        self._longest_s = longest_s
        self._is_leaving = False
        self._left_at: float | None = None
        self._max_per_address = max_per_address
        self._silent = SilentConnections()
        self._listener = listener
        self._on_started = on_started
        self._on_draining = on_draining
        self._drain_s = drain_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, and listen if it can serve."""
        await super().startup(sockets=[])
        protocol: Any = self.config.http_protocol_class
        self._protocol_class = limited(protocol, self._max_per_address, self._refuser)
        if not self._on_started():
            self.should_exit = True
            return
        # asyncio accepts as many connections at once as its backlog: with more than one, a worker
        # that wakes first takes what the others have time for.
        server = await asyncio.get_running_loop().create_server(
            self._protocol, sock=self._listener, backlog=1
        )
        self._listener.listen(BACKLOG)
        self.servers.append(server)

    async def on_tick(self, counter: int) -> bool:
        """Do what is done ten times a second; return whether to end."""
        connections = self.server_state.connections
        if counter % 10 == 0:
            self._silent.close(connections)
        if self._left_at is not None:
            is_late = time.monotonic() > self._left_at + self._longest_s
            self.should_exit |= is_late or not connections
        elif self._is_leaving:
            self._left_at = time.monotonic()
            self._on_leaving()
            while self.servers:
                self.servers.pop().close()
        return await super().on_tick(counter)

    def leave(self) -> None:
        """Take no more connections, which other workers do, and end when the last has ended.

        None is closed in which a request may be on its way: the next answer tells its client to
        open another, and one without a request ends in its usual time.
        """
        self._is_leaving = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what has come, and end."""
        if self.servers:
            self._on_draining()
            await asyncio.sleep(self._drain_s)
            await asyncio.sleep(HANDSHAKE_S)
            await self._until(lambda: not _has_connections(self._listener))
            connections: set[Any] = self.server_state.connections
            await self._until(lambda: all(c.cycle is not None for c in connections))
        await super().shutdown(sockets)

    async def _until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LAST_REQUESTS_S
        while not condition() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    def _protocol(self) -> asyncio.Protocol:
        return self._protocol_class(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )


def build_application() -> Any:
    """Make what all workers serve, without the artifact, and import what that takes."""
    from serving import service  # reads the settings, so not before they are wanted

    # BentoML imports it when a service starts.
    importlib.import_module("_bentoml_impl.client.proxy")
    bento = service.Classifier
    bento.inject_config()
    server_context.service_type = "entry_service"
    server_context.service_name = server_context.bento_name = bento.name
    return bento.to_asgi()


def run_worker(
    application: Any,
    listener: socket.socket,
    supervisor: Connection,
    number: int,
    settings: Settings,
) -> None:
    """Serve until SIGTERM.

    SIGUSR1 has it leave: see DrainingServer. Before it serves, the signal ends it at once.

    Args:
        application: see build_application.
        listener: bound; shared with other workers.
        supervisor: is told what keeps the worker from serving: nothing, or else it ends.
        number: of this worker, from 1.
        settings: of the service, with the artifact that this worker serves.
    """
    from serving import service

    end_with_parent()
    server_context.worker_index = number
    # Those that were read when the service started name another artifact after a change.
    service.SETTINGS = settings

    def tell() -> bool:
        signal.signal(signal.SIGUSR1, lambda *_: server.leave())
        problem = app.state.classifier.work.problem
        supervisor.send(problem)
        return not problem

    def drain() -> None:
        app.state.classifier.is_draining = True

    def leave() -> None:
        app.state.classifier.is_leaving = True

    server = DrainingServer(
        _config(application),
        listener,
        tell,
        drain,
        settings.drain_s,
        settings.max_connections_per_address,
        leave,
        settings.timeout_s + LAST_REQUESTS_S,
        service.refuse_early,
    )
    server.run()
    os._exit(0)  # without waiting for a thread that is at a picture nobody waits for


def run_stand_in(listener: socket.socket, reason: str, settings: Settings) -> None:
    """Answer for workers of which none can serve: not ready, and why.

    Until SIGUSR1, when a worker can: it takes no more connections, and answers those that it has.
    """
    end_with_parent()
    gate = Gate(_unavailable(reason), is_path, settings.allowed_hosts, settings.api_key)
    config = _config(with_cors(gate, settings.cors_origins))
    config.lifespan = "off"
    server = DrainingServer(
        config,
        listener,
        on_started=lambda: True,
        on_draining=lambda: None,
        drain_s=0.0,
        max_per_address=settings.max_connections_per_address,
        longest_s=LAST_REQUESTS_S,
    )
    signal.signal(signal.SIGUSR1, lambda *_: server.leave())
    server.run()


def end_with_parent() -> None:
    """Have this forked process end in order when its parent is killed, and by no signal before."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)


def _config(application: Any) -> uvicorn.Config:
    return uvicorn.Config(
        application,
        log_config=None,
        access_log=False,
        server_header=False,
        # In C: in Python, a request's head and body take a millisecond more.
        loop="uvloop",
        http="httptools",
        # No address takes web sockets; uvicorn's protocol for them has none of the limits.
        ws="none",
        timeout_graceful_shutdown=GRACE_S,
    )


def _unavailable(reason: str) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_alive(message: Message) -> None:
            await send({**message, "status": 200} if "status" in message else message)

        refusal = cannot_classify(reason, RETRY_AFTER_S)
        response = refusal_response(refusal)
        response.headers["Connection"] = "close"
        is_alive = scope["path"] in ("/livez", "/healthz")
        await response(scope, receive, send_alive if is_alive else send)

    return answer


def _has_connections(listener: socket.socket) -> bool:
    return bool(select.select([listener], [], [], 0)[0])
