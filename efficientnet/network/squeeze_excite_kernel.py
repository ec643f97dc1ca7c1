"""Feature map [N, C, H, W] and the two layers' weights -> the gated map, in two Triton kernels.

What model.SqueezeExcite does in several launches, for inference on CUDA. An image is divided into
parts, a block of channels times a slice of positions, with a program of each kernel for each:

- *squeeze* sums its part of the map, multiplies the sums by their columns of the first layer, which
  is linear, and stores the products: float32 [N, parts, S], added up after it;
- *scale* adds up the products of its image, finishes the first layer and the gate of its own
  channels, and writes its part. Of the weights a program reads only what its channels need.

The block sizes are reasoned, not tuned.
"""

# ruff: noqa: N803 - Triton writes compile-time arguments in capitals.

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.library import triton_op, wrap_triton

from efficientnet.network.model import SqueezeExcite

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

NUM_WARPS = 4
# 128 bytes of a position in fp16: whole cache lines. With 64 positions, 32 values per thread.
BLOCK_CHANNELS = 64
BLOCK_POSITIONS = 64
BLOCK_PARTS = 32
# Each scale program reads the partial sums of all parts.
MAX_PARTS = 64


class LaunchPlan(NamedTuple):
    """How one image is divided among programs."""

    num_slices: int
    """Of the positions of an image; each is walked through in steps of BLOCK_POSITIONS."""
    num_parts: int
    """Programs an image."""


@triton.jit
def _own_part(num_positions, num_slices, BLOCK_CHANNELS: tl.constexpr):
    # Channels of a program, and where its positions begin and end.
    part = tl.program_id(0)
    channels = part // num_slices * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    positions_per_slice = tl.cdiv(num_positions, num_slices)
    begin = part % num_slices * positions_per_slice
    return channels, begin, tl.minimum(begin + positions_per_slice, num_positions)


