"""A device and a precision -> what it can do at most: GPUs from data sheets, CPUs measured."""

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable

from efficientnet.network.cost import DevicePeak
from efficientnet.precision import Precision

# Words of the name that nvidia-smi gives, all of which must be in it -> GB/s, and dense TFLOP/s by
# precision, from the data sheets. One chip is sold in several forms, whose clocks and memories
# differ: a form that is not here has no peak. fp32 is the TF32 rate where the device has it: what
# torch's convolutions may use.
RATES: tuple[str, ...] = ("fp32", "fp16", "bf16", "int8", "fp8")
GPU_PEAKS: dict[str, tuple[float, tuple[float | None, ...]]] = {
    "V100 SXM2": (900, (15.7, 125)),
    "V100 PCIE": (900, (14, 112)),
    "T4": (320, (8.1, 65, None, 130)),
    "A100 SXM4 40GB": (1555, (156, 312, 312, 624)),
    "A100 SXM4 80GB": (2039, (156, 312, 312, 624)),
    "A100 PCIE 40GB": (1555, (156, 312, 312, 624)),
    "A100 PCIE 80GB": (1935, (156, 312, 312, 624)),
    "L40S": (864, (183, 362, 362, 733, 733)),
    "L4": (300, (60, 121, 121, 242, 242)),
    "H100 80GB HBM3": (3350, (494, 989, 989, 1979, 1979)),
    "H100 PCIE": (2000, (378, 756, 756, 1513, 1513)),
    "H100 NVL": (3900, (417, 835, 835, 1671, 1671)),
    "H200": (4800, (494, 989, 989, 1979, 1979)),
    "H200 NVL": (4800, (417, 835, 835, 1671, 1671)),
}

# A part of a GPU has a part of its peak.
SLICE = "MIG"

# Precision -> what its programs may compute in, too: of layers that are kept, or where a library
# has no kernels for it.
COMPUTED_IN: dict[Precision, tuple[Precision, ...]] = {
    "fp32": ("fp32",),
    "bf16": ("bf16", "fp32"),
    "fp16": ("fp16", "fp32"),
    "int8": ("int8", "bf16", "fp32"),
}

# Would keep a library from what the processor can do; the limit is the machine's.
LIMITING_VARIABLES = (
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "OPENBLAS_CORETYPE",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_DEBUG_CPU_TYPE",
)
# Some seconds on an idle machine.
MAX_MEASURED_S = 120

log = logging.getLogger(__name__)

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def gpu_peak(name: str, precision: str) -> DevicePeak | None:
    """Look a GPU up by the name that nvidia-smi gives; None where it or its rate is unknown."""
    words = set(name.upper().replace("-", " ").split())
    matching = [model for model in GPU_PEAKS if words.issuperset(model.split())]
    if not matching or SLICE in words:
        return None
    model = max(matching, key=len)
    gb_per_s, rates = GPU_PEAKS[model]
    tflop_per_s = dict(zip(RATES, rates, strict=False)).get(precision)
    if tflop_per_s is None:
        return None
    return DevicePeak(1e12 * tflop_per_s, 1e9 * gb_per_s, f"data sheet of the {model}")


def cpu_peaks(num_threads: int, precisions: Iterable[Precision]) -> dict[Precision, DevicePeak]:
    """Measure products and a copy in memory, some seconds; see cpu_peak.py.

    The fastest of several libraries and shapes, and of all repetitions: whatever else runs can only
    make it slower. A precision that no processor computes in has no peak.
    """
    asked: list[Precision] = [
        precision for precision in dict.fromkeys(precisions) if precision in COMPUTED_IN
    ]
    if not asked:
        return {}
    measured = dict.fromkeys(kind for precision in asked for kind in COMPUTED_IN[precision])
    found = _measure(num_threads, "copy", *measured)
    bytes_per_s = found["copy"][0]
    peaks: dict[Precision, DevicePeak] = {}
    for precision in asked:
        kinds = [kind for kind in COMPUTED_IN[precision] if kind in found]
        fastest = max(kinds, key=lambda kind: found[kind][0])
        operations_per_s, what = found[fastest]
        in_kind = "" if fastest == precision else f" in {fastest}"
        peaks[precision] = DevicePeak(operations_per_s, bytes_per_s, f"measured: {what}{in_kind}")
    return peaks


def cpu_cache_bytes_per_s(num_threads: int) -> float:
    """Measure a copy within the second caches, read and written bytes together."""
    return _measure(num_threads, "cache")["cache"][0]


def _measure(num_threads: int, *asked: str) -> dict[str, tuple[float, str]]:
    variables = os.environ | dict.fromkeys(THREAD_VARIABLES, str(num_threads))
    environment = {name: v for name, v in variables.items() if name not in LIMITING_VARIABLES}
    # Into a file: a pipe would be waited for until all that inherited it have ended.
    command = [sys.executable, "-P", "-m", "efficientnet.measuring.cpu_peak"]
    command += [str(num_threads), *asked]
    for is_last in (False, True):
        with tempfile.TemporaryFile("w+", encoding="utf-8") as answer:
            try:
                subprocess.run(
                    command, env=environment, stdout=answer, check=True, timeout=MAX_MEASURED_S
                )
            except subprocess.TimeoutExpired:
                # Seen once, beside a full suite of tests, and not found out why.
                log.warning("measuring the CPU's peak has not ended in %d s", MAX_MEASURED_S)
                if is_last:
                    raise
                continue
            answer.seek(0)
            return json.load(answer)
    raise AssertionError


def describe_peak(peak: DevicePeak) -> str:
    """Write a peak in words."""
    return (
        f"{peak.operations_per_s / 1e12:.3g} TFLOP/s, {peak.bytes_per_s / 1e9:.3g} GB/s "
        f"({peak.source})"
    )
