"""Optimizer, learning rate at a step, and the moving average of the weights."""

import math
from typing import Any

import torch
from timm.optim.rmsprop_tf import RMSpropTF
from torch import nn

from training.recipe.config import OptimizerConfig

EXPONENTIAL_DECAY_RATE = 0.97
EXPONENTIAL_DECAY_EPOCHS = 2.4


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build the optimizer with weight decay on convolutions and the classifier only."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    free = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    # Epsilon 0.001 is the released code's (google/automl, efficientnetv2). On a GPU timm updates
    # all tensors together (foreach).
    return RMSpropTF(groups, alpha=0.9, momentum=0.9, eps=1e-3)


def learning_rate_at(
    step: int, config: OptimizerConfig, batch_size: int, steps_per_epoch: int, num_steps: int
) -> float:
    """Return the learning rate of an optimizer step.

    The exponential schedule counts from step 0, so that the rate after warm-up is already decayed,
    as in the released code.
    """
    peak = config.learning_rate * batch_size / 256
    warmup_steps = config.warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if config.schedule == "constant":
        return peak
    if config.schedule == "cosine":
        progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    decays = math.floor(step / (EXPONENTIAL_DECAY_EPOCHS * steps_per_epoch))
    return peak * EXPONENTIAL_DECAY_RATE**decays


class WeightAverage:
    """Exponential moving average of a model's weights and batch norm statistics.

    The decay of update n is min(decay, (1 + n) / (10 + n)), TensorFlow's ramp, so that the initial
    weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self.num_updates = 0
        current = model.state_dict()
        self.tensors = {name: t.detach().clone() for name, t in current.items()}
        # Found once: they are changed in place, and looking for them takes milliseconds.
        floats = [name for name, tensor in current.items() if tensor.is_floating_point()]
        self._averages = [self.tensors[name] for name in floats]
        self._currents = [current[name] for name in floats]
        self._counts = [(self.tensors[n], t) for n, t in current.items() if n not in floats]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model's present weights."""
        self.num_updates += 1
        decay = min(self._decay, (1 + self.num_updates) / (10 + self.num_updates))
        # What torch.optim.swa_utils calls too; one launch for all tensors instead of one each.
        torch._foreach_lerp_(self._averages, self._currents, 1.0 - decay)  # pyright: ignore[reportPrivateImportUsage]
        if self._counts:
            averages, currents = map(list, zip(*self._counts, strict=True))
            torch._foreach_copy_(averages, currents)  # pyright: ignore[reportPrivateImportUsage]

    def state_dict(self) -> dict[str, Any]:
        """Return what load_state_dict takes."""
        return {"num_updates": self.num_updates, "tensors": self.tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.num_updates = state["num_updates"]
        for name, tensor in self.tensors.items():
            tensor.copy_(state["tensors"][name])
