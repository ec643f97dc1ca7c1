"""All that changes while training: network, optimizer, average, position, random numbers."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from efficientnet.formats.checkpoint import first_not_finite
from efficientnet.network.model import EfficientNet, SqueezeExcite, build_model
from efficientnet.network.variants import NetworkOptions
from training.learning.memory import keep_freed_memory
from training.learning.optim import WeightAverage, build_optimizer
from training.recipe.config import TrainConfig


@dataclass
class StageTotals:
    """What a stage has taken so far."""

    num_images: int = 0
    seconds: float = 0.0
    """In training, evaluation excluded."""
    peak_memory_bytes: int = 0
    """Of the device, or of the process where there is no GPU, within the stage; 0: cannot be told
    apart from what came before."""


@dataclass
class EpochTotals:
    """What an epoch has added up so far; saved with the state, so that a resumed epoch is whole."""

    loss_sum: float = 0.0
    num_steps: int = 0
    num_images: int = 0
    seconds: float = 0.0


@dataclass
class TrainState:
    """All that changes while training."""

    device: torch.device
    model: EfficientNet
    optimizer: torch.optim.Optimizer
    average: WeightAverage
    scaler: GradScaler
    """Of the loss; does nothing but in fp16."""
    step: int = 0
    """Optimizer steps taken."""
    attempt: int = 0
    """Times that training was taken back after a loss that was not finite."""
    micro_batch_sizes: tuple[int, ...] = ()
    """Images per forward pass at each stage; they decide what batch norm sees."""
    world_size: int = 1
    """Processes that the micro-batches were planned for."""
    totals: EpochTotals = field(default_factory=EpochTotals)
    """Of the epoch under way."""
    stages: dict[int, StageTotals] = field(default_factory=dict)
    """By index."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """metrics.jsonl so far."""
    best: dict[str, float] | None = None
    """Step and top-1 of the best checkpoint."""
    elapsed_s: float = 0.0
    """Time in training and evaluation, that of before a resumption included."""

    def to_dict(self) -> dict[str, Any]:
        """Return copies on the CPU, which training does not change any more.

        There are no random generators among them: those of a forward pass are seeded by its place
        in the training.
        """
        return _on_cpu(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average.state_dict(),
                "scaler": self.scaler.state_dict(),
                "step": self.step,
                "attempt": self.attempt,
                "micro_batch_sizes": list(self.micro_batch_sizes),
                "world_size": self.world_size,
                "totals": dict(vars(self.totals)),
                "stages": {index: dict(vars(totals)) for index, totals in self.stages.items()},
                "history": list(self.history),
                "best": self.best,
                "elapsed_s": self.elapsed_s,
            }
        )

    def load_dict(self, state: dict[str, Any]) -> None:
        """Go on from what to_dict returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.attempt = state["attempt"]
        self.micro_batch_sizes = tuple(state["micro_batch_sizes"])
        self.world_size = state["world_size"]
        self.totals = EpochTotals(**state["totals"])
        self.stages = {index: StageTotals(**totals) for index, totals in state["stages"].items()}
        self.history = list(state["history"])
        self.best = state["best"]
        self.elapsed_s = state["elapsed_s"]

    def first_not_finite(self) -> str | None:
        """Return the first weight or running statistic, averaged or not, with NaN or infinity."""
        return first_not_finite(self.model.state_dict()) or first_not_finite(self.average.tensors)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_cpu(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_on_cpu(part) for part in value]
    return value


def new_state(
    config: TrainConfig,
    network: NetworkOptions,
    num_classes: int,
    device: torch.device,
    start: dict[str, Tensor] | None = None,
) -> TrainState:
    """Build network, optimizer and average.

    The seed decides the weights, or `start`, of which all but the classifier's are taken.
    """
    if device.type == "cpu":
        keep_freed_memory()
        # Before the first operation, whose threads inherit it. A diverging network has many: V2-S
        # on noise takes 1.4 times as long with them.
        torch.set_flush_denormal(True)
    torch.manual_seed(config.seed)
    model = build_model(config.spec, num_classes, config.stochastic_depth_rate, network)
    if start is not None:
        taken = {k: t for k, t in start.items() if not k.startswith("classifier.")}
        model.load_state_dict(model.state_dict() | taken)
    model = model.to(device).to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, SqueezeExcite):
            for conv in (module.fc1, module.fc2):
                # Used as matrices, so their gradients come with a matrix's strides, which DDP wants
                # the weights to have too.
                conv.weight.data = conv.weight.data.flatten(1)[:, :, None, None]
    return TrainState(
        device,
        model,
        build_optimizer(model, config.optimizer),
        WeightAverage(model, config.optimizer.ema_decay),
        GradScaler(device.type, enabled=config.precision == "fp16"),
    )
