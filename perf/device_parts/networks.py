"""A variant -> its eager model, CUDA graph and torch.compile's program, measured in turns."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from perf.device_parts import turns
from perf.device_parts.records import LatencyMeasured

GRAPH = "CUDA graph of eager"
COMPILED = "torch.compile max-autotune"
COMPILED_QUICKLY = "torch.compile reduce-overhead"
# Of a dry run: without the minutes of compiling.
DRY_COMPILED = "torch.compile aot_eager"

PRECISIONS = ("fp16", "bf16", "fp32")

# Without TF32 a call of more images takes a second.
MAX_SWEEP_FP32 = 64

# A larger batch that brings less is not worth its memory.
LEAST_GAIN = 1.02

NUM_WARM_UPS = 3

log = logging.getLogger(__name__)


def measure_network(bench: turns.Bench) -> Iterator[LatencyMeasured]:
    """Measure the eager model and its CUDA graph at batch 16, 1 and the best one."""
    for precision in PRECISIONS:
        program = bench.scene.program(precision)
        for case in cases_of(bench, precision, best_batch_size(bench, program, precision)):
            contenders = [eager(program)]
            if bench.scene.device.type == "cuda":
                graph = partial(captured, program, bench.scene.images, case.batch_size)
                contenders.append(turns.Contender(GRAPH, turns.DEVICE, graph))
            yield from turns.compare(bench, case, contenders)


def measure_compiled(bench: turns.Bench) -> Iterator[LatencyMeasured]:
    """Measure torch.compile's programs beside the eager model."""
    # Reduce-overhead takes a part of max-autotune's time: something is there soon.
    methods = (COMPILED_QUICKLY, COMPILED)
    for precision in PRECISIONS:
        program = bench.scene.program(precision)
        for case in cases_of(bench, precision):
            for method in (DRY_COMPILED,) if bench.order.is_dry_run else methods:
                if not is_done(bench, case, method):
                    torch.compiler.reset()
                    compiled = partial(_compiled, program, method)
                    contender = turns.Contender(method, turns.DEVICE, compiled)
                    yield from turns.compare(bench, case, [eager(program), contender])
                    turns.free_memory()
            methods = (COMPILED,)


def cases_of(bench: turns.Bench, precision: str, best: int | None = None) -> list[turns.Case]:
    """List the batch sizes of a precision: the paper's, one image, and the best.

    The best is what the network job has found where it is not given, or else a usual one.
    """
    scale, variant = bench.order.scale, bench.scene.variant
    known = [
        line.batch_size
        for line in bench.earlier
        if isinstance(line, LatencyMeasured)
        and (line.variant, line.precision, line.is_best_batch) == (variant, precision, True)
    ]
    best = best or (known or [scale.usual_best])[-1]
    sizes = dict.fromkeys((*scale.batch_sizes, best))
    return [turns.Case(precision, size, size == best) for size in sizes]


def is_done(bench: turns.Bench, case: turns.Case, method: str) -> bool:
    """Whether this job has measured it in an earlier call."""
    return any(
        isinstance(line, LatencyMeasured)
        and (line.job, line.method, line.problem) == (bench.order.job, method, None)
        and (line.precision, line.batch_size) == (case.precision, case.batch_size)
        for line in bench.earlier
    )


def best_batch_size(bench: turns.Bench, program: nn.Module, precision: str) -> int:
    """Try larger and larger batches with the eager model, until they bring nothing or don't fit."""
    best, best_rate = 1, 0.0
    for size in bench.order.scale.sweep:
        if precision == "fp32" and size > MAX_SWEEP_FP32:
            break
        try:
            found = turns.rate(program, bench.scene.batches(size), bench.order.scale.sweep_s)
        except torch.OutOfMemoryError:
            log.info("%s %s: batches of %d do not fit", bench.scene.variant, precision, size)
            break
        if found < LEAST_GAIN * best_rate:
            break
        best, best_rate = size, found
    turns.free_memory()
    return best


def eager(program: nn.Module) -> turns.Contender:
    """Return the model as it was built, channels_last, images and logits on the device."""
    return turns.Contender(turns.EAGER, turns.DEVICE, lambda: program)


def captured(
    program: Callable[[Tensor], Tensor], like: Tensor, batch_size: int
) -> Callable[[Tensor], Tensor]:
    """Capture a program as one CUDA graph, which a call copies images of the size of `like` into.

    Its logits are written anew by each call.
    """
    images = like.new_empty((batch_size, *like.shape[1:]))
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


def _compiled(program: nn.Module, method: str) -> Callable[[Tensor], Any]:
    word = method.partition(" ")[2]
    options: dict[str, Any] = {"backend" if method == DRY_COMPILED else "mode": word}
    return torch.compile(program, dynamic=False, **options)
