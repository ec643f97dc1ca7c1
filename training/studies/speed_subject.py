"""A case, inside the process that measures it -> a training step, its warm-up and its turns.

On a GPU nothing waits for the device between the first and the last step that count.
"""

from dataclasses import dataclass
from time import perf_counter

import torch

from training.learning.memory import device_memory_bytes, peak_memory_bytes, reset_peak_memory
from training.studies.speed_contenders import Step, loaded_batches, our_step, timm_step
from training.studies.speed_plan import OURS, StepCase

MIN_WARM_UP_STEPS, MAX_WARM_UP_STEPS = 2, 20

# A moment: of the clock, or of a GPU when it comes to it.
Mark = float | torch.cuda.Event


@dataclass(frozen=True)
class Device:
    """Where a process computes."""

    type: str
    name: str
    memory_bytes: int


@dataclass(frozen=True)
class StepWarmUp:
    """What came before the steps that count."""

    num_steps: int
    compile_s: float | None


@dataclass(frozen=True)
class StepTurn:
    """Steps that count."""

    samples_ms: tuple[float, ...]
    elapsed_s: float
    peak_memory_bytes: int
    """Since the warm-up."""


@dataclass
class Measured:
    """What the process of a case answered so far."""

    case: StepCase
    device: Device
    warm_up: StepWarmUp | None = None
    turns: tuple[StepTurn, ...] = ()
    is_out_of_memory: bool = False


class StepSubject:
    """Takes and times steps of a case; nothing is built before the warm-up."""

    def __init__(self, case: StepCase) -> None:
        torch.set_num_threads(case.num_threads)
        # As in training; of timm's steps, too. Random pixels may make them.
        torch.set_flush_denormal(True)
        self._case = case
        self._is_cuda = torch.cuda.is_available()
        self._device = torch.device("cuda" if self._is_cuda else "cpu")
        self._step: Step = lambda: None

    def device(self) -> Device:
        """Say what it will compute on."""
        name = torch.cuda.get_device_name(self._device) if self._is_cuda else ""
        return Device(self._device.type, name, device_memory_bytes(self._device))

    def warm_up(self, max_s: float) -> StepWarmUp | None:
        """Build the network and take steps that do not count; None: the device does not hold it.

        They take at most `max_s` seconds, if those that must be are taken by then.
        """
        case = self._case
        # What the loader's workers have ready would make the first steps look too fast.
        min_steps = MIN_WARM_UP_STEPS + (2 * case.num_workers + 2 if case.data else 0)
        try:
            self._step = self._built()
            end = perf_counter() + max_s
            first_s, num_steps = self._one_step_s(), 1
            while num_steps + 1 < min_steps or (
                num_steps + 1 < MAX_WARM_UP_STEPS and perf_counter() < end
            ):
                self._step()
                num_steps += 1
            last_s = self._one_step_s()
        except torch.OutOfMemoryError:
            return None
        reset_peak_memory(self._device)
        compile_s = max(0.0, first_s - last_s) if case.is_compiled else None
        return StepWarmUp(num_steps + 1, compile_s)

    def _built(self) -> Step:
        case, device = self._case, self._device
        if case.contender != OURS:
            return timm_step(case, device)
        batches = loaded_batches(case, device) if case.data else None
        return our_step(case.train_config(), case.num_classes, device, batches)

    def turn(self, seconds: float, num_settling_steps: int) -> StepTurn | None:
        """Take uncounted steps to settle, then steps for some seconds, at least one.

        The last step may end later. None: the device does not hold it.
        """
        try:
            return self._turn(seconds, num_settling_steps)
        except torch.OutOfMemoryError:
            return None

    def _turn(self, seconds: float, num_settling_steps: int) -> StepTurn:
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
        samples_ms = tuple(_between_ms(marks[i], marks[i + 1]) for i in range(len(marks) - 1))
        if self._is_cuda and num_settling_steps:
            # Others have the device next; what is free there is theirs.
            torch.cuda.empty_cache()
        return StepTurn(samples_ms, elapsed_s, peak_memory_bytes(self._device))

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
