"""A level of the native engine and a number of threads -> what its instructions do in a second."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, get_args

from efficientnet.runtimes.native.engine import levels, load_library

Work = Literal["int8", "bf16", "instructions"]
WORK: tuple[Work, ...] = get_args(Work)

# Of 0.4 to 6 ms each; the best counts.
PEAK_REPEATS = 30


def peak_per_s(work: Work, num_threads: int, level: str) -> float:
    """Measure what a level's instructions do at most, from registers alone, in several threads.

    `work`: multiply-adds of int8 or bf16, or vector instructions, which are counted. What the
    threads did together is divided by the longest time.
    """
    measure = load_library().engine_peak

    def one(_: int) -> tuple[float, float]:
        seconds = ctypes.c_double()
        done = measure(level.encode(), WORK.index(work), ctypes.byref(seconds))
        if done < 0:
            raise ValueError(f"no fast kernels {level!r} here: {', '.join(levels())}")
        return done, seconds.value

    best = 0.0
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(PEAK_REPEATS):
            done, seconds = zip(*pool.map(one, range(num_threads)), strict=True)
            best = max(best, sum(done) / max(seconds))
    return best
