"""Model, batches and stages -> trained weights: the steps of an epoch, and evaluation."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from efficientnet.errors import PipelineError
from efficientnet.model import EfficientNet
from training.augment import mix
from training.config import TrainConfig
from training.optim import learning_rate_at
from training.progressive import Stage, stage_index
from training.state import TrainState

# Reading the loss makes a GPU's queue run dry; every tenth step is enough for the bar and for NaN.
STEPS_BETWEEN_READINGS = {"cpu": 1, "cuda": 10}


class TrainingError(PipelineError):
    """Training that cannot go on."""


@dataclass(frozen=True)
class Evaluation:
    """Result on the held-out images."""

    loss: float
    top1: float
    top5: float
    num_images: int


@dataclass(frozen=True)
class StepReport:
    """What a progress bar shows after a step."""

    stage: Stage
    loss: float
    images_per_s: float


def train_one_epoch(
    state: TrainState,
    batches: Iterator[tuple[Tensor, Tensor]],
    config: TrainConfig,
    stages: tuple[Stage, ...],
    num_classes: int,
    steps_per_epoch: int,
    on_step: Callable[[StepReport], bool],
) -> bool:
    """Train from the present step to the end of its epoch.

    Args:
        state: is changed in place.
        batches: forward passes, several to a step when gradients are accumulated.
        config: the recipe.
        stages: of progressive learning.
        num_classes: length of the logits.
        steps_per_epoch: optimizer steps.
        on_step: is told of each step and answers whether to go on.

    Returns:
        Whether the epoch was finished; False when `on_step` asked to stop.

    Raises:
        TrainingError: the loss is not finite.
    """
    model, totals, device = state.model.train(), state.totals, state.device
    num_steps = steps_per_epoch * config.epochs
    passes_per_step = config.batch_size // (config.micro_batch_size or config.batch_size)
    # Continued in the same precision, so that a resumed epoch adds up to the very same sum.
    loss_sum = torch.tensor(totals.loss_sum, dtype=torch.float64, device=device)
    started, loss = perf_counter(), math.nan
    while True:
        stage = stages[stage_index(state.step, num_steps, len(stages))]
        rate = learning_rate_at(
            state.step, config.optimizer, config.batch_size, steps_per_epoch, num_steps
        )
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        set_dropout_rate(model, stage.dropout_rate)

        step_loss = torch.zeros((), device=device)
        for _ in range(passes_per_step):
            images, labels = next(batches)
            images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            images, labels = mix(images, labels, stage.mixup_alpha, num_classes)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                logits = model(images)
            pass_loss = cross_entropy(
                logits.float(), labels, label_smoothing=config.label_smoothing
            )
            (pass_loss / passes_per_step).backward()
            step_loss += pass_loss.detach() / passes_per_step
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.average.update(model)

        loss_sum += step_loss
        state.step += 1
        totals.num_steps += 1
        totals.num_images += config.batch_size
        is_last = state.step % steps_per_epoch == 0
        if is_last or totals.num_steps % STEPS_BETWEEN_READINGS[device.type] == 0:
            loss = step_loss.item()
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} at step {state.step} of {num_steps} "
                    f"(stage {stage.index + 1} of {len(stages)}, {stage.image_size} px); "
                    "lower --optimizer.learning-rate, or give it a longer warm-up"
                )
        seconds = totals.seconds + perf_counter() - started
        wants_more = on_step(StepReport(stage, loss, totals.num_images / seconds))
        if is_last or not wants_more:
            break
    totals.loss_sum = loss_sum.item()
    elapsed = perf_counter() - started
    totals.seconds += elapsed
    state.elapsed_s += elapsed
    return is_last


def set_dropout_rate(model: nn.Module, rate: float) -> None:
    """Set the rate of the classifier's dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate


@torch.no_grad()
def evaluate(
    model: EfficientNet, batches: Iterator[tuple[Tensor, Tensor]], device: torch.device
) -> Evaluation:
    """Measure loss and accuracy of a model in evaluation mode, float32."""
    model.eval()
    loss_sum, num_top1, num_top5, num_images = 0.0, 0, 0, 0
    for images, labels in batches:
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        logits = model(images)
        loss_sum += cross_entropy(logits, labels, reduction="sum").item()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [N, 5]
        hits = best == labels[:, None]
        num_top1 += int(hits[:, 0].sum())
        num_top5 += int(hits.any(dim=1).sum())
        num_images += len(labels)
    return Evaluation(
        loss_sum / num_images, num_top1 / num_images, num_top5 / num_images, num_images
    )
