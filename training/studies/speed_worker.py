"""Cases of a group -> what their processes measured, taking turns."""

import contextlib
import multiprocessing
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from efficientnet.errors import PipelineError
from efficientnet.machine.children import obey_parent
from training.learning.memory import device_memory_bytes
from training.studies.speed_contenders import our_step, timm_step
from training.studies.speed_plan import OURS, StepCase
from training.studies.speed_stopwatch import Stopwatch, Turn, WarmUp

MIN_WARM_UP_STEPS = 2

# Of a case's time, at most, for steps that do not count.
WARM_UP_FRACTION = 0.5


class SpeedError(PipelineError):
    """A process that measures has failed."""


@dataclass(frozen=True)
class Device:
    """Where a process computes."""

    type: str
    name: str
    memory_bytes: int


@dataclass(frozen=True)
class OutOfMemory:
    """The device did not hold it; the process has ended."""


@dataclass(frozen=True)
class Failed:
    """The process has ended with an error that its message explains."""

    message: str


class SpeedProcess:
    """A process that computes only when it is asked to."""

    def __init__(self, case: StepCase) -> None:
        self._case = case
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # Not a daemon: those may not have the loader's workers as children.
        self._process = context.Process(target=_serve, args=(theirs, case))
        self._process.start()
        theirs.close()

    def __enter__(self) -> "SpeedProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.kill()
        self._process.join()

    def wait(self) -> Device:
        """Wait until it has started; return what it will compute on."""
        device = self._receive()
        assert isinstance(device, Device)
        return device

    def warm_up(self, max_s: float) -> WarmUp | None:
        """Build the network and take steps that do not count; None: it does not fit."""
        answer = self._ask((None, max_s))
        assert isinstance(answer, WarmUp | None)
        return answer

    def take_turn(self, seconds: float, num_settling_steps: int) -> Turn | None:
        """Take uncounted steps to settle, then steps for some seconds, at least one; None: OOM.

        The last step may end later.
        """
        answer = self._ask((num_settling_steps, seconds))
        assert isinstance(answer, Turn | None)
        return answer

    def _ask(self, question: tuple[int | None, float]) -> object:
        # A process that died is noticed by _receive, which knows what it left.
        with contextlib.suppress(ConnectionError):
            self._connection.send(question)
        answer = self._receive()
        return None if isinstance(answer, OutOfMemory) else answer

    def _receive(self) -> object:
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise SpeedError(
                f"the process that measured {self._case.describe()} ended with exit code "
                f"{self._process.exitcode}; its own error is above, or the system killed it"
            ) from None
        if isinstance(answer, Failed):
            raise SpeedError(f"{self._case.describe()}: {answer.message}")
        return answer


@dataclass
class Measured:
    """What a process answered so far."""

    case: StepCase
    device: Device
    warm_up: WarmUp | None = None
    turns: tuple[Turn, ...] = ()
    is_out_of_memory: bool = False


def measure(group: Sequence[StepCase], seconds: float, num_turns: int) -> list[Measured]:
    """Let the processes of a group take turns; one alone has a single long one.

    All are in memory at once. Each has so many seconds in all, without its warm-up.

    Raises:
        SpeedError: a process failed.
    """
    takes_turns = len(group) > 1
    num_turns = num_turns if takes_turns else 1
    with ExitStack() as stack:
        processes = [stack.enter_context(SpeedProcess(case)) for case in group]
        rows = [(p, Measured(case, p.wait())) for p, case in zip(processes, group, strict=True)]
        for process, measured in rows:
            measured.warm_up = process.warm_up(WARM_UP_FRACTION * seconds)
            measured.is_out_of_memory = measured.warm_up is None
        for number in range(num_turns):
            # There and back: a machine that gets slower or faster meanwhile favors nobody.
            for process, measured in rows if number % 2 == 0 else reversed(rows):
                if measured.is_out_of_memory:
                    continue
                turn = process.take_turn(seconds / num_turns, 1 if takes_turns else 0)
                measured.turns += () if turn is None else (turn,)
                measured.is_out_of_memory = turn is None
    return [measured for _, measured in rows]


def _serve(connection: Connection, case: StepCase) -> None:
    obey_parent()
    # The loader's workers are forks, as in training; this process was spawned and would spawn.
    multiprocessing.set_start_method(None, force=True)
    torch.set_num_threads(case.num_threads)
    # As in training; of timm's steps, too. Random pixels may make them.
    torch.set_flush_denormal(True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        connection.send(Device(device.type, name, device_memory_bytes(device)))
        stopwatch: Stopwatch | None = None
        while True:
            num_settling_steps, seconds = connection.recv()
            if num_settling_steps is None:
                make = our_step if case.contender == OURS else timm_step
                # What the workers have ready would make the first steps look too fast.
                min_steps = MIN_WARM_UP_STEPS + (2 * case.num_workers + 2 if case.data else 0)
                stopwatch = Stopwatch(make(case, device), device)
                connection.send(stopwatch.warm_up(seconds, min_steps, case.is_compiled))
            else:
                assert stopwatch is not None, "warm_up comes first"
                connection.send(stopwatch.turn(seconds, num_settling_steps))
    except torch.OutOfMemoryError:
        connection.send(OutOfMemory())
    except (EOFError, BrokenPipeError):
        return
    except (PipelineError, ValueError, OSError) as error:
        connection.send(Failed(str(error)))
