"""Threads and what is asked for -> the fastest product that anything at hand computes, and copies.

`python -m efficientnet.measuring.cpu_peak THREADS WHAT...` prints one JSON object; WHAT is a
precision, or a copy in memory ("copy") or in the second caches ("cache"). It is run
by peaks.cpu_peaks as a process of its own: numbers of threads and instruction sets are fixed when
the libraries are loaded, and it takes those that are installed.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from efficientnet.formats.artifact import ArtifactError
from efficientnet.measuring.native_peak import WORK, peak_per_s
from efficientnet.runtimes.native.engine import PORTABLE, levels


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


torch, ov, ops = map(_installed, ("torch", "openvino", "openvino.opset13"))

# Rows, and depth and columns; the matrices of the first are in the second cache of most processors.
SHAPES = ((512, 512), (1024, 1024), (2048, 1024))

# A convolution as the networks have them: images of 32 x 32, 256 channels in and out, 3 x 3.
PIXELS, CHANNELS, KERNEL, NUM_IMAGES = 32, 256, 3, 4

MEASURED_S = 0.15
COPY_BYTES = 256_000_000
# Of each thread; with its copy it is in the second cache of every server processor since 2017.
CACHE_BYTES = 256_000

# A product, and the operations of one.
Product = tuple[str, Callable[[], object], int]

OPENVINO_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"}


def main(num_threads: int, asked: list[str]) -> dict[str, tuple[float, str]]:
    """Return the most operations, or bytes copied, a second of each, and by what."""
    if torch is not None:
        torch.set_num_threads(num_threads)
    found: dict[str, tuple[float, str]] = {}
    for what in asked:
        if what == "copy":
            found[what] = copy_bytes_per_s(num_threads, COPY_BYTES), "numpy"
        elif what == "cache":
            found[what] = copy_bytes_per_s(num_threads, CACHE_BYTES * num_threads, 50), "numpy"
        else:
            rates = [
                (num_operations / best_s(product), name)
                for name, product, num_operations in products(what, num_threads)
            ]
            rates += native_rates(what, num_threads)
            if rates:
                found[what] = max(rates)
    return found


def native_rates(precision: str, num_threads: int) -> list[tuple[float, str]]:
    """Return the operations a second that the native engine's instructions do, if it has any."""
    try:
        level = levels()[0]
    except ArtifactError:  # not built
        return []
    if level == PORTABLE or precision not in WORK:
        return []
    rate = 2 * peak_per_s(precision, num_threads, level)
    return [(rate, "the native engine's instructions from registers")]


def products(precision: str, num_threads: int) -> Generator[Product]:
    """Make what computes in a precision; a library that does not is left out."""
    if torch is not None:
        yield from _of_torch(precision)
    if ov is not None:
        yield from _of_openvino(precision, num_threads)
    if precision == "fp32":
        yield from _of_numpy()


def _of_torch(precision: str) -> Generator[Product]:
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for rows, size in SHAPES:
        if precision == "int8":
            a = torch.ones(rows, size, dtype=torch.int8)
            b = torch.ones(size, size, dtype=torch.int8)
            multiply: Any = torch._int_mm
        else:
            a = torch.rand(rows, size).to(kinds[precision])
            b = torch.rand(size, size).to(kinds[precision])
            multiply = torch.mm
        yield f"torch, {rows} x {size} x {size}", partial(multiply, a, b), 2 * rows * size**2
    if precision != "int8":
        images = torch.rand(NUM_IMAGES, CHANNELS, PIXELS, PIXELS).to(kinds[precision])
        images = images.contiguous(memory_format=torch.channels_last)
        conv = torch.nn.Conv2d(CHANNELS, CHANNELS, KERNEL, padding=1, bias=False)
        conv = conv.to(kinds[precision], memory_format=torch.channels_last).requires_grad_(False)
        yield "torch, convolution 3 x 3", partial(conv, images), _conv_operations()


def _of_openvino(precision: str, num_threads: int) -> Generator[Product]:
    core = importlib.import_module("efficientnet.runtimes.openvino_runtime").openvino_core()
    if precision.upper() not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return
    settings = {
        "INFERENCE_NUM_THREADS": num_threads,
        "INFERENCE_PRECISION_HINT": OPENVINO_HINTS[precision],
        "PERFORMANCE_HINT": "LATENCY",
    }
    shape = (NUM_IMAGES, CHANNELS, PIXELS, PIXELS)
    rng = np.random.default_rng(0)
    kernel = rng.random((CHANNELS, CHANNELS, KERNEL, KERNEL), np.float32) - 0.5
    images: Any = ops.parameter(list(shape), np.float32)
    x, weights = images, ops.constant(kernel)
    # In a chain of several the conversions at its ends weigh less.
    depth = 6
    for _ in range(depth):
        if precision == "int8":
            low, high = np.float32(-1.28), np.float32(1.27)
            x = ops.fake_quantize(x, low, high, low, high, 256)
            weights = ops.fake_quantize(
                ops.constant(kernel), low, np.float32(1.28), low, np.float32(1.28), 255
            )
        x = ops.convolution(x, weights, [1, 1], [1, 1], [1, 1], [1, 1])
    compiled: Any = core.compile_model(ov.Model([x], [images], "chain"), "CPU", settings)
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(rng.random(shape, np.float32)))
    yield "OpenVINO, convolutions 3 x 3", request.infer, depth * _conv_operations()


def _of_numpy() -> Generator[Product]:
    for rows, size in SHAPES:
        a, b = (np.ones(shape, np.float32) for shape in ((rows, size), (size, size)))
        yield f"numpy, {rows} x {size} x {size}", partial(np.matmul, a, b), 2 * rows * size**2


def _conv_operations() -> int:
    return 2 * NUM_IMAGES * PIXELS**2 * CHANNELS**2 * KERNEL**2


def copy_bytes_per_s(num_threads: int, num_bytes: int, times: int = 1) -> float:
    """Measure a copy by several threads, read and written bytes together."""
    source = np.zeros(num_bytes // 8)
    target = np.zeros_like(source)
    pieces = list(
        zip(np.array_split(source, num_threads), np.array_split(target, num_threads), strict=True)
    )

    def copy(piece: tuple[Any, Any]) -> None:
        for _ in range(times):
            np.copyto(piece[1], piece[0])

    with ThreadPoolExecutor(num_threads) as pool:
        # numpy lets go of the interpreter's lock while it copies.
        copy_s = best_s(lambda: list(pool.map(copy, pieces)))
    return 2 * num_bytes * times / copy_s


def best_s(work: Callable[[], object]) -> float:
    """Repeat work; return the seconds of the fastest: other programs can only make it slower."""
    work()
    best, end = float("inf"), time.perf_counter() + MEASURED_S
    while time.perf_counter() < end:
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2:])))
