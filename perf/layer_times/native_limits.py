"""A native program and this processor's rates -> each layer's least time, by what limits it.

Three limits, of which a layer cannot beat the highest: its products (by tiles, where the processor
has them), its vector instructions (all others: the epilogue from sums to bytes, depthwise products,
scaling), and its bytes (weights from memory, maps from the second cache). The instructions are
counted in the engine's own kernels, so what a layer takes beyond them is waiting.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from efficientnet.measuring.native_peak import WORK, peak_per_s
from efficientnet.measuring.peaks import cpu_cache_bytes_per_s
from efficientnet.runtimes.native.program_file import Activation, DType, Kind, read_program_file
from efficientnet.runtimes.native_runtime import NAMES_FILE
from perf.layer_times.layer_profile import Node

Limit = Literal["products", "instructions", "bytes"]
LIMITS: tuple[Limit, ...] = get_args(Limit)

# Floats of a register, and whether products of u8 and bf16 maps go by tiles.
LANES = {"amx": 16, "avx512_bf16": 16, "avx512_vbmi": 16, "avx512_vnni": 16, "avx_vnni": 8}
TILES = frozenset(("amx",))

# One register of products of four bytes, or of two bf16, by 16 sums.
PRODUCTS_OF_A_REGISTER = {DType.U8: 64, DType.BF16: 32}
BYTES_OF = {DType.U8: 1, DType.BF16: 2}

# Instructions for 64 values of a map, 16 lanes wide: epilogue.h and depthwise512.h.
# u8: 4 conversions, scalings and conversions back, 2 packs, 1 pack, 1 permute, 2 stores; to which
# come an activation's 2 indices, 8 look-ups of bytes, 2 products, 2 sums and 2 shifts, or a line's
# 2 sums and 2 shifts, and a residual's load, 2 unpacks, 2 halves, 2 products and 2 sums.
EPILOGUE = {DType.U8: 18, DType.BF16: 12}
ACTIVATION = {
    (DType.U8, Activation.NONE): 4,
    (DType.U8, Activation.SILU): 16,
    (DType.U8, Activation.RELU6): 6,
    # bf16, 4 registers: 16 instructions of an exponential each, or 2 of a clamp.
    (DType.BF16, Activation.NONE): 0,
    (DType.BF16, Activation.SILU): 64,
    (DType.BF16, Activation.RELU6): 8,
}
RESIDUAL = 8
# Of squeeze-excite.
SCALING = 12
# For 16 pixels of an image: 3 products, sums, clamps from both sides and conversions; to a word.
INPUT, IMAGE_BYTES = 20, 12


@dataclass(frozen=True)
class Rates:
    """What a processor does in a second, with the threads of a call."""

    products: Mapping[str, float]
    """Multiply-adds of int8 and bf16, from registers alone."""
    instructions: float
    """Of vectors, from registers alone."""
    memory_bytes: float
    cache_bytes: float
    """Copied within the second cache, read and written together."""


def measure_rates(num_threads: int, level: str, memory_bytes_per_s: float) -> Rates:
    """Measure what this processor does, some seconds."""
    int8, bf16, instructions = (peak_per_s(work, num_threads, level) for work in WORK)
    cache_bytes_per_s = cpu_cache_bytes_per_s(num_threads)
    return Rates({"int8": int8, "bf16": bf16}, instructions, memory_bytes_per_s, cache_bytes_per_s)


def layer_limits(program: Path, level: str, rates: Rates) -> dict[str, dict[Limit, float]]:
    """Return the least milliseconds of each layer of a program file, by its name, for one image."""
    view = read_program_file(program)
    names = json.loads((program.parent / NAMES_FILE).read_text(encoding="utf-8"))["layers"]
    return {
        name: _limits(layer, view.tensors, view.num_classes, level, rates)
        for name, layer in zip(names, view.layers, strict=True)
    }


def node_limits(node: Node, limits: Mapping[str, Mapping[Limit, float]]) -> dict[str, float]:
    """Add up the limits of the layers that were computed together."""
    return {limit: sum(limits[name][limit] for name in node.covered) for limit in LIMITS}


def _limits(
    layer: Any, tensors: Any, num_classes: int, level: str, rates: Rates
) -> dict[Limit, float]:
    kind, source = Kind(layer["kind"]), tensors[layer["input"]] if layer["input"] >= 0 else None
    target = tensors[layer["output"]] if layer["output"] >= 0 else None
    out_values = _values(target)
    map_bytes = _bytes(source) + _bytes(target)
    weights, products, instructions = 0.0, 0.0, 0.0
    if kind in (Kind.CONV, Kind.DEPTHWISE):
        assert source is not None and target is not None
        dtype = DType(target["dtype"])
        depth = int(layer["kernel"]) ** 2
        if kind is Kind.CONV:
            depth *= int(source["channels"])
        macs = out_values * depth
        weights = depth * int(target["channels"]) * BYTES_OF[dtype]
        if kind is Kind.CONV and level in TILES:
            products = macs / rates.products["bf16" if dtype is DType.BF16 else "int8"]
        else:
            # Depthwise of bf16: one multiply-add of floats a tap.
            wide = 16 if kind is Kind.DEPTHWISE and dtype is DType.BF16 else None
            instructions += macs / (wide or PRODUCTS_OF_A_REGISTER[dtype])
        each = EPILOGUE[dtype] + ACTIVATION[dtype, Activation(layer["activation"])]
        if layer["residual"] >= 0:
            each += RESIDUAL
            map_bytes += _bytes(tensors[layer["residual"]])
        instructions += out_values / 64 * each
    elif kind is Kind.INPUT:
        pixels = out_values / 3
        # Floats that were made since the last call come from memory, as weights do.
        weights = pixels * IMAGE_BYTES
        instructions = pixels / 16 * INPUT
    elif kind is Kind.SQUEEZE_EXCITE:
        assert source is not None
        weights = 4.0 * int(layer["squeeze_channels"]) * int(source["channels"])
        instructions = _values(source) / 64 * SCALING
    elif kind is Kind.CLASSIFIER:
        assert source is not None
        weights = 2.0 * num_classes * int(source["channels"])
        instructions = num_classes * int(source["channels"]) / 16
    return {
        "products": 1e3 * products,
        "instructions": 1e3 * instructions * (16 / LANES[level]) / rates.instructions,
        "bytes": 1e3 * (weights / rates.memory_bytes + map_bytes / rates.cache_bytes),
    }


def _values(tensor: Any) -> int:
    if tensor is None:
        return 0
    return int(tensor["height"]) * int(tensor["width"]) * int(tensor["channels"])


def _bytes(tensor: Any) -> int:
    return 0 if tensor is None else _values(tensor) * BYTES_OF[DType(tensor["dtype"])]
