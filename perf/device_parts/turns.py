"""Contenders at one batch size -> what each took, in turns, and whether it answers alike."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from efficientnet.measuring.clock import Turn, measure_turn, percentile, warm_up_until_stable
from efficientnet.measuring.turns import ratio, take_turns
from perf.device_parts.gpu_watch import GpuWatch
from perf.device_parts.network_case import Scene, exact
from perf.device_parts.order import Order
from perf.device_parts.records import LatencyMeasured, Line, Parity, Region, to_us

EAGER = "eager"
DEVICE: Region = "device to device"
HOST: Region = "host to host"

Infer = Callable[..., object]


@dataclass(frozen=True)
class Bench:
    """What the programs of a job are measured with."""

    order: Order
    scene: Scene
    watch: GpuWatch
    earlier: Sequence[Line] = ()
    """What was measured before this job."""


@dataclass(frozen=True)
class Case:
    """What contenders have alike."""

    precision: str
    batch_size: int
    is_best_batch: bool = False


@dataclass(frozen=True)
class Contender:
    """A program that answers batches; made when its turn to be prepared comes."""

    method: str
    region: Region
    prepare: Callable[[], Infer]
    """Returns what maps a batch to logits: tensors on the device, or arrays on the host."""
    settings: Callable[[], AbstractContextManager[object]] = exact
    """What it is prepared and called under."""


def compare(bench: Bench, case: Case, contenders: Sequence[Contender]) -> list[LatencyMeasured]:
    """Let contenders take turns; one that fails or does not fit is a record with its problem."""
    begun, clock, pace = time.monotonic(), time.perf_counter_ns, bench.order.scale.pace
    failed: list[LatencyMeasured] = []
    ready: dict[Contender, tuple[Callable[[], None], LatencyMeasured]] = {}
    for contender in contenders:
        record = unmeasured(bench, case, contender.method, contender.region)
        try:
            ready[contender] = _prepare(contender, bench.scene, record)
        # Whatever a library raises is told of this contender; the others go on.
        except Exception as error:
            failed.append(record.model_copy(update={"problem": describe_error(error)}))
            free_memory()

    def turn(contender: Contender, _: int) -> Turn:
        with contender.settings():
            return measure_turn(ready[contender][0], clock, pace.turn_s)

    with torch.inference_mode():
        for contender, (call, _) in ready.items():
            with contender.settings():
                warm_up_until_stable(call, clock, pace.window_s, pace.warm_up_s)
        turns = take_turns(ready, pace.num_turns, turn)
    free_memory()
    gpu = bench.watch.since(begun)
    medians = {
        (contender.method, contender.region): [turn.median_ms for turn in own]
        for contender, own in turns.items()
    }
    measured: list[LatencyMeasured] = []
    for contender, own in turns.items():
        samples = [sample for turn in own for sample in turn.samples_ms]
        eager = medians.get((EAGER, contender.region))
        own_medians = medians[contender.method, contender.region]
        elapsed_s = sum(turn.elapsed_s for turn in own)
        update = {
            "turns_us": tuple(to_us(turn.samples_ms) for turn in own),
            "p50_ms": round(statistics.median(samples), 4),
            "p90_ms": percentile(samples, 90),
            "num_calls": len(samples),
            "images_per_s": round(case.batch_size * len(samples) / elapsed_s, 1),
            "of_eager": round(ratio(own_medians, eager).median, 4) if eager else None,
            "gpu": gpu,
        }
        measured.append(ready[contender][1].model_copy(update=update))
    return failed + measured


def unmeasured(
    bench: Bench, case: Case, method: str, region: Region, problem: str | None = None
) -> LatencyMeasured:
    """Describe a contender before its turns, or without any."""
    return LatencyMeasured(
        job=bench.order.job,
        variant=bench.scene.variant,
        method=method,
        precision=case.precision,
        batch_size=case.batch_size,
        is_best_batch=case.is_best_batch,
        image_size=bench.scene.spec.image_size,
        region=region,
        problem=problem,
    )


def rate(program: Infer, batches: Sequence[Tensor], seconds: float) -> float:
    """Return images a second of a device program, roughly: after a call that does not count."""
    with torch.inference_mode(), exact():
        turn = measure_turn(rotating(program, batches), time.perf_counter_ns, seconds)
    return len(batches[0]) * len(turn.samples_ms) / turn.elapsed_s


def rotating(infer: Infer, batches: Sequence[object]) -> Callable[[], None]:
    """Make a call of one batch after the other, which waits for the GPU where there is one."""
    rotated = itertools.cycle(batches)

    def call() -> None:
        infer(next(rotated))
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return call


def free_memory() -> None:
    """Give back what torch keeps of the GPU's memory."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def describe_error(error: Exception) -> str:
    """Tell an error in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {str(error).partition('.')[0]}"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()[:300] if lines else 'without a message'}"


def _prepare(
    contender: Contender, scene: Scene, record: LatencyMeasured
) -> tuple[Callable[[], None], LatencyMeasured]:
    # Its call, and how long it took to get it ready, and how it answers.
    begun = time.perf_counter()
    on_host = contender.region == HOST
    batches = (scene.host_batches if on_host else scene.batches)(record.batch_size)
    with torch.inference_mode(), contender.settings():
        infer = contender.prepare()
        rotating(infer, batches)()
        prepare_s = time.perf_counter() - begun
        answers: list[Tensor] = []
        # A program may answer in the same memory each time. Batches begin with the images in order.
        for batch in batches[: -(-len(scene.reference) // record.batch_size)]:
            answers.append(torch.as_tensor(infer(batch)).to("cpu", copy=True))
    parity = scene.parity(torch.cat(answers)[: len(scene.images)])
    facts: dict[str, float | Parity] = {"parity": parity, "prepare_s": round(prepare_s, 2)}
    return rotating(infer, batches), record.model_copy(update=facts)
