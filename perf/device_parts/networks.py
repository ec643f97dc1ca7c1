"""A variant -> its eager model, CUDA graph and torch.compile's program, measured in turns."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from perf.device_parts import turns
from perf.device_parts.gpu_watch import GpuWatch
from perf.device_parts.network_case import Scene
from perf.device_parts.plan import Order
from perf.device_parts.records import LatencyMeasured, Line, Region

GRAPH = "CUDA graph of eager"
COMPILED = "torch.compile max-autotune"
COMPILED_QUICKLY = "torch.compile reduce-overhead"
# Of a dry run: without the minutes of compiling.
DRY_COMPILED = "torch.compile aot_eager"

# The paper's first: what is cut off is the rest.
PRECISIONS = ("fp16", "bf16", "fp32")
BATCH_SIZES = (16, 1)
SWEEP = (16, 32, 64, 128, 256)
# Without TF32 a call of more images takes a second.
SWEEP_FP32 = (16, 32, 64)
DRY_BATCH_SIZES = (2, 1)
DRY_SWEEP = (2, 4)

# A larger batch that brings less is not worth its memory.
LEAST_GAIN = 1.02

# Where the network job has not told of a better one.
USUAL_BEST = 64

DEVICE: Region = "device to device"

NUM_WARM_UPS = 3

log = logging.getLogger(__name__)


def measure_network(order: Order, scene: Scene, watch: GpuWatch) -> Iterator[Line]:
    """Measure the eager model and its CUDA graph at batch 16, 1 and the best one."""
    pace = turns.DRY_PACE if order.is_dry_run else turns.PACE
    for precision in PRECISIONS:
        program = scene.program(precision)
        best = best_batch_size(scene, program, precision, order.is_dry_run)
        for case in cases_of(precision, best, order.is_dry_run):
            contenders = [eager(scene, precision, program)]
            if scene.device.type == "cuda":
                contenders.append(graph(scene, precision, program, case.batch_size))
            yield from turns.compare(order.job, scene, case, contenders, pace, watch)


def measure_compiled(
    order: Order, scene: Scene, watch: GpuWatch, earlier: list[Line]
) -> Iterator[Line]:
    """Measure torch.compile's programs beside the eager model."""
    pace = turns.DRY_PACE if order.is_dry_run else turns.PACE
    done = cases_done(order.job, earlier)
    is_first = True
    for precision in PRECISIONS:
        program = scene.program(precision)
        best = known_best(earlier, scene.variant, precision, order.is_dry_run)
        for case in cases_of(precision, best, order.is_dry_run):
            # Reduce-overhead takes a part of max-autotune's time: something is there soon.
            methods = (COMPILED_QUICKLY, COMPILED) if is_first else (COMPILED,)
            methods = (DRY_COMPILED,) if order.is_dry_run else methods
            is_first = False
            for method in methods:
                if (precision, case.batch_size, method) in done:
                    continue
                torch.compiler.reset()
                contenders = [
                    eager(scene, precision, program),
                    turns.Contender(method, DEVICE, partial(_compiled, program, method)),
                ]
                yield from turns.compare(order.job, scene, case, contenders, pace, watch)
                turns.free_memory()


def cases_of(precision: str, best: int, is_dry_run: bool) -> list[turns.Case]:
    """List the batch sizes of a precision: the paper's, one image, and the best."""
    sizes = DRY_BATCH_SIZES if is_dry_run else BATCH_SIZES
    cases = [turns.Case(precision, size, size == best) for size in sizes]
    return cases if best in sizes else [*cases, turns.Case(precision, best, True)]


def cases_done(job: str, earlier: list[Line]) -> set[tuple[str, int, str]]:
    """Return precision, batch size and method of what a job has measured in an earlier call."""
    return {
        (line.precision, line.batch_size, line.method)
        for line in earlier
        if isinstance(line, LatencyMeasured) and line.job == job and line.problem is None
    }


def known_best(earlier: list[Line], variant: str, precision: str, is_dry_run: bool) -> int:
    """Return the best batch size that the network job has found, or a usual one."""
    for line in reversed(earlier):
        if (
            isinstance(line, LatencyMeasured)
            and line.is_best_batch
            and (line.variant, line.precision) == (variant, precision)
        ):
            return line.batch_size
    return DRY_SWEEP[-1] if is_dry_run else USUAL_BEST


def best_batch_size(scene: Scene, program: nn.Module, precision: str, is_dry_run: bool) -> int:
    """Try larger and larger batches with the eager model, until they bring nothing or don't fit."""
    sizes = SWEEP_FP32 if precision == "fp32" else SWEEP
    best, best_rate = 0, 0.0
    for size in DRY_SWEEP if is_dry_run else sizes:
        try:
            found = turns.rate(
                program, scene.batches(size), turns.DRY_PACE.turn_s if is_dry_run else 0.1
            )
        except torch.OutOfMemoryError:
            log.info("%s %s: batches of %d do not fit", scene.variant, precision, size)
            turns.free_memory()
            break
        if found < LEAST_GAIN * best_rate:
            break
        best, best_rate = size, found
    turns.free_memory()
    return best or 1


def eager(scene: Scene, precision: str, program: nn.Module | None = None) -> turns.Contender:
    """Return the model as it was built, channels_last, images and logits on the device."""
    return turns.Contender(turns.EAGER, DEVICE, lambda: program or scene.program(precision))


def graph(scene: Scene, precision: str, program: nn.Module, batch_size: int) -> turns.Contender:
    """Return the eager model's kernels in one CUDA graph, which a call copies its images into."""
    example = scene.images[:1]
    shape = (batch_size, *example.shape[1:])
    return turns.Contender(GRAPH, DEVICE, lambda: captured(program, example.new_empty(shape)))


def captured(program: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[Tensor], Tensor]:
    """Capture a program as a CUDA graph that reads `images`, and writes the same logits anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The first calls choose kernels and load them, neither of which can be captured.
        for _ in range(NUM_WARM_UPS):
            program(images)
    torch.cuda.current_stream().wait_stream(stream)
    cuda_graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(cuda_graph):
        logits = program(images)

    def infer(batch: Tensor) -> Tensor:
        images.copy_(batch)
        cuda_graph.replay()
        return logits

    return infer


def _compiled(program: nn.Module, method: str) -> Callable[[Tensor], Tensor]:
    word = method.partition(" ")[2]
    options: dict[str, Any] = {"backend" if method == DRY_COMPILED else "mode": word}
    compiled: Any = torch.compile(program, dynamic=False, **options)

    def infer(batch: Tensor) -> Tensor:
        return compiled(batch)

    return infer
