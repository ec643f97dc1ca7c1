"""A program -> a process of its own, which computes only when it is asked to: Worker.

What happens inside that process is in worker_process.py.
"""

import contextlib
import signal
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.connection import Pipe
from pathlib import Path

from efficientnet.errors import PipelineError
from efficientnet.measuring.clock import Turn, WarmUp
from efficientnet.measuring.inputs import Inputs
from efficientnet.runtimes import ProgramInfo


class WorkerError(PipelineError):
    """A process that measures has failed."""


@dataclass(frozen=True)
class Assignment:
    """What a process measures."""

    program: Path | ProgramInfo
    """A directory for open_runtime, or what the null runtime pretends to be."""
    num_threads: int
    inputs_descriptor: int
    image_size: int


@dataclass(frozen=True)
class WarmUpRequest:
    """Asks for a WarmUp."""

    batch_size: int
    window_s: float
    max_s: float


@dataclass(frozen=True)
class TurnRequest:
    """Asks for a Turn."""

    batch_size: int
    seconds: float


@dataclass(frozen=True)
class Answer:
    """What a process found, and its memory so far."""

    result: WarmUp | Turn | None
    """None: it has opened its program and is ready."""
    peak_memory_bytes: int
    """Peak resident memory without the inputs, which all processes share."""
    cores_busy_elsewhere: float | None = None
    """While a turn was measured."""

    @property
    def turn(self) -> Turn:
        """The answer to a TurnRequest."""
        assert isinstance(self.result, Turn)
        return self.result


@dataclass(frozen=True)
class Failure:
    """Why a process ends without an answer, in one line."""

    message: str


class Worker:
    """The handle of such a process. Opening takes a while; the first `receive` waits for it."""

    def __init__(self, name: str, program: Path | ProgramInfo, num_threads: int, inputs: Inputs):
        self.name = name
        self._place = name if isinstance(program, ProgramInfo) else f"{name} ({program})"
        descriptor = inputs.file.fileno()
        self._connection, theirs = Pipe()
        # -P: the working directory does not come before the installed packages. In a session of its
        # own the process does not see Ctrl-C, it is ended by this one.
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "efficientnet.measuring.contender_process",
                str(theirs.fileno()),
            ],
            stdin=subprocess.PIPE,
            stdout=sys.__stderr__.fileno() if sys.__stderr__ else None,
            pass_fds=(theirs.fileno(), descriptor),
            start_new_session=True,
        )
        theirs.close()
        self._send(Assignment(program, num_threads, descriptor, inputs.image_size))

    def receive(self) -> Answer:
        """Wait for an answer.

        Raises:
            WorkerError: it has failed or died.
        """
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            raise WorkerError(f"{self._place}: {self._epitaph()}") from None
        if isinstance(answer, Failure):
            raise WorkerError(f"{self._place}: {answer.message}")
        return answer

    def warm_up(self, batch_size: int, window_s: float, max_s: float) -> WarmUp:
        """Let it warm up and wait for the end."""
        self._send(WarmUpRequest(batch_size, window_s, max_s))
        result = self.receive().result
        assert isinstance(result, WarmUp)
        return result

    def take_turn(self, batch_size: int, seconds: float) -> Answer:
        """Let it measure and wait for its Turn."""
        self._send(TurnRequest(batch_size, seconds))
        return self.receive()

    def stop(self) -> None:
        """End it at once, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._connection.close()
        if self._process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def _send(self, message: object) -> None:
        # A process that died is noticed by the next `receive`, which knows what it left.
        with contextlib.suppress(ConnectionError):
            self._connection.send(message)

    def _epitaph(self) -> str:
        code = self._process.wait()
        if code < 0:
            name = signal.Signals(-code).name
            hint = "; the machine may be out of memory" if -code == signal.SIGKILL else ""
            return f"its process was ended by {name}{hint}"
        return f"its process ended with exit code {code}; what it said stands above"
