"""A device -> the bytes a second that it copies and the operations a second of matrix products."""

import itertools
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from efficientnet.measuring.clock import measure_turn
from efficientnet.measuring.peaks import gpu_peak
from perf.device_parts.gpu_watch import GpuWatch
from perf.device_parts.plan import Order
from perf.device_parts.records import LimitMeasured, to_us
from perf.device_parts.turns import describe_error, free_memory, synchronize

COPY_BYTES = 2 * 2**30
PRODUCT_SIZES = (4096, 8192)
DRY_COPY_BYTES = 2**20
DRY_PRODUCT_SIZES = (64,)

TURN_S = 0.5
DRY_TURN_S = 0.01
MAX_SAMPLES = 200

FP8_MIN_CAPABILITY = (8, 9)

log = logging.getLogger(__name__)


def measure_limits(order: Order, watch: GpuWatch) -> Iterator[LimitMeasured]:
    """Measure copies and products; one that the device or torch refuses is told in the log."""
    device = torch.device("cpu" if order.is_dry_run else "cuda")
    seconds = DRY_TURN_S if order.is_dry_run else TURN_S
    name = "" if order.is_dry_run else torch.cuda.get_device_name()
    for what, num_bytes, make in _copies(device, order.is_dry_run):
        begun = time.monotonic()
        samples_ms = _measure(make, seconds)
        free_memory()
        peak = gpu_peak(name, "fp16")
        sheet = peak.bytes_per_s if peak and what.startswith("copy on") else None
        yield _record(what, "bytes/s", num_bytes, samples_ms, sheet, watch, begun)
    sizes = DRY_PRODUCT_SIZES if order.is_dry_run else PRODUCT_SIZES
    for kind, size in itertools.product(_kinds(device), sizes):
        begun = time.monotonic()
        try:
            samples_ms = _measure(
                lambda kind=kind, size=size: _product(kind, size, device), seconds
            )
        # What an older device or another torch raises for a format that it has not got.
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            log.warning("%s products are left out: %s", kind, describe_error(error))
            continue
        finally:
            free_memory()
        peak = gpu_peak(name, {"fp32 as TF32": "fp32"}.get(kind, kind)) if kind != "fp32" else None
        yield _record(
            f"{kind} product of {size} x {size}",
            "operations/s",
            2 * size**3,
            samples_ms,
            peak.operations_per_s if peak else None,
            watch,
            begun,
        )


def _measure(make: Callable[[], Callable[[], object]], seconds: float) -> list[float]:
    work = make()

    def call() -> None:
        work()
        synchronize()

    call()
    return list(measure_turn(call, time.perf_counter_ns, seconds).samples_ms)


def _copies(
    device: torch.device, is_dry_run: bool
) -> Iterator[tuple[str, int, Callable[[], Callable[[], object]]]]:
    count = DRY_COPY_BYTES if is_dry_run else COPY_BYTES

    def within() -> Callable[[], object]:
        source = torch.randint(256, (count,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    yield "copy on the device, bytes read and written", 2 * count, within
    if device.type != "cuda":
        return
    part = count // 8

    def across(is_up: bool) -> Callable[[], object]:
        host = torch.empty(part, dtype=torch.uint8, pin_memory=True)
        near = torch.empty(part, dtype=torch.uint8, device=device)
        target, source = (near, host) if is_up else (host, near)
        return lambda: target.copy_(source, non_blocking=True)

    yield "copy host to device, pinned", part, lambda: across(True)
    yield "copy device to host, pinned", part, lambda: across(False)


def _kinds(device: torch.device) -> list[str]:
    kinds = ["bf16", "fp16", "fp32"]
    if device.type == "cuda":
        kinds.append("fp32 as TF32")
        if torch.cuda.get_device_capability() >= FP8_MIN_CAPABILITY:
            kinds.insert(2, "fp8")
        else:
            log.warning("fp8 products are left out: the device has none (below 8.9)")
    return kinds


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


def _record(
    what: str,
    unit: str,
    amount: int,
    samples_ms: list[float],
    data_sheet: float | None,
    watch: GpuWatch,
    begun: float,
) -> LimitMeasured:
    return LimitMeasured(
        what=what,
        unit=unit,  # pyright: ignore[reportArgumentType]
        best=1e3 * amount / min(samples_ms),
        median=1e3 * amount / statistics.median(samples_ms),
        data_sheet=data_sheet,
        samples_us=to_us(samples_ms[:MAX_SAMPLES]),
        gpu=watch.since(begun),
    )
