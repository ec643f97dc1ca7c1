"""Feature map [N, C, H, W] and the two layers' weights -> the gated map, in one Triton kernel.

What model.SqueezeExcite does in several launches, for inference on CUDA. How it works:

- Two kinds of programs, `num_parts` of each per image; a part is a block of channels times a slice
  of positions. *Squeeze* programs sum their part of the map, multiply the sums by their columns of
  the first layer (which is linear: partial results may be added up after it), store the products
  and count themselves in. *Scale* programs fetch their part, wait until all squeeze programs of
  their image are in, finish the first layer, compute their own channels' gate and write their part.
  Of the weights a program reads only what its channels need.
- Nobody waits for a program behind it. An image's squeeze programs have lower indices than its
  scale programs and wait for nothing, so they end whatever else occupies the device: no limit on
  the grid, no cooperative launch, nothing that two streams could lock each other out of. This rests
  on programs being started in the order of their indices, which CUDA's documents do not promise,
  but its own library relies on (NVIDIA/cccl, cub/agent/agent_scan.cuh: "Blocks are launched in
  increasing order"). The alternative, programs that keep their part in registers from squeeze to
  scale, spares the second read but needs all programs of an image resident at once, which
  nothing guarantees beside other kernels.
- Bytes: for a map of M = N * C * H * W * (bytes of a value), the mean reads M, the product reads M
  and writes M: 3 M. Here the second read comes from the L2 cache, because images go through in
  groups of at most GROUP_BYTES: 2 M of memory traffic. v2-s at 384 pixels, batch 64, fp16, 960
  channels of 24 x 24: 212 MB against 142 MB. A map smaller than the cache, as at batch size 1,
  costs the stock form 2 M as well; there launches are what is spared. To both come, from the
  cache, num_slices * (both layers' weights) an image, and the products: float32 [N, num_parts, S],
  written once and read by each scale program of the image.
- The counters, int32 [N], must be 0 at the start and are 0 again at the end: what scale programs
  add on leaving cancels what was counted. Whoever keeps them zeroes once, and then must not run two
  launches on them at a time. The torch operator keeps none: captured graphs, AOTInductor programs
  and eager code may all run it at once, on different streams. It takes fresh zeros for each call,
  and the fill of 4 N bytes, ordered before the kernel on the same stream and part of a captured
  graph, is a second launch.

The block sizes are reasoned, not tuned. What ran so far: the kernel in Triton's interpreter, one
program after another, and the compiler for compute capability 8.0 and 9.0. What did not, for lack
of a GPU: waiting, and any measurement of speed.
"""

# ruff: noqa: N803 - Triton writes compile-time arguments in capitals.

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.library import triton_op, wrap_triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from efficientnet.network.model import SqueezeExcite

TRITON_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}

NUM_WARPS = 4
# 128 bytes of a position in fp16: whole cache lines. With 64 positions, 32 values per thread.
BLOCK_CHANNELS = 64
BLOCK_POSITIONS = 64
BLOCK_PARTS = 32
# Each scale program reads the partial sums of all parts.
MAX_PARTS = 64
# A third of an H100's L2 cache of 50 MB: what was read stays while what is written passes through.
GROUP_BYTES = 16 * 2**20

# Added by each scale program but the last part's on leaving; that one takes everything off again.
# From "all in" to "all gone" the count is negative or at least num_parts, in whatever order.
LEAVE = tl.constexpr(2**16)


class LaunchPlan(NamedTuple):
    """How one image is divided among programs."""

    num_slices: int
    """Of the positions of an image; each is walked through in steps of BLOCK_POSITIONS."""
    num_parts: int
    """Squeeze programs an image, and as many scale programs."""
    images_per_group: int
    """Images that are squeezed before the first of them is scaled."""


class CompiledKernel(NamedTuple):
    """What a launch without Triton needs to know."""

    entry: str
    """Name of the kernel in the PTX."""
    num_warps: int
    """Of 32 threads; a block is one-dimensional."""
    shared_memory_bytes: int
    parameters: tuple[str, ...]
    """Names in order. Triton's own two scratch pointers follow in the PTX, and are not read."""


