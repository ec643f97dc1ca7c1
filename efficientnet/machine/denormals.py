"""Numbers too small for a normal float32 -> zero, while a thread computes.

Intel's processors take some hundred cycles for an operation on such a number. On maps of nothing
else (64 channels of 96 x 96, torch, Granite Rapids, 1 thread) a depthwise convolution 3x3 took
34 ms, and 0.9 ms when they were flushed, a convolution 1x1 371 and 1.0, SiLU 39 and 0.5. A network
that is fed with what it was not trained on has them by the thousand: SiLU makes 1e-37 of -88, and
the next weight a denormal of that. What whole networks lose: python perf/denormals.py.
"""

import ctypes
import platform
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

_MXCSR = slice(28, 32)
"""Where the C library's fenv_t of x86-64 holds that register."""
_FLUSH_TO_ZERO, _DENORMALS_ARE_ZERO = 1 << 15, 1 << 6

_LIBC = (
    ctypes.CDLL(None) if (platform.system(), platform.machine()) == ("Linux", "x86_64") else None
)

_SMALLEST_NORMAL, _ALL_BUT_SIGN = 0x00800000, 0x7FFFFFFF
"""Bits of float32."""

_are_kept = False


def count_denormals(values: NDArray[np.float32]) -> int:
    """Count them by their bits: where they are taken for zero, a comparison takes them for it."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32) & _ALL_BUT_SIGN
    return int(np.count_nonzero((bits > 0) & (bits < _SMALLEST_NORMAL)))


def keep_denormals() -> None:
    """Flush none from now on in this process, to measure what they cost; before programs open."""
    global _are_kept
    _are_kept = True


def are_flushed() -> bool:
    """Whether runtimes with a switch of their own for their threads should flush."""
    return not _are_kept


@contextmanager
def flushed_denormals() -> Generator[None]:
    """Let this thread, and the threads that it starts meanwhile, take denormals for zero.

    On Linux and x86-64; elsewhere nothing is changed. Takes 4 microseconds.
    """
    if _are_kept or _LIBC is None or not hasattr(_LIBC, "fesetenv"):
        yield
        return
    environment = ctypes.create_string_buffer(64)
    _LIBC.fegetenv(environment)
    before = environment.raw
    mxcsr = int.from_bytes(before[_MXCSR], "little") | _FLUSH_TO_ZERO | _DENORMALS_ARE_ZERO
    environment[_MXCSR] = mxcsr.to_bytes(4, "little")  # pyright: ignore[reportArgumentType]
    _LIBC.fesetenv(environment)
    try:
        yield
    finally:
        _LIBC.fesetenv(before)
