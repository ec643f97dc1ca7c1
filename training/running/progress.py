"""Steps of a run -> a progress bar, and Ctrl-C -> a stop after a step."""

import signal
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from types import FrameType

from tqdm import tqdm

from training.batches.sampler import StepPlan
from training.learning.distributed import Ranks
from training.recipe.stages import Stage


@dataclass
class StopFlag:
    """Whether this process was asked to stop."""

    is_set: bool = False


@contextmanager
def stop_flag() -> Generator[StopFlag]:
    """Let the first Ctrl-C or SIGTERM only set the flag; a second Ctrl-C gives up.

    SIGTERM is what Slurm and Kubernetes send before they take a machine away, and torchrun sends it
    on: it may come twice.
    """
    flag = StopFlag()

    def handle(number: int, _frame: FrameType | None) -> None:
        if flag.is_set and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not flag.is_set:
            print("\nstopping within a few steps; Ctrl-C gives up at once", file=sys.stderr)
        flag.is_set = True

    previous = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class StepReport:
    """What is shown after a step."""

    step: int
    """Steps taken."""
    stage: Stage
    loss: float | None
    """Of the last step that was read; None before the first is."""
    learning_rate: float
    images_per_s: float


class ProgressBar:
    """Shows stage, image size, loss, top-1, images/s and the time left, on a terminal only.

    The time left counts pixels, not steps: a step of the last stage takes several of the first.
    """

    def __init__(
        self, stages: Sequence[Stage], plan: StepPlan, first_step: int, ranks: Ranks
    ) -> None:
        self._stages = stages
        self._plan = plan
        self._pixels_left = self._pixels_after(first_step)
        self._pixels_done, self._started = 0, perf_counter()
        self._step = first_step
        self.top1: float | None = None
        self._bar = tqdm(
            total=plan.num_steps,
            initial=first_step,
            disable=None if ranks.is_main else True,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f} % |{bar}| {desc}",
        )

    def update(self, report: StepReport) -> None:
        """Show one step more."""
        pixels = self._pixels(report.step - 1)
        self._pixels_done += pixels
        if report.step == self._step + 1:
            self._pixels_left -= pixels
        else:  # Training was taken back to an earlier step.
            self._pixels_left = self._pixels_after(report.step)
        self._step = report.step
        left_s = (perf_counter() - self._started) / self._pixels_done * self._pixels_left
        loss = "-" if report.loss is None else f"{report.loss:.3f}"
        top1 = "-" if self.top1 is None else f"{100 * self.top1:.1f} %"
        self._bar.set_description_str(
            f"stage {report.stage.index + 1}/{len(self._stages)}  {report.stage.image_size} px  "
            f"loss {loss}  top-1 {top1}  {report.images_per_s:.0f} images/s  "
            f"{format_seconds(left_s)} left",
            refresh=False,
        )
        self._bar.update(report.step - self._bar.n)

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """Leave the terminal clean."""
        self._bar.close()

    def _pixels_after(self, step: int) -> int:
        return sum(self._pixels(later) for later in range(step, self._plan.num_steps))

    def _pixels(self, step: int) -> int:
        return self._stages[self._plan.stage_of(step)].image_size ** 2


def format_seconds(seconds: float) -> str:
    """Write a duration as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
