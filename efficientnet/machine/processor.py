"""This processor -> its instruction sets."""

from functools import cache
from pathlib import Path


@cache
def cpu_features() -> frozenset[str]:
    """Return the processor's instruction sets as Linux names them, e.g. avx2, avx512_vnni.

    Empty where the system does not tell.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def has_vnni() -> bool:
    """Whether the processor adds products of 8-bit numbers up in 32 bits in one instruction.

    Without, two products of 8 bits are added up in 16 first, which overflow for large weights.
    """
    return not cpu_features().isdisjoint({"avx512_vnni", "avx_vnni"})
