"""A device and a precision -> what it can do at most: GPUs from data sheets, CPUs measured.

`python -m efficientnet.measuring.peaks THREADS` measures a CPU and prints its peak; it is run as a
process of its own, because the number of threads of a matrix product is fixed when numpy is loaded.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from efficientnet.network.cost import DevicePeak

# Name in nvidia-smi's -> bytes/s, and dense operations/s by precision, from the data sheets.
# fp32 is the TF32 rate where the device has it: what torch's convolutions may use.
GPU_PEAKS: dict[str, tuple[float, dict[str, float]]] = {
    "V100": (900e9, {"fp32": 15.7e12, "fp16": 125e12}),
    "T4": (320e9, {"fp32": 8.1e12, "fp16": 65e12, "int8": 130e12}),
    "A100": (2039e9, {"fp32": 156e12, "fp16": 312e12, "bf16": 312e12, "int8": 624e12}),
    "L40S": (
        864e9,
        {"fp32": 183e12, "fp16": 362e12, "bf16": 362e12, "int8": 733e12, "fp8": 733e12},
    ),
    "L4": (300e9, {"fp32": 60e12, "fp16": 121e12, "bf16": 121e12, "int8": 242e12, "fp8": 242e12}),
    "H100": (
        3350e9,
        {"fp32": 494e12, "fp16": 989e12, "bf16": 989e12, "int8": 1979e12, "fp8": 1979e12},
    ),
    "H200": (
        4800e9,
        {"fp32": 494e12, "fp16": 989e12, "bf16": 989e12, "int8": 1979e12, "fp8": 1979e12},
    ),
}

MATRIX_SIZE = 1536
COPY_BYTES = 256_000_000
MEASURED_S = 0.7

CPU_PRECISION = "fp32"


def gpu_peak(name: str, precision: str) -> DevicePeak | None:
    """Look a GPU up by the name that nvidia-smi gives; None where it or its rate is unknown."""
    words = name.replace("-", " ").split()
    for model, (bytes_per_s, rates) in GPU_PEAKS.items():
        if model in words and precision in rates:
            return DevicePeak(rates[precision], bytes_per_s, f"data sheet of the {model}")
    return None


def cpu_peak(num_threads: int) -> DevicePeak:
    """Measure a float32 matrix product and a copy in memory, about two seconds.

    The best of all repetitions: other programs can only make it slower. For other precisions there
    is no product of numpy's, and no floor is told.
    """
    variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    answer = subprocess.run(
        [sys.executable, "-P", "-m", "efficientnet.measuring.peaks", str(num_threads)],
        env=os.environ | dict.fromkeys(variables, str(num_threads)),
        capture_output=True,
        text=True,
        check=True,
    )
    operations_per_s, bytes_per_s = json.loads(answer.stdout)
    return DevicePeak(operations_per_s, bytes_per_s, "measured: numpy's float32 product and copy")


def describe_peak(peak: DevicePeak) -> str:
    """Write a peak in words."""
    return (
        f"{peak.operations_per_s / 1e12:.3g} TFLOP/s, {peak.bytes_per_s / 1e9:.3g} GB/s "
        f"({peak.source})"
    )


def _measure(num_threads: int) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    a, b = (rng.random((MATRIX_SIZE, MATRIX_SIZE), dtype=np.float32) for _ in range(2))
    product = np.empty_like(a)
    product_s = _best_s(lambda: np.matmul(a, b, out=product))
    source = np.zeros(COPY_BYTES // 8)
    target = np.zeros_like(source)
    pieces = list(
        zip(np.array_split(source, num_threads), np.array_split(target, num_threads), strict=True)
    )
    with ThreadPoolExecutor(num_threads) as pool:
        # numpy lets go of the interpreter's lock while it copies.
        copy_s = _best_s(lambda: list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pieces)))
    return 2 * MATRIX_SIZE**3 / product_s, 2 * COPY_BYTES / copy_s


def _best_s(work: Callable[[], object]) -> float:
    work()
    best, end = float("inf"), time.perf_counter() + MEASURED_S
    while time.perf_counter() < end:
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


if __name__ == "__main__":
    print(json.dumps(_measure(int(sys.argv[1]))))