@triton.jit
def squeeze_kernel(
    x,
    w1,
    partials,
    num_positions,
    num_slices,
    CHANNELS: tl.constexpr,
    SQUEEZED: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_SQUEEZED: tl.constexpr,
):
    """Multiply the means of a part by the first layer; a grid of parts times images."""
    channels, begin, end = _own_part(num_positions, num_slices, BLOCK_CHANNELS)
    # A network's batch of maps can have more values than an int32 counts.
    image = tl.program_id(1).to(tl.int64)
    x += image * num_positions * CHANNELS
    partials += (image * tl.num_programs(0) + tl.program_id(0)) * SQUEEZED
    is_channel = channels < CHANNELS
    total = tl.zeros([BLOCK_POSITIONS, BLOCK_CHANNELS], tl.float32)
    for start in range(begin, end, BLOCK_POSITIONS):
        positions = start + tl.arange(0, BLOCK_POSITIONS)
        mask = (positions < end)[:, None] & is_channel[None, :]
        tile = x + positions[:, None] * CHANNELS + channels[None, :]
        total += tl.load(tile, mask, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / num_positions
    for start in range(0, SQUEEZED, BLOCK_SQUEEZED):
        rows = start + tl.arange(0, BLOCK_SQUEEZED)
        mask = (rows < SQUEEZED)[:, None] & is_channel[None, :]
        weight = tl.load(w1 + rows[:, None] * CHANNELS + channels[None, :], mask, other=0.0)
        share = tl.sum(weight.to(tl.float32) * mean[None, :], 1)
        tl.store(partials + rows, share, rows < SQUEEZED)


@triton.jit
def scale_kernel(
    x,
    b1,
    w2,
    b2,
    partials,
    out,
    num_positions,
    num_slices,
    CHANNELS: tl.constexpr,
    SQUEEZED: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_SQUEEZED: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Scale a part by the gate of its channels; a grid of parts times images."""
    channels, begin, end = _own_part(num_positions, num_slices, BLOCK_CHANNELS)
    image, num_parts = tl.program_id(1).to(tl.int64), tl.num_programs(0)
    x += image * num_positions * CHANNELS
    out += image * num_positions * CHANNELS
    partials += image * num_parts * SQUEEZED
    is_channel = channels < CHANNELS
    logit = tl.load(b2 + channels, is_channel, other=0.0).to(tl.float32)
    for start in range(0, SQUEEZED, BLOCK_SQUEEZED):
        columns = start + tl.arange(0, BLOCK_SQUEEZED)
        is_column = columns < SQUEEZED
        shares = tl.zeros([BLOCK_PARTS, BLOCK_SQUEEZED], tl.float32)
        for first in range(0, num_parts, BLOCK_PARTS):
            parts = first + tl.arange(0, BLOCK_PARTS)
            mask = (parts < num_parts)[:, None] & is_column[None, :]
            share = partials + parts[:, None] * SQUEEZED + columns[None, :]
            shares += tl.load(share, mask, other=0.0)
        hidden = tl.sum(shares, 0) + tl.load(b1 + columns, is_column, other=0.0).to(tl.float32)
        hidden = hidden * tl.sigmoid(hidden)
        mask = is_channel[:, None] & is_column[None, :]
        weight = tl.load(w2 + channels[:, None] * SQUEEZED + columns[None, :], mask, other=0.0)
        logit += tl.sum(weight.to(tl.float32) * hidden[None, :], 1)
    gate = tl.sigmoid(logit)[None, :]
    for start in range(begin, end, BLOCK_POSITIONS):
        positions = start + tl.arange(0, BLOCK_POSITIONS)
        mask = (positions < end)[:, None] & is_channel[None, :]
        offsets = positions[:, None] * CHANNELS + channels[None, :]
        tile = tl.load(x + offsets, mask, other=0.0)
        tl.store(out + offsets, (tile.to(tl.float32) * gate).to(tile.dtype), mask)


# Under TRITON_INTERPRET=1, on CPU tensors.
IS_INTERPRETED = not isinstance(scale_kernel, triton.JITFunction)


def plan_launch(channels: int, squeezed: int, num_positions: int) -> LaunchPlan:
    """Divide an image among programs, whatever the batch size, so that it may stay symbolic."""
    num_blocks = triton.cdiv(channels, BLOCK_CHANNELS)
    # A program reads `squeezed` weights for each of its channels: at least twice as many positions
    # keep the map the larger part.
    fitting = num_positions // max(BLOCK_POSITIONS, 2 * squeezed)
    num_slices = max(1, min(fitting, MAX_PARTS // num_blocks))
    # Fewer, where that fills blocks of positions.
    num_blocks_per_slice = triton.cdiv(num_positions, num_slices * BLOCK_POSITIONS)
    num_slices = triton.cdiv(num_positions, num_blocks_per_slice * BLOCK_POSITIONS)
    return LaunchPlan(num_slices, num_blocks * num_slices)


def block_constants(channels: int, squeezed: int) -> dict[str, int]:
    """Return the compile-time arguments of both kernels."""
    return {
        "CHANNELS": channels,
        "SQUEEZED": squeezed,
        "BLOCK_CHANNELS": BLOCK_CHANNELS,
        "BLOCK_POSITIONS": BLOCK_POSITIONS,
        "BLOCK_SQUEEZED": min(64, max(16, triton.next_power_of_2(squeezed))),
    }


@triton_op("efficientnet::squeeze_excite", mutates_args=())
def squeeze_excite(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Return x * sigmoid(w2 silu(w1 mean(x) + b1) + b2), sums in float32.

    A torch operator, for eager code, torch.compile, torch.export and AOTInductor; no gradients. The
    batch size may be symbolic, channels, height and width not. The result is a new tensor.

    Args:
        x: [N, C, H, W], float16, bfloat16 or float32, on CUDA. To be channels_last, as the result
            is; otherwise it is copied first.
        w1: [S, C], contiguous, and of x's dtype as all weights.
        b1: [S].
        w2: [C, S], contiguous.
        b2: [C].
    """
    _check_arguments(x, w1, b1, w2, b2)
    # Nothing is copied where it has that format. To refuse others would refuse torch.export: it
    # traces with cuDNN off (torch/export/_trace.py), and convolutions then claim contiguous maps.
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    if x.device.type == "meta":
        return out
    num_images, channels, height, width = x.shape
    squeezed, num_positions = w1.shape[0], height * width
    plan = plan_launch(channels, squeezed, num_positions)
    partials = x.new_empty((num_images, plan.num_parts, squeezed), dtype=torch.float32)
    constants, numbers = block_constants(channels, squeezed), (num_positions, plan.num_slices)
    # Older versions of wrap_triton refuse what the interpreter runs.
    squeeze: Any = squeeze_kernel if IS_INTERPRETED else wrap_triton(squeeze_kernel)
    scale: Any = scale_kernel if IS_INTERPRETED else wrap_triton(scale_kernel)
    grid = (plan.num_parts, num_images)
    squeeze[grid](x, w1, partials, *numbers, **constants, num_warps=NUM_WARPS)
    scale[grid](
        *(x, b1, w2, b2, partials, out, *numbers),
        **constants,
        BLOCK_PARTS=BLOCK_PARTS,
        num_warps=NUM_WARPS,
    )
    return out


class TritonSqueezeExcite(nn.Module):
    """model.SqueezeExcite for inference on CUDA, whose layers it takes over with their names."""

    def __init__(self, module: SqueezeExcite) -> None:
        super().__init__()
        self.fc1, self.fc2 = module.fc1, module.fc2

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] on CUDA to a new tensor of the same shape, channels_last."""
        assert self.fc1.bias is not None and self.fc2.bias is not None
        return squeeze_excite(
            x, self.fc1.weight.flatten(1), self.fc1.bias, self.fc2.weight.flatten(1), self.fc2.bias
        )


def use_triton_squeeze_excite(model: nn.Module) -> None:
    """Replace every SqueezeExcite inside a model in place; names in its state stay the same."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, SqueezeExcite):
                setattr(module, name, TritonSqueezeExcite(child))


def _check_arguments(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> None:
    if x.device.type not in ("cuda", "meta") and not IS_INTERPRETED:
        raise ValueError(
            f"x is on {x.device}, expected a CUDA device: the kernel is for GPUs; "
            "use efficientnet.network.model.SqueezeExcite here"
        )
    if x.dtype not in DTYPES:
        raise ValueError(
            f"dtype is {x.dtype}, expected one of {', '.join(map(str, DTYPES))}; cast first"
        )
    if x.dim() != 4:
        raise ValueError(f"x is {list(x.shape)}, expected [N, C, H, W]; add the missing axes")
    channels, squeezed = x.shape[1], w1.shape[0]
    expected = {"w1": [squeezed, channels], "b1": [squeezed], "w2": [channels, squeezed]}
    for name, weight in {"w1": w1, "b1": b1, "w2": w2, "b2": b2}.items():
        shape = expected.get(name, [channels])
        found = (list(weight.shape), weight.dtype, weight.device)
        if found != (shape, x.dtype, x.device) or not weight.is_contiguous():
            raise ValueError(
                f"{name} is {found[0]}, {found[1]} on {found[2]}, expected {shape}, {x.dtype} on "
                f"{x.device} like x, contiguous; move model and images to one device and dtype"
            )
