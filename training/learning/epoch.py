"""Batches and a plan of the steps -> trained weights, epoch by epoch; and evaluation."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from efficientnet.errors import PipelineError
from efficientnet.formats.class_accuracy import ClassAccuracy
from efficientnet.network.model import EfficientNet
from training.batches.loader import Batch
from training.batches.sampler import StepPlan
from training.learning.distributed import all_reduce_sum
from training.learning.memory import give_back_freed_memory, peak_memory_bytes, reset_peak_memory
from training.learning.optim import learning_rate_at
from training.learning.state import StageTotals, TrainState
from training.learning.step import TrainStep
from training.recipe.stages import Stage

# Reading the loss makes a GPU's queue run dry; every tenth pass is enough for the bar, for NaN and
# to see that the training is asked to stop.
PASSES_BETWEEN_READINGS = {"cpu": 1, "cuda": 10}

# A larger matrix says nothing to the eye.
MAX_CONFUSION_CLASSES = 100


class TrainingError(PipelineError):
    """Training that cannot go on."""


class LossError(TrainingError):
    """A loss, weights or running statistics that are not finite."""


@dataclass(frozen=True)
class Evaluation:
    """Result on the held-out images."""

    loss: float
    top1: float
    top5: float
    num_images: int
    classes: ClassAccuracy
    confusion: tuple[tuple[int, ...], ...] | None = None
    """Images by true class (row) and predicted class; None with too many classes."""


@dataclass(frozen=True)
class StepReport:
    """What a progress bar shows after a step."""

    step: int
    """Steps taken."""
    stage: Stage
    loss: float | None
    """Of the last step that was read; None before the first is."""
    learning_rate: float
    images_per_s: float


def train_epoch(
    state: TrainState,
    step: TrainStep,
    plan: StepPlan,
    stages: tuple[Stage, ...],
    batches: Iterator[Batch],
    is_asked_to_stop: Callable[[], bool],
    on_step: Callable[[StepReport], None],
    max_steps: int | None = None,
) -> bool:
    """Train to the end of the epoch under way, or for `max_steps`.

    Args:
        state: is changed in place.
        step: takes a step.
        plan: of the steps.
        stages: of progressive learning.
        batches: forward passes, several to a step when gradients are accumulated.
        is_asked_to_stop: whether this process was told to stop; all stop after the same step.
        on_step: is told of each step.
        max_steps: after which to come back within the epoch; None = at its end.

    Returns:
        Whether training was stopped.

    Raises:
        LossError: the loss, or at the end a weight or a running statistic, is not finite.
    """
    config, totals, device = plan.config, state.totals, state.device
    state.model.train()
    # Continued in the same precision, so that a resumed epoch adds up to the very same sum.
    loss_sum = torch.tensor(totals.loss_sum, dtype=torch.float64, device=device)
    unread: list[Tensor] = []
    started, first_step, begun, is_memory_counted = perf_counter(), state.step, -1, False
    loss: float | None = None
    stage_began = started
    seconds_before, images_before = totals.seconds, totals.num_images
    stopped = False
    while True:
        stage = stages[plan.stage_of(state.step)]
        if stage.index != begun:
            step.begin_stage(stage, plan.micro_batch_sizes[stage.index])
            stage_totals = state.stages.setdefault(stage.index, StageTotals())
            # All of its steps take the same: to start a count anew in each epoch would cost time.
            is_memory_counted = not stage_totals.num_images
            if is_memory_counted:
                give_back_freed_memory(device)
                is_memory_counted = reset_peak_memory(device)
            begun, stage_began = stage.index, perf_counter()
        rate = learning_rate_at(
            state.step, config.optimizer, config.batch_size, plan.steps_per_epoch, plan.num_steps
        )
        # Filled where it is needed: to copy it there would wait for the device.
        stop = torch.full((), float(is_asked_to_stop()), device=device)
        num_passes = plan.gradient_accumulation_steps(state.step)
        step_loss, stops = step(batches, num_passes, rate, stop)
        loss_sum += step_loss
        unread.append(step_loss)
        totals.num_steps += 1
        totals.num_images += config.batch_size
        state.stages[stage.index].num_images += config.batch_size

        has_ended = plan.ends_epoch(state.step)
        is_last = has_ended or (max_steps is not None and state.step - first_step >= max_steps)
        ends_stage = has_ended or plan.stage_of(state.step) != stage.index
        every = max(1, PASSES_BETWEEN_READINGS[device.type] // num_passes)
        if is_last or ends_stage or state.step % every == 0:
            loss = require_finite(unread, state.step, plan, stage, len(stages))
            stopped = stops.item() > 0
            unread = []
        now = perf_counter()
        totals.seconds = seconds_before + now - started
        rate_per_s = (totals.num_images - images_before) / (now - started)
        on_step(StepReport(state.step, stage, loss, rate, rate_per_s))
        is_last = is_last or stopped
        if is_last or ends_stage:
            stage_totals = state.stages[stage.index]
            stage_totals.seconds += perf_counter() - stage_began
            if is_memory_counted:
                stage_totals.peak_memory_bytes = peak_memory_bytes(device)
            begun = -1
        if is_last:
            break
    totals.loss_sum = loss_sum.item()
    state.elapsed_s += perf_counter() - started
    broken = state.first_not_finite()
    if broken is not None:
        raise LossError(f"{broken} is not finite after step {state.step} of {plan.num_steps}")
    return stopped


def require_finite(
    losses: list[Tensor], last_step: int, plan: StepPlan, stage: Stage, num_stages: int
) -> float:
    """Return the last of some losses; waits for the device.

    Raises:
        LossError: one of them is not finite.
    """
    values = torch.stack(losses).tolist()
    for offset, value in enumerate(values):
        if not math.isfinite(value):
            raise LossError(
                f"the loss is {value} at step {last_step - len(values) + 1 + offset} of "
                f"{plan.num_steps} (stage {stage.index + 1} of {num_stages}, "
                f"{stage.image_size} px)"
            )
    return values[-1]


@torch.no_grad()
def evaluate(
    model: EfficientNet, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> Evaluation:
    """Measure loss and accuracy of a model in evaluation mode, float32.

    Each process gives its part of the images; the result is that of all of them.
    """
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    count = 0
    num_classes = model.num_classes
    class_counts = torch.zeros(2, num_classes, dtype=torch.int64, device=device)  # images, hits
    num_cells = num_classes**2 if num_classes <= MAX_CONFUSION_CLASSES else 0
    confusion = torch.zeros(num_cells, dtype=torch.int64, device=device)
    for images, labels in batches:
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        logits = model(images)
        loss = cross_entropy(logits, labels, reduction="sum")
        best = logits.topk(min(5, num_classes), dim=1).indices  # [N, 5]
        hits = best == labels[:, None]
        sums += torch.stack([loss.double(), hits[:, 0].sum(), hits.any(dim=1).sum()])
        count += len(labels)
        ones = torch.ones_like(labels)
        class_counts[0].index_add_(0, labels, ones)
        class_counts[1].index_add_(0, labels, hits[:, 0].long())
        if num_classes <= MAX_CONFUSION_CLASSES:
            confusion.index_add_(0, labels * num_classes + best[:, 0], ones)
    loss_sum, num_top1, num_top5, num_images = all_reduce_sum([*sums.tolist(), count])
    class_sums = [int(number) for number in all_reduce_sum(class_counts.flatten().tolist())]
    matrix = None
    if num_classes <= MAX_CONFUSION_CLASSES:
        counts = iter(all_reduce_sum(confusion.tolist()))
        matrix = tuple(
            tuple(int(next(counts)) for _ in range(num_classes)) for _ in range(num_classes)
        )
    return Evaluation(
        loss_sum / num_images,
        num_top1 / num_images,
        num_top5 / num_images,
        int(num_images),
        ClassAccuracy(tuple(class_sums[:num_classes]), tuple(class_sums[num_classes:])),
        matrix,
    )
