"""A device -> the bytes a second that it copies and the operations a second of matrix products."""

import itertools
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch

from efficientnet.measuring.clock import measure_turn
from efficientnet.measuring.peaks import gpu_peak
from perf.device_parts.gpu_watch import GpuWatch
from perf.device_parts.order import Order
from perf.device_parts.records import LimitMeasured, to_us
from perf.device_parts.turns import describe_error, free_memory, rotating

MAX_SAMPLES = 200

FP8_MIN_CAPABILITY = (8, 9)

log = logging.getLogger(__name__)


class Limit(NamedTuple):
    """What is measured."""

    what: str
    unit: Literal["bytes/s", "operations/s"]
    amount: int
    """Of a call, in the unit."""
    data_sheet: float | None
    make: Callable[[], Callable[[], object]]
    """Returns the call."""


def measure_limits(order: Order, watch: GpuWatch) -> Iterator[LimitMeasured]:
    """Measure copies and products; one that the device or torch refuses is told in the log."""
    device, scale = torch.device(order.scale.device), order.scale
    copies, products = _copies(device, scale.copy_bytes), _products(device, scale.product_sizes)
    for limit in itertools.chain(copies, products):
        begun = time.monotonic()
        try:
            samples_ms = _samples_ms(limit, scale.limit_s)
        # What an older device or another torch raises for a format that it has not got.
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            log.warning("%s is left out: %s", limit.what, describe_error(error))
            continue
        finally:
            free_memory()
        yield LimitMeasured(
            what=limit.what,
            unit=limit.unit,
            best=1e3 * limit.amount / min(samples_ms),
            median=1e3 * limit.amount / statistics.median(samples_ms),
            data_sheet=limit.data_sheet,
            samples_us=to_us(samples_ms[:MAX_SAMPLES]),
            gpu=watch.since(begun),
        )


def _samples_ms(limit: Limit, seconds: float) -> tuple[float, ...]:
    work = limit.make()
    call = rotating(lambda _: work(), [None])
    return measure_turn(call, time.perf_counter_ns, seconds).samples_ms


def _copies(device: torch.device, count: int) -> Iterator[Limit]:
    def within() -> Callable[[], object]:
        source = torch.randint(256, (count,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    what = "copy on the device, bytes read and written"
    peak = gpu_peak(_name(device), "fp16")
    yield Limit(what, "bytes/s", 2 * count, peak.bytes_per_s if peak else None, within)
    if device.type != "cuda":
        return
    part = count // 8

    def across(is_up: bool) -> Callable[[], object]:
        host = torch.empty(part, dtype=torch.uint8, pin_memory=True)
        near = torch.empty(part, dtype=torch.uint8, device=device)
        target, source = (near, host) if is_up else (host, near)
        return lambda: target.copy_(source, non_blocking=True)

    yield Limit("copy host to device, pinned", "bytes/s", part, None, lambda: across(True))
    yield Limit("copy device to host, pinned", "bytes/s", part, None, lambda: across(False))


def _products(device: torch.device, sizes: tuple[int, ...]) -> Iterator[Limit]:
    # Precision of the data sheet, where it has this kind.
    kinds: dict[str, str | None] = {"bf16": "bf16", "fp16": "fp16", "fp32": None}
    if device.type == "cuda":
        kinds["fp32 as TF32"] = "fp32"
        if torch.cuda.get_device_capability() >= FP8_MIN_CAPABILITY:
            kinds["fp8"] = "fp8"
        else:
            log.warning("fp8 products are left out: the device has none (below 8.9)")
    for (kind, precision), size in itertools.product(kinds.items(), sizes):
        what = f"{kind} product of {size} x {size}"
        peak = gpu_peak(_name(device), precision) if precision else None
        sheet = peak.operations_per_s if peak else None
        yield Limit(
            *(what, "operations/s", 2 * size**3, sheet),
            lambda kind=kind, size=size: _product(kind, size, device),
        )


def _product(kind: str, size: int, device: torch.device) -> Callable[[], object]:
    # Random values: zeros would take less power, and clocks would be higher.
    shape = (size, size)
    left, right = (torch.randn(shape, device=device) for _ in range(2))
    if kind == "fp8":
        one = torch.ones((), device=device)
        a = left.to(torch.float8_e4m3fn)
        # cuBLAS takes the second factor by columns.
        b = right.to(torch.float8_e4m3fn).t().contiguous().t()
        multiply: Any = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
        return lambda: multiply(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind, torch.float32)
    a, b = left.to(dtype), right.to(dtype)
    out = torch.empty(shape, dtype=dtype, device=device)
    torch.set_float32_matmul_precision("high" if kind == "fp32 as TF32" else "highest")
    return lambda: torch.mm(a, b, out=out)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else ""
