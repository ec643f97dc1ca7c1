"""All that changes while training: network, optimizer, average, position, random numbers."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from efficientnet.model import EfficientNet, build_model
from efficientnet.variants import NetworkOptions, get_variant
from training.config import TrainConfig
from training.optim import WeightAverage, build_optimizer


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
    step: int = 0
    """Optimizer steps taken."""
    totals: EpochTotals = field(default_factory=EpochTotals)
    """Of the epoch under way."""
    elapsed_s: float = 0.0
    """Time in training and evaluation, that of before a resumption included."""

    def to_dict(self) -> dict[str, Any]:
        """Return tensors and plain values, with the random generators'."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "step": self.step,
            "totals": vars(self.totals),
            "elapsed_s": self.elapsed_s,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self._is_on_cuda else None,
        }

    def load_dict(self, state: dict[str, Any]) -> None:
        """Go on from what to_dict returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])
        self.step = state["step"]
        self.totals = EpochTotals(**state["totals"])
        self.elapsed_s = state["elapsed_s"]
        torch.set_rng_state(state["rng"])
        if self._is_on_cuda and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    @property
    def _is_on_cuda(self) -> bool:
        return self.device.type == "cuda"


def new_state(
    config: TrainConfig,
    network: NetworkOptions,
    num_classes: int,
    device: torch.device,
    start: dict[str, Tensor] | None = None,
) -> TrainState:
    """Build network, optimizer and average.

    Args:
        config: the recipe; the seed decides the initial weights.
        network: padding and batch norm.
        num_classes: length of the logits.
        device: where to train.
        start: weights of the same variant, of which all but the classifier's are taken.
    """
    torch.manual_seed(config.seed)
    spec = get_variant(config.variant)
    model = build_model(spec, num_classes, config.stochastic_depth_rate, network)
    if start is not None:
        taken = {k: t for k, t in start.items() if not k.startswith("classifier.")}
        model.load_state_dict(model.state_dict() | taken)
    model = model.to(device).to(memory_format=torch.channels_last)
    return TrainState(
        device,
        model,
        build_optimizer(model, config.optimizer),
        WeightAverage(model, config.optimizer.ema_decay),
    )
