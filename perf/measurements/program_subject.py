"""A program, inside the process that measures it -> its warm-ups, its turns, their memory."""

import gc
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from efficientnet.measuring.clock import Call, TimedCall, Turn, WarmUp
from efficientnet.measuring.inputs import map_inputs, rotate
from efficientnet.measuring.machine_use import CpuUse
from efficientnet.runtimes import ProgramInfo, open_runtime
from perf.measurements.server_load import answer_planned


class NullRuntime:
    """Answers zeros for a program: what that takes is the overhead of the harness around it.

    It does not look at the images, as each of the runtimes does to refuse NaN: that is a part of
    their calls, and most of it is reading the images from memory, which then are in the cache.
    """

    def __init__(self, info: ProgramInfo) -> None:
        self.info = info

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """See Runtime.infer."""
        return np.zeros((len(images), len(self.info.class_names)), dtype=np.float32)


@dataclass(frozen=True)
class ProgramTurn:
    """A turn, and what was seen of the machine."""

    turn: Turn
    peak_memory_bytes: int
    """Peak resident memory so far, without the inputs, which all processes share."""
    cores_busy_elsewhere: float | None


class ProgramSubject:
    """A directory for open_runtime, or what the null runtime pretends to be, and its inputs."""

    def __init__(
        self, program: Path | ProgramInfo, num_threads: int, inputs_descriptor: int, image_size: int
    ) -> None:
        is_null = isinstance(program, ProgramInfo)
        self._runtime = NullRuntime(program) if is_null else open_runtime(program, num_threads)
        self._images = map_inputs(inputs_descriptor, image_size)

    def warm_up(self, batch_size: int, window_s: float, max_s: float) -> WarmUp:
        """See warm_up_until_stable."""
        return TimedCall(self._call(batch_size)).warm_up(window_s, max_s)

    def turn(self, batch_size: int, seconds: float) -> ProgramTurn:
        """See measure_turn."""
        timed = TimedCall(self._call(batch_size))
        return self._watched(lambda: timed.turn(seconds))

    def planned(self, times_s: list[float], bound_ms: float) -> ProgramTurn:
        """See answer_planned."""
        call = self._call(1)
        gc.disable()
        gc.collect()
        return self._watched(lambda: answer_planned(call, time.perf_counter_ns, times_s, bound_ms))

    def _watched(self, measure: Callable[[], Turn]) -> ProgramTurn:
        before = CpuUse.now()
        turn = measure()
        elsewhere = before.cores_busy_elsewhere()
        return ProgramTurn(turn, max(0, _peak_memory_bytes() - self._images.nbytes), elsewhere)

    def _call(self, batch_size: int) -> Call:
        batches = rotate(self._images, batch_size)

        # Bound as defaults: the harness should add as little to a call as it can.
        def call(infer=self._runtime.infer, batches=batches) -> object:
            return infer(next(batches))

        return call


def _peak_memory_bytes() -> int:
    # Linux lets getrusage's peak live on through exec: it would be that of the process which
    # started this one.
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
