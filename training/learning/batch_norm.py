"""Batch norm over several forward passes of a step, on one process or on many.

torch moves the running statistics at every pass, and DDP keeps rank 0's. Here they move once a step
towards the mean of all of its passes, so that they do not depend on how many passes a process makes
of a step, or how many processes share it.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


class StepStatistics:
    """The running statistics of a model, moved once a step."""

    def __init__(self, model: nn.Module) -> None:
        self._statistics = [
            buffer
            for module in model.modules()
            if isinstance(module, nn.BatchNorm2d)
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]
        self._initial: list[Tensor] = []
        self._sums: list[Tensor] = []

    @torch.no_grad()
    def begin_step(self, num_passes: int) -> None:
        """Keep what all passes of the step start from."""
        if num_passes > 1:
            self._initial = [tensor.clone() for tensor in self._statistics]
            self._sums = [torch.zeros_like(tensor) for tensor in self._statistics]

    @torch.no_grad()
    def end_pass(self, num_passes: int) -> None:
        """Add a pass's statistics up, and go back to those of the step's start."""
        if num_passes > 1:
            torch._foreach_add_(self._sums, self._statistics)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_copy_(self._statistics, self._initial)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def end_step(self, num_passes: int, also: Sequence[Tensor]) -> list[Tensor]:
        """Take the mean over this process's passes, and over the processes.

        `also` are scalars whose means over the processes travel in the same message, and come back.
        """
        if num_passes > 1:
            torch._foreach_div_(self._sums, num_passes)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_copy_(self._statistics, self._sums)  # pyright: ignore[reportPrivateImportUsage]
        if not dist.is_initialized():
            return list(also)
        parts = [*self._statistics, *(scalar.float().reshape(1) for scalar in also)]
        flat = torch.cat(parts)
        dist.all_reduce(flat)
        means = (flat / dist.get_world_size()).split([part.numel() for part in parts])
        torch._foreach_copy_(self._statistics, list(means[: len(self._statistics)]))  # pyright: ignore[reportPrivateImportUsage]
        return [mean.reshape(()) for mean in means[len(self._statistics) :]]