@triton.jit
def _squeeze_part(
    x,
    w1,
    counter,
    partial,
    num_positions,
    begin,
    end,
    channels,
    CHANNELS: tl.constexpr,
    SQUEEZED: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_SQUEEZED: tl.constexpr,
):
    total = tl.zeros([BLOCK_POSITIONS, channels.shape[0]], tl.float32)
    for start in range(begin, end, BLOCK_POSITIONS):
        positions = start + tl.arange(0, BLOCK_POSITIONS)
        mask = (positions < end)[:, None] & (channels < CHANNELS)[None, :]
        tile = x + positions[:, None] * CHANNELS + channels[None, :]
        total += tl.load(tile, mask, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / num_positions
    for start in range(0, SQUEEZED, BLOCK_SQUEEZED):
        rows = start + tl.arange(0, BLOCK_SQUEEZED)
        mask = (rows < SQUEEZED)[:, None] & (channels < CHANNELS)[None, :]
        weight = tl.load(w1 + rows[:, None] * CHANNELS + channels[None, :], mask, other=0.0)
        share = tl.sum(weight.to(tl.float32) * mean[None, :], 1)
        tl.store(partial + rows, share, rows < SQUEEZED)
    # The release is one thread's; the barrier puts the stores of the others before it.
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def _scale_part(
    x,
    b1,
    w2,
    b2,
    counter,
    out,
    partials,
    num_parts,
    is_last_part,
    begin,
    end,
    channels,
    CHANNELS: tl.constexpr,
    SQUEEZED: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_SQUEEZED: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    is_channel = channels < CHANNELS
    offsets = tl.arange(0, BLOCK_POSITIONS)[:, None] * CHANNELS + channels[None, :]
    in_slice = begin + tl.arange(0, BLOCK_POSITIONS) < end
    mask = in_slice[:, None] & is_channel[None, :]
    # On its way while the squeeze programs finish.
    tile = tl.load(x + begin * CHANNELS + offsets, mask, other=0.0)

    count = tl.atomic_add(counter, 0, sem="acquire")
    while (count >= 0) & (count < num_parts):
        count = tl.atomic_add(counter, 0, sem="acquire")
    take_off = -(num_parts + (num_parts - 1) * LEAVE)
    tl.atomic_add(counter, tl.where(is_last_part, take_off, LEAVE), sem="relaxed")

    logit = tl.load(b2 + channels, is_channel, other=0.0).to(tl.float32)
    for start in range(0, SQUEEZED, BLOCK_SQUEEZED):
        columns = start + tl.arange(0, BLOCK_SQUEEZED)
        is_column = columns < SQUEEZED
        weight_mask = is_channel[:, None] & is_column[None, :]
        weight = tl.load(
            w2 + channels[:, None] * SQUEEZED + columns[None, :], weight_mask, other=0.0
        )
        shares = tl.zeros([BLOCK_PARTS, BLOCK_SQUEEZED], tl.float32)
        for first in range(0, num_parts, BLOCK_PARTS):
            parts = first + tl.arange(0, BLOCK_PARTS)
            share_mask = (parts < num_parts)[:, None] & is_column[None, :]
            shares += tl.load(
                partials + parts[:, None] * SQUEEZED + columns[None, :], share_mask, other=0.0
            )
        hidden = tl.sum(shares, 0) + tl.load(b1 + columns, is_column, other=0.0).to(tl.float32)
        hidden = hidden * tl.sigmoid(hidden)
        logit += tl.sum(weight.to(tl.float32) * hidden[None, :], 1)
    gate = tl.sigmoid(logit)[None, :]

    tl.store(out + begin * CHANNELS + offsets, (tile.to(tl.float32) * gate).to(tile.dtype), mask)
    for start in range(begin + BLOCK_POSITIONS, end, BLOCK_POSITIONS):
        in_slice = start + tl.arange(0, BLOCK_POSITIONS) < end
        mask = in_slice[:, None] & is_channel[None, :]
        tile = tl.load(x + start * CHANNELS + offsets, mask, other=0.0)
        scaled = (tile.to(tl.float32) * gate).to(tile.dtype)
        tl.store(out + start * CHANNELS + offsets, scaled, mask)


# Inputs, numbers, outputs: the order in which TensorRT passes arguments to a plugin's kernel.
@triton.jit
def squeeze_excite_kernel(
    x,
    w1,
    b1,
    w2,
    b2,
    counters,
    num_images,
    num_positions,
    num_slices,
    images_per_group,
    out,
    partials,
    CHANNELS: tl.constexpr,
    SQUEEZED: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_SQUEEZED: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Squeeze and scale; 2 * num_images * num_parts programs, see the module's docstring."""
    num_parts = tl.cdiv(CHANNELS, BLOCK_CHANNELS) * num_slices
    program = tl.program_id(0)
    first_image = program // (2 * images_per_group * num_parts) * images_per_group
    index = program - 2 * first_image * num_parts
    num_squeezers = tl.minimum(images_per_group, num_images - first_image) * num_parts
    is_scale = index >= num_squeezers
    index = tl.where(is_scale, index - num_squeezers, index)

    # A network's batch of maps can have more values than an int32 counts.
    image = (first_image + index // num_parts).to(tl.int64)
    part = index % num_parts
    channels = part // num_slices * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    positions_per_slice = tl.cdiv(num_positions, num_slices)
    begin = part % num_slices * positions_per_slice
    end = tl.minimum(begin + positions_per_slice, num_positions)
    map_offset = image * num_positions * CHANNELS
    partials += image * num_parts * SQUEEZED
    counter = counters + image
    if is_scale:
        _scale_part(
            x + map_offset,
            b1,
            w2,
            b2,
            counter,
            out + map_offset,
            partials,
            num_parts,
            part == num_parts - 1,
            begin,
            end,
            channels,
            CHANNELS,
            SQUEEZED,
            BLOCK_POSITIONS,
            BLOCK_SQUEEZED,
            BLOCK_PARTS,
        )
    else:
        _squeeze_part(
            x + map_offset,
            w1,
            counter,
            partials + part * SQUEEZED,
            num_positions,
            begin,
            end,
            channels,
            CHANNELS,
            SQUEEZED,
            BLOCK_POSITIONS,
            BLOCK_SQUEEZED,
        )


# Under TRITON_INTERPRET=1, on CPU tensors.
IS_INTERPRETED = not isinstance(squeeze_excite_kernel, triton.JITFunction)


def plan_launch(
    channels: int, squeezed: int, num_positions: int, bytes_per_value: int
) -> LaunchPlan:
    """Divide an image among programs, whatever the batch size, so that it may stay symbolic."""
    num_blocks = triton.cdiv(channels, BLOCK_CHANNELS)
    # A program reads `squeezed` weights for each of its channels: at least twice as many positions
    # keep the map the larger part.
    fitting = num_positions // max(BLOCK_POSITIONS, 2 * squeezed)
    num_slices = max(1, min(fitting, MAX_PARTS // num_blocks))
    # Fewer, where that fills blocks of positions.
    num_blocks_per_slice = triton.cdiv(num_positions, num_slices * BLOCK_POSITIONS)
    num_slices = triton.cdiv(num_positions, num_blocks_per_slice * BLOCK_POSITIONS)
    images_per_group = max(1, GROUP_BYTES // (channels * num_positions * bytes_per_value))
    return LaunchPlan(num_slices, num_blocks * num_slices, images_per_group)


def block_constants(channels: int, squeezed: int) -> dict[str, int]:
    """Return the kernel's compile-time arguments."""
    return {
        "CHANNELS": channels,
        "SQUEEZED": squeezed,
        "BLOCK_CHANNELS": BLOCK_CHANNELS,
        "BLOCK_POSITIONS": BLOCK_POSITIONS,
        "BLOCK_SQUEEZED": min(64, max(16, triton.next_power_of_2(squeezed))),
        "BLOCK_PARTS": BLOCK_PARTS,
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

    Raises:
        ValueError: another device, dtype or shape.
    """
    _check_arguments(x, w1, b1, w2, b2)
    # Nothing is copied where it has that format. To refuse others would refuse torch.export: it
    # traces with cuDNN off (torch/export/_trace.py), and convolutions then claim contiguous maps.
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    if x.device.type == "meta":
        return out
    num_images, channels, height, width = x.shape
    squeezed = w1.shape[0]
    plan = plan_launch(channels, squeezed, height * width, x.element_size())
    counters = torch.zeros(num_images, dtype=torch.int32, device=x.device)
    partials = torch.empty(
        (num_images, plan.num_parts, squeezed), dtype=torch.float32, device=x.device
    )
    # Older versions of wrap_triton refuse what the interpreter runs.
    kernel: Any = squeeze_excite_kernel if IS_INTERPRETED else wrap_triton(squeeze_excite_kernel)
    kernel[(2 * num_images * plan.num_parts,)](
        x,
        w1,
        b1,
        w2,
        b2,
        counters,
        num_images,
        height * width,
        plan.num_slices,
        plan.images_per_group,
        out,
        partials,
        **block_constants(channels, squeezed),
        num_warps=NUM_WARPS,
    )
    return out


class TritonSqueezeExcite(nn.Module):
    """model.SqueezeExcite for inference on CUDA, with the same layers under the same names.

    Args:
        module: whose layers are taken over, not copied.
    """

    def __init__(self, module: SqueezeExcite) -> None:
        super().__init__()
        self.fc1, self.fc2 = module.fc1, module.fc2

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] on CUDA to a new tensor of the same shape, channels_last."""
        assert self.fc1.bias is not None and self.fc2.bias is not None
        return squeeze_excite(
            x,
            self.fc1.weight.flatten(1),
            self.fc1.bias,
            self.fc2.weight.flatten(1),
            self.fc2.bias,
        )


def use_triton_squeeze_excite(model: nn.Module) -> None:
    """Replace every SqueezeExcite inside a model in place; names in its state stay the same."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, SqueezeExcite):
                setattr(module, name, TritonSqueezeExcite(child))


def compile_to_ptx(
    channels: int, squeezed: int, dtype: torch.dtype, compute_capability: int
) -> tuple[str, CompiledKernel]:
    """Compile the kernel for a GPU that need not be here.

    Its pointers must be multiples of 16 bytes. It is launched with plan_launch's numbers, in
    2 * num_images * num_parts blocks.

    Raises:
        ValueError: a dtype that the kernel does not take, or kernels are interpreted here.
    """
    if IS_INTERPRETED:
        raise ValueError(
            "TRITON_INTERPRET is set, and interpreted kernels cannot be compiled; unset it"
        )
    _check_dtype(dtype)
    constants = block_constants(channels, squeezed)
    pointers = {"counters": "*i32", "partials": "*fp32"}
    numbers = ("num_images", "num_positions", "num_slices", "images_per_group")
    signature, attributes = {}, {}
    for index, name in enumerate(squeeze_excite_kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in numbers:
            signature[name] = "i32"
        else:
            signature[name] = pointers.get(name, f"*{TRITON_DTYPES[dtype]}")
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(squeeze_excite_kernel, signature, constants, attributes),
        target=GPUTarget("cuda", compute_capability, 32),
        options={"num_warps": NUM_WARPS},
    )
    metadata = compiled.metadata
    # A launcher that knows nothing of Triton has no scratch memory to pass.
    assert metadata.global_scratch_size == metadata.profile_scratch_size == 0
    parameters = tuple(name for name in signature if name not in constants)
    kernel = CompiledKernel(metadata.name, metadata.num_warps, metadata.shared, parameters)
    return compiled.asm["ptx"], kernel


def _check_arguments(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> None:
    if x.device.type not in ("cuda", "meta") and not IS_INTERPRETED:
        raise ValueError(
            f"x is on {x.device}, expected a CUDA device: the kernel is for GPUs; "
            "use efficientnet.network.model.SqueezeExcite here"
        )
    _check_dtype(x.dtype)
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


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in TRITON_DTYPES:
        raise ValueError(
            f"dtype is {dtype}, expected one of {', '.join(map(str, TRITON_DTYPES))}; cast first"
        )
