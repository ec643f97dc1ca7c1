"""What opens a subject -> a process that holds it, and computes only when it is asked to.

What happens inside that process is in contender_process.py.
"""

import contextlib
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Pipe
from typing import Any

from efficientnet.errors import PipelineError

PROCESS = "efficientnet.measuring.contender_process"


class ContenderError(PipelineError):
    """A process that measures has failed: `contender`, where it was one."""

    def __init__(self, message: str, contender: "Contender | None" = None) -> None:
        super().__init__(message)
        self.contender = contender


class Contender:
    """A subject in a process of its own, which holds no library but those that the subject needs.

    Ctrl-C is left to the process that started it, and with which it ends, however that happened.

    Args:
        name: in errors.
        opener: returns the subject, an object whose methods are asked for; is pickled.
        descriptors: of open files that the opener needs.
    """

    def __init__(
        self, name: str, opener: Callable[[], object], descriptors: Sequence[int] = ()
    ) -> None:
        self.name = name
        self._opener = pickle.dumps(opener)
        self._descriptors = descriptors

    def start(self) -> None:
        """Start the process, which opens its subject then."""
        self._connection, theirs = Pipe()
        # -P: the working directory does not come before the installed packages.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", PROCESS, str(theirs.fileno())],
            stdin=subprocess.PIPE,
            stdout=sys.__stderr__.fileno() if sys.__stderr__ else None,
            pass_fds=(theirs.fileno(), *self._descriptors),
            start_new_session=True,
        )
        theirs.close()
        self._send((sys.path, self._opener))

    def wait(self) -> None:
        """Wait until the subject is open."""
        self._receive()

    def ask(self, method: str, *arguments: object) -> Any:
        """Call a method of the subject; return its result."""
        self._send((method, arguments))
        return self._receive()

    def stop(self) -> None:
        """End it at once, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._connection.close()
        if self._process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def _send(self, message: object) -> None:
        # A process that died is noticed by the next `_receive`, which knows what it left.
        with contextlib.suppress(ConnectionError):
            self._connection.send(message)

    def _receive(self) -> Any:
        try:
            result, problem = self._connection.recv()
        except (EOFError, ConnectionError):
            result, problem = None, self._epitaph()
        if problem is not None:
            raise ContenderError(f"{self.name}: {problem}", self)
        return result

    def _epitaph(self) -> str:
        code = self._process.wait()
        if code < 0:
            hint = "; the machine may be out of memory" if -code == signal.SIGKILL else ""
            return f"its process was ended by {signal.Signals(-code).name}{hint}"
        return f"its process ended with exit code {code}; what it said stands above"


@contextmanager
def running(
    contenders: Sequence[Contender], failures: list[ContenderError] | None = None
) -> Generator[None]:
    """Start all, wait until each is ready, and end them afterwards.

    Args:
        contenders: what is started.
        failures: takes those that did not get ready, and the others go on; None = none may fail.
    """
    with ExitStack() as stack:
        for contender in contenders:
            contender.start()
            stack.callback(contender.stop)
        for contender in contenders:
            try:
                contender.wait()
            except ContenderError as error:
                if failures is None:
                    raise
                failures.append(error)
        yield
