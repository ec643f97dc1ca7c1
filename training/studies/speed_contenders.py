"""Network, image size, batch -> our training step or timm's, ready to be called."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import repeat
from typing import Any

import timm
import torch
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy
from timm.optim._optim_factory import create_optimizer_v2
from timm.utils.cuda import NativeScaler
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor

from efficientnet.images.datasets import load_dataset
from efficientnet.network.architectures import peer_of
from training.batches.loader import Batch, train_batches
from training.batches.prefetch import on_device
from training.batches.sampler import StepPlan, StepSampler
from training.learning.distributed import Ranks
from training.learning.state import new_state
from training.learning.step import AUTOCAST_TYPES, TrainStep
from training.recipe.config import TrainConfig
from training.recipe.stages import plan_stages
from training.studies.speed_plan import StepCase

# The time of a step does not depend on it, but a loss that is not a number does: fp16 then leaves
# the update out.
LEARNING_RATE = 1e-6

Step = Callable[[], object]


def our_step(
    config: TrainConfig,
    num_classes: int,
    device: torch.device,
    batches: Iterator[Batch] | None = None,
) -> Step:
    """Build the step that training takes at the recipe's last stage, the batch in one pass.

    It is fed with `batches`, or with the same random pixels again and again.
    """
    state = new_state(config, config.network_options(None), num_classes, device)
    state.model.train()
    step = TrainStep(state, config, Ranks(0, 1, device), num_classes, config.preprocess_spec(None))
    stage = plan_stages(config.progressive, config.seed)[-1]
    step.begin_stage(stage, config.batch_size)
    source = batches or repeat(
        random_batch(config.batch_size, stage.image_size, num_classes, device)
    )
    stop = torch.zeros((), device=device)
    return lambda: step(source, 1, LEARNING_RATE, stop)


def timm_step(case: StepCase, device: torch.device) -> Step:
    """Build the step of timm's train.py, of the parts that it imports from timm.

    Batches come as its loader delivers them, uint8 [N, 3, H, W], and are normalized on the device
    as its PrefetchLoader does. The loss is not read, which it does when it logs.
    """
    config = case.train_config()
    (stage,) = plan_stages(config.progressive)
    torch.manual_seed(config.seed)
    model: Any = timm.create_model(
        peer_of(case.variant, "timm", case.padding),
        num_classes=case.num_classes,
        drop_rate=stage.dropout_rate,
        drop_path_rate=config.stochastic_depth_rate,
    )
    model = model.to(device).to(memory_format=torch.channels_last).train()
    optimizer = create_optimizer_v2(
        model,
        opt="rmsproptf",
        lr=LEARNING_RATE,
        weight_decay=config.optimizer.weight_decay,
        momentum=0.9,
        eps=1e-3,
    )
    loss_of = LabelSmoothingCrossEntropy(config.label_smoothing)
    average = ModelEmaV3(model, decay=config.optimizer.ema_decay, use_warmup=True)
    scaler = NativeScaler(device.type) if case.precision == "fp16" else None
    if device.type == "cuda":  # as at the start of its train.py
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    network: Any = torch.compile(model) if case.is_compiled else model
    spec = config.preprocess_spec(None)
    mean, std = (
        torch.tensor([255 * value for value in values], device=device).view(1, 3, 1, 1)
        for values in (spec.mean, spec.std)
    )
    batch = random_batch(case.micro_batch_size, case.image_size, case.num_classes, device)
    pixels, labels = batch.images.contiguous(), batch.labels
    autocast_type = AUTOCAST_TYPES[case.precision]
    num_updates = 0

    def step() -> Tensor:
        nonlocal num_updates
        images = pixels.to(torch.float32).sub_(mean).div_(std)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, autocast_type) if autocast_type else nullcontext():
            loss = loss_of(network(images), labels)
        if scaler:
            scaler(loss, optimizer)
        else:
            loss.backward()
            optimizer.step()
        num_updates += 1
        optimizer.zero_grad()
        average.update(model, step=num_updates)
        return loss.detach()

    return step


def random_batch(count: int, size: int, num_classes: int, device: torch.device) -> Batch:
    """Return random pixels and labels, in memory as the loader's batches: [N, H, W, 3]."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(num_classes, (count,), generator=generator)
    return Batch(pixels.permute(0, 3, 1, 2).to(device), labels.to(device), torch.arange(count))


def loaded_batches(case: StepCase, device: torch.device) -> Iterator[Batch]:
    """Return the batches of the loader, as in training."""
    assert case.data is not None
    config = case.train_config()
    samples = load_dataset(case.data).train
    plan = StepPlan(len(samples), config, (case.micro_batch_size,))
    stages = plan_stages(config.progressive)
    loader = train_batches(samples, config, stages, StepSampler(plan), case.num_workers)
    return iter(on_device(loader, device))
