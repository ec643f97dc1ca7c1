"""A training step, seconds -> how long the steps took that were taken in this time.

On a GPU nothing waits for the device between the first and the last step that count.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch

from training.learning.memory import peak_memory_bytes, reset_peak_memory

MAX_WARM_UP_STEPS = 20

Step = Callable[[], object]

# A moment: of the clock, or of a GPU when it comes to it.
Mark = float | torch.cuda.Event


@dataclass(frozen=True)
class WarmUp:
    """What came before the steps that count."""

    num_steps: int
    compile_s: float | None


@dataclass(frozen=True)
class Turn:
    """Steps that count."""

    step_ms: tuple[float, ...]
    elapsed_s: float
    peak_memory_bytes: int
    """Since the warm-up."""


class Stopwatch:
    """Takes and times steps on a device."""

    def __init__(self, step: Step, device: torch.device) -> None:
        self._step = step
        self._device = device
        self._is_cuda = device.type == "cuda"

    def warm_up(self, max_s: float, min_steps: int, is_compiled: bool) -> WarmUp:
        """Take steps for at most `max_s` seconds if `min_steps` are taken by then."""
        end = perf_counter() + max_s
        first_s, num_steps = self._one_step_s(), 1
        while num_steps + 1 < min_steps or (
            num_steps + 1 < MAX_WARM_UP_STEPS and perf_counter() < end
        ):
            self._step()
            num_steps += 1
        last_s = self._one_step_s()
        reset_peak_memory(self._device)
        return WarmUp(num_steps + 1, max(0.0, first_s - last_s) if is_compiled else None)

    def turn(self, seconds: float, num_settling_steps: int) -> Turn:
        """Take steps that count for some seconds, at least one."""
        for _ in range(num_settling_steps):
            self._step()
        self._synchronize()
        started = perf_counter()
        marks = [self._mark()]
        while len(marks) == 1 or perf_counter() - started < seconds:
            self._step()
            marks.append(self._mark())
        self._synchronize()
        elapsed_s = perf_counter() - started
        step_ms = tuple(_between_ms(marks[i], marks[i + 1]) for i in range(len(marks) - 1))
        if self._is_cuda and num_settling_steps:
            # Others have the device next; what is free there is theirs.
            torch.cuda.empty_cache()
        return Turn(step_ms, elapsed_s, peak_memory_bytes(self._device))

    def _one_step_s(self) -> float:
        self._synchronize()
        started = perf_counter()
        self._step()
        self._synchronize()
        return perf_counter() - started

    def _synchronize(self) -> None:
        if self._is_cuda:
            torch.cuda.synchronize(self._device)

    def _mark(self) -> Mark:
        if not self._is_cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between_ms(before: Mark, after: Mark) -> float:
    if isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event):
        return before.elapsed_time(after)
    assert isinstance(before, float) and isinstance(after, float)
    return 1e3 * (after - before)
