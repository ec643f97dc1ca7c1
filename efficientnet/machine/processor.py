"""This machine's processor -> the instruction sets that it has."""

from functools import cache
from pathlib import Path

# What decides how fast a network runs -> what Linux calls the instructions, any of which will do.
INSTRUCTION_SETS = {
    "avx2": {"avx2"},
    "avx512": {"avx512f"},
    "vnni": {"avx512_vnni", "avx_vnni"},
    "bf16": {"avx512_bf16", "amx_bf16"},
    "amx": {"amx_tile"},
}


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


def instruction_sets() -> tuple[str, ...]:
    """Return which of INSTRUCTION_SETS the processor has, in their order."""
    found = cpu_features()
    return tuple(name for name, any_of in INSTRUCTION_SETS.items() if any_of & found)


def has_vnni() -> bool:
    """Whether the processor adds products of 8-bit numbers up in 32 bits in one instruction.

    Without, two products of 8 bits are added up in 16 first, which overflow for large weights.
    """
    return "vnni" in instruction_sets()
