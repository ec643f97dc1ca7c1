"""A checked artifact -> worker processes on one socket, replaced when they end; drained by SIGTERM.

In the place of BentoML's master process, which opens two more ports, where every user of the
machine can have commands run, and waits for seconds before it replaces a worker. Workers are forked
from this process, which has imported all they need: a new one serves when it has opened the
artifact.

A command of the same user may have another artifact served (see serving.control): new workers open
it beside the old ones, which take no more connections when all of the new ones are ready.
"""

import ctypes
import errno
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Collection, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from efficientnet.command import parse_flags, run_command
from efficientnet.errors import PipelineError
from serving.control import Answer, Command, Control, control_path
from serving.pinning import PinnedArtifact, pin
from serving.settings import BACKLOG, read_settings

LONGEST_PAUSE_S = 60.0

# Beyond what a worker gives its requests, see serving.worker.
END_MARGIN_S = 5.0

# Of socket.h.
SO_ATTACH_FILTER = 26

# Drops a packet that opens a connection (of SYN and ACK only SYN), and lets all others through:
# the byte of flags, and SYN | ACK, equals SYN, drop, keep.
NO_NEW_CONNECTIONS = (
    (0x30, 0, 0, 13),
    (0x54, 0, 0, 0x12),
    (0x15, 0, 1, 0x02),
    (0x06, 0, 0, 0),
    (0x06, 0, 0, 0xFFFFFFFF),
)

# Has a worker take no more connections, and end when those that it has have ended; before it takes
# any, this signal ends it at once, as by itself it does.
LEAVE = signal.SIGUSR1

log = logging.getLogger("bentoml.supervisor")


class ServeError(PipelineError):
    """A service that cannot be started here."""


@dataclass(frozen=True)
class SupervisorConfig:
    """Where to listen; see serving/run.py."""

    host: str
    port: int
    allow_change: bool = False


@dataclass
class Worker:
    """A process, and what it has said."""

    number: int
    artifact: PinnedArtifact
    process: BaseProcess
    connection: Connection
    is_ready: bool = False
    is_leaving: bool = False
    problem: str = ""


@dataclass(frozen=True)
class Change:
    """An artifact that new workers open, and who asked for it."""

    command: Command
    artifact: PinnedArtifact


