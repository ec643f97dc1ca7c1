"""Numbers too small for a normal float32 -> zero, while a thread computes.

Intel's processors take some hundred cycles for an operation on such a number. On maps of nothing
else (64 channels of 96 x 96, torch, Granite Rapids, 1 thread) a depthwise convolution 3x3 took
34 ms, and 0.9 ms when they were flushed, a convolution 1x1 371 and 1.0, SiLU 39 and 0.5. A network
that is fed with what it was not trained on has them by the thousand: SiLU makes 1e-37 of -88, and
the next weight a denormal of that.
"""

import ctypes
import platform
from collections.abc import Generator
from contextlib import contextmanager

_MXCSR = slice(28, 32)
"""Where the C library's fenv_t of x86-64 holds that register."""
_FLUSH_TO_ZERO, _DENORMALS_ARE_ZERO = 1 << 15, 1 << 6

_LIBC = (
    ctypes.CDLL(None) if (platform.system(), platform.machine()) == ("Linux", "x86_64") else None
)


@contextmanager
def flushed_denormals() -> Generator[None]:
    """Let this thread, and the threads that it starts meanwhile, take denormals for zero.

    On Linux and x86-64; elsewhere nothing is changed. Takes 4 microseconds.
    """
    if _LIBC is None or not hasattr(_LIBC, "fesetenv"):
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
