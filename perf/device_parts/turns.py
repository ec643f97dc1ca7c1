"""Contenders at one batch size -> what each took, in turns, and whether it answers alike."""

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from efficientnet.measuring.clock import Turn, measure_turn, percentile, warm_up_until_stable
from efficientnet.measuring.turns import TimeBudget, ratio, take_turns
from perf.device_parts.gpu_watch import GpuWatch
from perf.device_parts.network_case import Scene, exact
from perf.device_parts.records import LatencyMeasured, Parity, Region, to_us

EAGER = "eager"


PACE = TimeBudget(seconds=1.0, num_turns=5, max_windows=10)
DRY_PACE = TimeBudget(seconds=0.04, num_turns=2, max_windows=10)


@dataclass(frozen=True)
class Case:
    """What contenders have alike."""

    precision: str
    batch_size: int
    is_best_batch: bool = False


@dataclass
class Contender:
    """A program that answers batches; made when its turn to be prepared comes."""

    method: str
    region: Region
    prepare: Callable[[], Callable[..., object]]
    """Returns what maps a batch to logits: tensors on the device, or arrays on the host."""
    settings: Callable[[], AbstractContextManager[object]] = exact
    """What it is prepared and called under."""
    infer: Callable[..., object] = field(default=lambda _: None, init=False)
    prepare_s: float = field(default=0.0, init=False)


def compare(
    job: str,
    scene: Scene,
    case: Case,
    contenders: Sequence[Contender],
    pace: TimeBudget,
    watch: GpuWatch,
) -> list[LatencyMeasured]:
    """Let contenders take turns; one that fails or does not fit is a record with its problem."""
    begun = time.monotonic()
    records: list[LatencyMeasured] = []
    ready: list[tuple[Contender, LatencyMeasured]] = []
    for contender in contenders:
        record = unmeasured(job, scene, case, contender.method, contender.region)
        try:
            parity = _prepare(contender, scene, case)
            update = {"parity": parity, "prepare_s": round(contender.prepare_s, 2)}
            ready.append((contender, record.model_copy(update=update)))
        # Whatever a library raises is told of this contender; the others go on.
        except Exception as error:
            records.append(record.model_copy(update={"problem": describe_error(error)}))
            free_memory()
    turns = _take_turns([contender for contender, _ in ready], scene, case, pace)
    state = watch.since(begun)
    medians = {
        (contender.method, contender.region): [turn.median_ms for turn in own]
        for (contender, _), own in zip(ready, turns, strict=True)
    }
    for (contender, record), own in zip(ready, turns, strict=True):
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
            "gpu": state,
        }
        records.append(record.model_copy(update=update))
    return records


def unmeasured(
    job: str, scene: Scene, case: Case, method: str, region: Region, problem: str | None = None
) -> LatencyMeasured:
    """Describe a contender before its turns, or without any."""
    return LatencyMeasured(
        job=job,
        variant=scene.variant,
        method=method,
        precision=case.precision,
        batch_size=case.batch_size,
        is_best_batch=case.is_best_batch,
        image_size=scene.spec.image_size,
        region=region,
        problem=problem,
    )


def rate(program: Callable[[Tensor], Tensor], batches: Sequence[Tensor], seconds: float) -> float:
    """Return images a second of a device program, roughly: after a call that does not count."""
    with torch.inference_mode(), exact():
        turn = measure_turn(_call(program, batches), time.perf_counter_ns, seconds)
    return len(batches[0]) * len(turn.samples_ms) / turn.elapsed_s


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


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _prepare(contender: Contender, scene: Scene, case: Case) -> Parity:
    begun = time.perf_counter()
    batches = _batches_of(contender, scene, case)
    with torch.inference_mode(), contender.settings():
        contender.infer = contender.prepare()
        contender.infer(batches[0])
        synchronize()
        contender.prepare_s = time.perf_counter() - begun
        answers: list[Tensor] = []
        for batch in batches:
            # A program may answer in the same memory each time.
            answers.append(torch.as_tensor(contender.infer(batch)).to("cpu", copy=True))
            if sum(map(len, answers)) >= len(scene.reference):
                break
    # Batches begin with the images in order, and repeat them where they are too few.
    return scene.parity(torch.cat(answers)[: len(scene.images)])


def _take_turns(
    contenders: Sequence[Contender], scene: Scene, case: Case, pace: TimeBudget
) -> list[list[Turn]]:
    clock = time.perf_counter_ns
    calls = [_call(c.infer, _batches_of(c, scene, case)) for c in contenders]

    def turn(index: int, _: int) -> Turn:
        with contenders[index].settings():
            return measure_turn(calls[index], clock, pace.turn_s)

    with torch.inference_mode(), contextlib.ExitStack() as stack:
        stack.callback(free_memory)
        for contender, call in zip(contenders, calls, strict=True):
            with contender.settings():
                warm_up_until_stable(call, clock, pace.window_s, pace.warm_up_s)
        return list(take_turns(range(len(contenders)), pace.num_turns, turn).values())


def _call(infer: Callable[..., object], batches: Sequence[object]) -> Callable[[], None]:
    rotated = itertools.cycle(batches)

    def call() -> None:
        infer(next(rotated))
        synchronize()

    return call


def _batches_of(contender: Contender, scene: Scene, case: Case) -> Sequence[object]:
    if contender.region == "host to host":
        return scene.host_batches(case.batch_size)
    return scene.batches(case.batch_size)