class Supervisor:
    """Keeps workers running.

    One that ends after it was ready is replaced at once, so that the next connection finds it. One
    that ends before is started again after a pause, which doubles; while there is no other, a
    stand-in answers that the service is not ready, and why.

    Args:
        num_workers: processes at once.
        artifact: that they serve, until a command names another.
        start_worker: forks one that talks through a connection; its number starts at 1.
        start_stand_in: forks one that says a reason.
        on_end: called with the process id of each worker that has ended.
        control: where commands come from; None = nowhere.
    """

    def __init__(
        self,
        num_workers: int,
        artifact: PinnedArtifact,
        start_worker: Callable[[int, PinnedArtifact], tuple[BaseProcess, Connection]],
        start_stand_in: Callable[[str], BaseProcess],
        on_end: Callable[[int], None],
        control: Control | None = None,
    ) -> None:
        self._numbers = range(1, num_workers + 1)
        self._artifact = artifact
        self._start_worker = start_worker
        self._start_stand_in = start_stand_in
        self._on_end = on_end
        self._control = control
        self._change: Change | None = None
        self._workers: list[Worker] = []
        self._due = dict.fromkeys(self._numbers, 0.0)
        self._stand_in: BaseProcess | None = None
        self._num_failures = 0
        self._was_ready = False

    def run(self, signals: socket.socket) -> None:
        """Start the workers and return when a signal has come.

        Args:
            signals: can be read when a signal has come.

        Raises:
            ServeError: the first worker to end did so before any was ready.
        """
        while True:
            self._start_due()
            heard = wait(self._waited_for(signals), self._seconds_to_next())
            if signals in heard:
                return
            for worker in list(self._workers):
                self._listen(worker)
                if not worker.process.is_alive():
                    self._take_off(worker)
            if self._change:
                self._go_on(self._change, heard)
            if self._control in heard:
                self._hear(self._control)

    def terminate(self) -> None:
        """Have all processes answer what they have and end."""
        for process in self._processes():
            process.terminate()

    def end(self, timeout_s: float) -> None:
        """Wait until all processes have ended; kill those that do not in time."""
        deadline = time.monotonic() + timeout_s
        for process in self._processes():
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                log.error("process %d did not end in %.0f s and is killed", process.pid, timeout_s)
                process.kill()
                process.join()
        self._artifact.close()
        if self._change:
            self._change.artifact.close()

    def _processes(self) -> list[BaseProcess]:
        processes = [worker.process for worker in self._workers]
        return [*processes, self._stand_in] if self._stand_in else processes

    def _start_due(self) -> None:
        now = time.monotonic()
        for number in [number for number, due in self._due.items() if due <= now]:
            del self._due[number]
            self._start(number, self._artifact)

    def _start(self, number: int, artifact: PinnedArtifact) -> None:
        self._workers.append(Worker(number, artifact, *self._start_worker(number, artifact)))

    def _waited_for(self, signals: socket.socket) -> list[Any]:
        sentinels = [worker.process.sentinel for worker in self._workers]
        silent = [worker.connection for worker in self._workers if not worker.connection.closed]
        commands: list[Any] = [self._control] if self._control else []
        if self._change and self._change.artifact is not self._artifact:
            commands.append(self._change.command.connection)
        return [signals, *sentinels, *silent, *commands]

    def _seconds_to_next(self) -> float | None:
        due = min(self._due.values(), default=None)
        return None if due is None else max(0.0, due - time.monotonic())

    def _listen(self, worker: Worker) -> None:
        while not worker.connection.closed and worker.connection.poll():
            try:
                said = worker.connection.recv()
            except EOFError:
                worker.connection.close()
                return
            if said:
                worker.problem = said
                continue
            if worker.is_leaving:
                continue
            worker.is_ready = self._was_ready = True
            self._num_failures = 0
            log.info("worker %d is ready, process %d", worker.number, worker.process.pid)
            if self._stand_in:
                _tell_to_leave(self._stand_in)
                self._stand_in = None

    def _take_off(self, worker: Worker) -> None:
        self._workers.remove(worker)
        worker.process.join()
        self._on_end(worker.process.pid or 0)
        how = f"worker {worker.number} (process {worker.process.pid}) {_ending(worker.process)}"
        if worker.is_leaving:
            log.info("%s, as it was told to", how)
        elif self._change and worker.artifact is not self._artifact:
            self._call_off(self._change, worker.problem or how)
        else:
            self._replace(worker, how)

    def _replace(self, worker: Worker, how: str) -> None:
        if worker.is_ready:
            log.error("%s; another is started", how)
            self._due[worker.number] = 0.0
            return
        reason = worker.problem or f"{how} before it was ready; the log says why"
        if not self._was_ready:
            raise ServeError(reason)
        pause = min(LONGEST_PAUSE_S, 2.0**self._num_failures)
        self._num_failures += 1
        self._due[worker.number] = time.monotonic() + pause
        log.error("no worker %d: %s; tried again in %.0f s", worker.number, reason, pause)
        if self._stand_in is None and not any(
            other.is_ready and not other.is_leaving for other in self._workers
        ):
            self._stand_in = self._start_stand_in(reason)

    def _hear(self, control: Control) -> None:
        command = control.accept()
        if command is None:
            return
        if self._change:
            command.answer(Answer(problem="it is changing already; ask again when that is done"))
            return
        try:
            artifact = pin(command.artifact)
        except (PipelineError, OSError) as error:
            log.error("no change to %s: %s", command.artifact, error)
            command.answer(Answer(problem=str(error)))
            return
        log.info("change to %s, %s", command.artifact, artifact.sha256[:12])
        self._change = Change(command, artifact)
        try:
            for number in self._numbers:
                self._start(number, artifact)
        except OSError as error:
            self._call_off(self._change, f"no process can be started: {error}")

    def _go_on(self, change: Change, heard: Collection[Any]) -> None:
        if self._artifact is not change.artifact:
            if change.command.connection in heard:
                self._call_off(change, "the command was ended before the new workers were ready")
                return
            if not all(w.is_ready for w in self._workers if w.artifact is change.artifact):
                return
            self._let_go(self._artifact)
            self._due.clear()
            self._artifact.close()
            self._artifact = change.artifact
        if not any(worker.is_leaving for worker in self._workers):
            log.info("changed to %s", change.artifact.sha256[:12])
            change.command.answer(Answer(artifact_sha256=change.artifact.sha256))
            self._change = None

    def _call_off(self, change: Change, reason: str) -> None:
        log.error("no change to %s: %s", change.command.artifact, reason)
        self._let_go(change.artifact)
        change.artifact.close()
        change.command.answer(Answer(problem=reason))
        self._change = None

    def _let_go(self, artifact: PinnedArtifact) -> None:
        for worker in self._workers:
            if worker.artifact is artifact:
                worker.is_leaving = True
                _tell_to_leave(worker.process)


