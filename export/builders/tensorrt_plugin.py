"""Squeeze-excite layer of a TensorRT network -> the Triton kernel as a plugin inside its engine.

The kernel's PTX goes into the engine (ahead-of-time plugin), which then needs neither Python
nor Triton. Importing this file registers the plugin.

Its programs wait for each other by the counters: a builder that runs it on other values than zeros,
to time it, may wait for ever. With one format and one tactic there is nothing to time.

Nothing here has been executed in TensorRT, for lack of it and of a GPU: it was written against the
Python part of tensorrt.plugin 11.4.0.106, whose checks of the functions below pass. TensorRT calls
that module experimental. TensorRT-RTX 1.7 has a folder tensorrt_rtx/plugin, but it cannot be
imported, as the classes behind it are missing: there the stock layers stay.
"""

# pyright: reportMissingImports=false, reportUnknownMemberType=false

from dataclasses import dataclass

import tensorrt as trt
import tensorrt.plugin as trtp
import torch

from efficientnet.network.squeeze_excite_kernel import LaunchPlan, compile_to_ptx, plan_launch

PLUGIN_ID = "efficientnet::squeeze_excite"
# Unlike the torch operator's, the counters belong to the caller: see add_squeeze_excite.
COUNTERS_INPUT = "squeeze_excite_counters"

TORCH_DTYPES = {
    trt.float32: torch.float32,
    trt.float16: torch.float16,
    trt.bfloat16: torch.bfloat16,
}
# Channels last: of float32 as they are, of the others padded to a multiple of eight.
TYPES_AND_LAYOUTS = {
    trt.float32: ("FP32", "HWC"),
    trt.float16: ("FP16", "HWC8"),
    trt.bfloat16: ("BF16", "HWC8"),
}


@dataclass(frozen=True)
class SqueezeExciteTensors:
    """Inputs of the plugin, all in the map's precision but the counters."""

    x: trt.ITensor
    """[N, C, H, W]."""
    w1: trt.ITensor
    """[S, C]."""
    b1: trt.ITensor
    """[S]."""
    w2: trt.ITensor
    """[C, S]."""
    b2: trt.ITensor
    """[C]."""
    counters: trt.ITensor
    """int32 [N], see add_squeeze_excite."""


def add_squeeze_excite(
    network: trt.INetworkDefinition, tensors: SqueezeExciteTensors
) -> trt.ITensor:
    """Add the plugin to a strongly typed network and return the gated map [N, C, H, W].

    The network needs one more input, COUNTERS_INPUT, int32 [N], which all these layers share, one
    after the other. Its memory is set to zero once for each execution context, and each launch
    leaves it at zero; contexts that run at the same time must not share it. The plugin so writes to
    an input, and restores it, without declaring that: TensorRT does not foresee it.

    Raises:
        ValueError: channels, height or width not known, or channels not a multiple of eight.
    """
    _, channels, height, width = tensors.x.shape
    squeezed = tensors.w1.shape[0]
    if min(channels, height, width) < 1 or channels % 8:
        raise ValueError(
            f"the map is {list(tensors.x.shape)}, expected fixed channels, a multiple of 8, and a "
            "fixed height and width; keep the stock layers here"
        )
    plugin = trtp.op.efficientnet.squeeze_excite(
        tensors.x,
        tensors.w1,
        tensors.b1,
        tensors.w2,
        tensors.b2,
        tensors.counters,
        channels=channels,
        squeezed=squeezed,
        num_positions=height * width,
    )
    return network.add_plugin(plugin, aot=True).get_output(0)


@trtp.register(PLUGIN_ID)
def describe(
    x: trtp.TensorDesc,
    w1: trtp.TensorDesc,
    b1: trtp.TensorDesc,
    w2: trtp.TensorDesc,
    b2: trtp.TensorDesc,
    counters: trtp.TensorDesc,
    channels: int,
    squeezed: int,
    num_positions: int,
) -> tuple[trtp.TensorDesc, trtp.TensorDesc]:
    """Return the gated map and, as memory to work in, the partial sums [N, num_parts, S]."""
    plan = plan_launch(channels, squeezed, num_positions, _bytes_per_value(x))
    partials = trtp.from_shape_expr((x.shape_expr[0], plan.num_parts, squeezed), trt.float32)
    return x.like(), partials


@trtp.autotune(PLUGIN_ID)
def choose_formats(
    x: trtp.TensorDesc,
    w1: trtp.TensorDesc,
    b1: trtp.TensorDesc,
    w2: trtp.TensorDesc,
    b2: trtp.TensorDesc,
    counters: trtp.TensorDesc,
    outputs: tuple[trtp.TensorDesc, trtp.TensorDesc],
) -> list[trtp.AutoTuneCombination]:
    """Accept the network's precision, the activations channels last and all else linear."""
    value, layout = TYPES_AND_LAYOUTS[x.dtype]
    types = [value] * 5 + ["INT32", value, "FP32"]
    layouts = [layout] + ["LINEAR"] * 5 + [layout, "LINEAR"]
    return [trtp.AutoTuneCombination(", ".join(types), ", ".join(layouts))]


@trtp.aot_impl(PLUGIN_ID)
def compile_kernel(
    x: trtp.TensorDesc,
    w1: trtp.TensorDesc,
    b1: trtp.TensorDesc,
    w2: trtp.TensorDesc,
    b2: trtp.TensorDesc,
    counters: trtp.TensorDesc,
    channels: int,
    squeezed: int,
    num_positions: int,
    outputs: tuple[trtp.TensorDesc, trtp.TensorDesc],
    tactic: int,
) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
    """Return entry, PTX for this machine's GPU, grid, and the numbers between inputs and outputs.

    Triton appends two scratch pointers that the kernel does not read, and TensorRT does not pass;
    torch_tensorrt hands Triton's PTX over in the same way (py/torch_tensorrt/kernels/_triton.py).
    """
    major, minor = torch.cuda.get_device_capability()
    ptx, kernel = compile_to_ptx(channels, squeezed, TORCH_DTYPES[x.dtype], 10 * major + minor)
    plan: LaunchPlan = plan_launch(channels, squeezed, num_positions, _bytes_per_value(x))
    num_images = x.shape_expr[0]
    launch = trtp.KernelLaunchParams(
        grid_x=num_images * (2 * plan.num_parts),
        block_x=32 * kernel.num_warps,
        shared_mem=kernel.shared_memory_bytes,
    )
    numbers = (num_images, num_positions, plan.num_slices, plan.images_per_group)
    arguments = trtp.SymIntExprs(len(numbers))
    for index, number in enumerate(numbers):
        arguments[index] = trtp.SymInt32(number)
    return kernel.entry, ptx, launch, arguments


def _bytes_per_value(x: trtp.TensorDesc) -> int:
    return TORCH_DTYPES[x.dtype].itemsize
