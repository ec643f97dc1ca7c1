"""Variant, image size and device -> the most images that one forward and backward pass can hold."""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from efficientnet.errors import PipelineError
from efficientnet.machine.cgroup import memory_limit_bytes
from efficientnet.network.cost import layer_costs
from efficientnet.network.model import EfficientNet, build_model
from efficientnet.network.variants import NetworkOptions
from training.recipe.config import TrainConfig
from training.recipe.stages import Stage

# Of the memory that is there; the rest is for cuDNN's workspaces, for holes between allocations,
# and on a CPU for the worker processes.
USABLE_SHARE = 0.85

# Weights, gradients, average, the optimizer's two moments, and the network that is evaluated,
# float32.
COPIES_OF_WEIGHTS = 6

# Of malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4

# Batch norm needs more than one value per channel where the last map is a single pixel.
MIN_MICRO_BATCH = 2


class BatchTooLargeError(PipelineError):
    """A batch that the device cannot hold."""


def device_memory_bytes(device: torch.device) -> int:
    """Return what the device has: a GPU's memory, or the machine's within its container's limit."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(total, memory_limit_bytes() or total)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most that was in use: on a GPU since reset_peak_memory, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def reset_peak_memory(device: torch.device) -> bool:
    """Start a new count of the peak, with what is in use; tell whether that can be done."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False  # Not allowed in some containers; the peak stays that of the whole process.
    return True


def give_back_freed_memory(device: torch.device) -> None:
    """Let the system have what the C library kept, or it would count as in use for ever."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if device.type == "cpu" and trim is not None:
        trim(0)


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, for the next step; on a CPU, before the first tensor.

    glibc gives large blocks back to the system after each step and faults them in again in the
    next: 55,000 page faults and 130 to 200 ms of system time in a step of V2-S (64 px, 32 images)
    became none, at the same peak. Another C library is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_MMAP_MAX, 0)


class MemoryModel:
    """Predicts the memory of a training pass from the tensors that autograd keeps for it.

    They are counted on the `meta` device, which computes nothing: the count is exact and takes
    less than a second, whatever the size.
    """

    def __init__(self, config: TrainConfig, network: NetworkOptions, num_classes: int) -> None:
        with torch.device("meta"):
            model = build_model(config.spec, num_classes, config.stochastic_depth_rate, network)
        self._weight_bytes = sum(4 * p.numel() for p in model.parameters())
        half = config.precision != "fp32"
        self._model: EfficientNet = model.to(torch.bfloat16 if half else torch.float32).train()
        self._type = torch.bfloat16 if half else torch.float32
        self._per_image: dict[int, int] = {}

    def bytes_for(self, image_size: int, micro_batch_size: int) -> int:
        """Return the bytes that a step with such passes takes at its peak."""
        return COPIES_OF_WEIGHTS * self._weight_bytes + micro_batch_size * self._image_bytes(
            image_size
        )

    def largest(self, image_size: int, share: int, limit_bytes: float) -> int | None:
        """Return the largest divisor of a process's share of the batch that fits; None: none."""
        for size in _divisors(share):
            if self.bytes_for(image_size, size) <= limit_bytes:
                return size
        return None

    def _image_bytes(self, image_size: int) -> int:
        if image_size not in self._per_image:
            self._per_image[image_size] = (
                saved_bytes(self._model, image_size, 4, self._type)
                - saved_bytes(self._model, image_size, 2, self._type)
            ) // 2
        return self._per_image[image_size]


def saved_bytes(model: nn.Module, image_size: int, num_images: int, dtype: torch.dtype) -> int:
    """Count the bytes that autograd keeps between forward and backward, weights left out."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            sizes[storage._cdata] = storage.nbytes()
            kept.append(tensor)  # or its address would be given to the next one
        return tensor

    images = torch.empty(num_images, 3, image_size, image_size, device="meta", dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _LightBatchNorm():
        model(images)
    return sum(sizes.values())


class _LightBatchNorm(TorchFunctionMode):
    """Batch norm on `meta` without torch's own, which loads the compiler first, for two seconds."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is functional.batch_norm:
            return _KeptByBatchNorm.apply(args[0])
        return func(*args, **(kwargs or {}))


class _KeptByBatchNorm(torch.autograd.Function):
    """The map, and the mean and deviation of each of its channels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        mean, deviation = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
        ctx.save_for_backward(x, mean, deviation)
        return torch.empty_like(x)


def plan_micro_batches(
    config: TrainConfig,
    network: NetworkOptions,
    num_classes: int,
    stages: Sequence[Stage],
    world_size: int,
    limit_bytes: float,
) -> tuple[int, ...]:
    """Choose how many images a forward pass of each stage takes.

    fixed: config's micro_batch_size, or a process's whole share of the batch. memory: at each stage
    the largest divisor of the share that fits; the batch, and so the learning rate, stays.
    BatchTooLargeError names the first stage that cannot hold it; the largest is looked at first.
    """
    model = MemoryModel(config, network, num_classes)
    share = config.batch_size // world_size
    sizes: dict[int, int] = {}
    for stage in sorted(stages, key=lambda s: s.image_size, reverse=True):
        where = f"stage {stage.index + 1} ({stage.image_size} px)"
        largest = model.largest(stage.image_size, share, limit_bytes)
        if largest is None:
            smallest = _divisors(share)[-1]
            needed = model.bytes_for(stage.image_size, smallest)
            raise BatchTooLargeError(
                f"{where} does not fit: a pass of {smallest} images, the smallest that divides a "
                f"process's share of {share}, needs about {needed / 1e9:.1f} GB, "
                f"{limit_bytes / 1e9:.1f} GB can be used; give a --batch-size with smaller "
                "divisors, a smaller --progressive.image-size, a smaller variant, or "
                "--precision bf16"
            )
        if config.batch_plan == "memory":
            sizes[stage.index] = largest
            continue
        asked = config.micro_batch_size or share
        needed = model.bytes_for(stage.image_size, asked)
        if needed > limit_bytes:
            raise BatchTooLargeError(
                f"{where} does not fit: a pass of {asked} images needs about "
                f"{needed / 1e9:.1f} GB, "
                f"{limit_bytes / 1e9:.1f} GB can be used; give --micro-batch-size {largest}, "
                "or --batch-plan memory"
            )
        sizes[stage.index] = asked
    return tuple(sizes[stage.index] for stage in stages)


def require_batch_norm_fits(config: TrainConfig, stages: Sequence[Stage], world_size: int) -> None:
    """Refuse passes that leave batch norm a single value per channel, which has no variance."""
    share = config.batch_size // world_size
    smallest = share if config.batch_plan == "memory" else config.micro_batch_size or share
    if smallest >= MIN_MICRO_BATCH:
        return
    for stage in stages:
        *_, head, _ = layer_costs(config.spec, stage.image_size)
        if head.output_size == 1:
            raise ValueError(
                f"a forward pass has one image, whose last map at {stage.image_size} px (stage "
                f"{stage.index + 1}) is a single pixel: batch norm takes at least 2 values per "
                f"channel; give --batch-size of at least {MIN_MICRO_BATCH * world_size} and "
                f"--micro-batch-size of at least {MIN_MICRO_BATCH}, or larger images by "
                "--progressive.image-size"
            )


def _divisors(number: int) -> list[int]:
    # Largest first. A share of one image has no larger one.
    smallest = min(MIN_MICRO_BATCH, number)
    return [n for n in range(number, smallest - 1, -1) if number % n == 0]