def _tell_to_leave(process: BaseProcess) -> None:
    if process.is_alive():
        assert process.pid is not None  # 0 would be everything in the group
        os.kill(process.pid, LEAVE)


def _ending(process: BaseProcess) -> str:
    code = process.exitcode or 0
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def main(config: SupervisorConfig) -> None:
    """Serve until SIGTERM or Ctrl-C, and then until everything accepted is answered.

    Raises:
        ArtifactError: see read_artifact.
        ServeError: the port is taken, or the first worker could not serve.
    """
    settings = read_settings(os.environ)
    metrics = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
    shutil.rmtree(metrics, ignore_errors=True)
    metrics.mkdir(parents=True)
    with ExitStack() as at_end:
        listener = at_end.enter_context(listening_socket(config.host, config.port))
        at_end.callback(shutil.rmtree, metrics, ignore_errors=True)
        control = Control(control_path(config.port)) if config.allow_change else None
        if control:
            at_end.callback(control.close)
        # Imported with the environment's settings, and once for all workers.
        from bentoml._internal.log import configure_server_logging
        from prometheus_client.multiprocess import mark_process_dead

        from serving import worker

        configure_server_logging()
        application = worker.build_application()
        fork = multiprocessing.get_context("fork")

        def start_worker(number: int, artifact: PinnedArtifact) -> tuple[BaseProcess, Connection]:
            ours, theirs = fork.Pipe(duplex=False)
            served = replace(
                settings,
                artifact=artifact.path,
                artifact_sha256=settings.artifact_sha256 or artifact.sha256,
            )
            arguments = (application, listener, theirs, number, served)
            process = fork.Process(target=worker.run_worker, args=arguments)
            process.start()
            theirs.close()
            return process, ours

        def start_stand_in(reason: str) -> BaseProcess:
            process = fork.Process(target=worker.run_stand_in, args=(listener, reason, settings))
            process.start()
            return process

        artifact = pin(settings.artifact)
        supervisor = Supervisor(
            settings.workers, artifact, start_worker, start_stand_in, mark_process_dead, control
        )
        at_end.callback(supervisor.end, 0)
        with signals_as_socket() as signals:
            supervisor.run(signals)
            log.info("the service ends when all that it has accepted is answered")
            supervisor.terminate()
            time.sleep(settings.drain_s)
            refuse_new_connections(listener)
            supervisor.end(worker.GRACE_S + END_MARGIN_S)


def listening_socket(host: str, port: int) -> socket.socket:
    """Bind a socket that connections can wait at from now on.

    Raises:
        ServeError: nothing can listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Without the protocol asyncio does not set TCP_NODELAY, and the body of an answer waits 40 ms
    # for the client to have acknowledged the head.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    # Connections that were closed a moment ago do not count.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ServeError(
                f"port {port} is taken by another program; stop that program, "
                f"or use another port: make serve PORT={port + 1}, "
                f"or --port {port + 1}"
            ) from None
        raise ServeError(f"cannot listen on {host} port {port}: {error.strerror}") from None
    return listener


def refuse_new_connections(listener: socket.socket) -> None:
    """Let the connections that wait be taken, and no other begin; on Linux.

    Closing a socket that listens resets what waits in it. A client whose packet is dropped sends it
    again a second later, and is refused then, or taken by the next service on this port.
    """
    if sys.platform != "linux":
        return
    code = b"".join(struct.pack("HBBI", *step) for step in NO_NEW_CONNECTIONS)
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("HP", len(NO_NEW_CONNECTIONS), ctypes.addressof(buffer))
    listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


@contextmanager
def signals_as_socket() -> Generator[socket.socket]:
    """Give a socket that can be read when SIGTERM or SIGINT has come."""
    received, sent = socket.socketpair()
    with received, sent:
        sent.setblocking(False)
        signal.set_wakeup_fd(sent.fileno())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        try:
            yield received
        finally:
            signal.set_wakeup_fd(-1)


if __name__ == "__main__":
    run_command(lambda: parse_flags(SupervisorConfig, __doc__), main)
