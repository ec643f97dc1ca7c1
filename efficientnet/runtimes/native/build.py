"""The native engine's C++ sources -> _engine.so beside them, with all instruction sets in it.

    python -m efficientnet.runtimes.native.build

Also what hatchling's build hook runs (hatch_build.py): it imports nothing but the standard library.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = HERE / "_engine.so"

COMMON_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-pthread",
    "-Wall",
    "-Wextra",
    # GCC 12 warns of what its own headers leave undefined on purpose.
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
]

# The C++ library goes inside: images for serving may have none. What nobody calls is left out,
# and with it calls that only the newest C libraries have.
LINK_FLAGS = ("-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL", "-Wl,--gc-sections")

# Source -> what its kernels may use beyond the processor's oldest instructions; only on x86-64.
AVX512 = "-mavx2 -mfma -mavx512f -mavx512dq -mavx512bw -mavx512vl -mavx512vnni"
AVX512_VBMI = f"{AVX512} -mavx512vbmi"
AVX512_BF16 = f"{AVX512_VBMI} -mavx512bf16"
X86_KERNELS = {
    "amx.cpp": f"{AVX512_BF16} -mamx-tile -mamx-int8 -mamx-bf16",
    "avx512_bf16.cpp": AVX512_BF16,
    "avx512_vbmi.cpp": AVX512_VBMI,
    "avx512_vnni.cpp": AVX512,
    "avx_vnni.cpp": "-mavx2 -mfma -mavxvnni",
}


class BuildError(Exception):
    """There is no compiler, or it refuses the sources."""


def find_compiler() -> str | None:
    """Return the C++ compiler's path ($CXX, g++, c++ or clang++), None where there is none."""
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["g++", "c++", "clang++"]:
        found = shutil.which(shlex.split(name)[0])
        if found:
            return found
    return None


def sources() -> list[Path]:
    """Return the C++ files, in order."""
    return sorted(path for path in HERE.iterdir() if path.suffix in (".cpp", ".h"))


def build(library: Path = LIBRARY, extra_flags: tuple[str, ...] = ()) -> Path:
    """Compile the sources into `library`, unless it was made from the same ones; return it.

    Raises:
        BuildError: no compiler, or an error of its own.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(
            "no C++ compiler (g++, c++ or clang++) was found: install one, e.g. 'apt-get install "
            "g++', and run 'python -m efficientnet.runtimes.native.build'"
        )
    flags = [*COMMON_FLAGS, *extra_flags]
    stamp = _stamp(compiler, flags)
    stamp_file = library.with_suffix(".stamp")
    if library.is_file() and stamp_file.is_file() and stamp_file.read_text() == stamp:
        library.touch()  # make compares times
        return library
    units = [path for path in sources() if path.suffix == ".cpp"]
    if platform.machine() not in ("x86_64", "AMD64"):
        units = [path for path in units if path.name not in X86_KERNELS]
    with tempfile.TemporaryDirectory() as temporary:
        objects = [Path(temporary) / f"{path.stem}.o" for path in units]

        def compile_one(unit: Path, out: Path) -> None:
            own = X86_KERNELS.get(unit.name, "").split()
            _run([compiler, *flags, *own, "-c", str(unit), "-o", str(out)])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(compile_one, units, objects):
                pass
        linked = Path(temporary) / library.name
        _run([compiler, *flags, *LINK_FLAGS, "-shared", *map(str, objects), "-o", str(linked)])
        # Beside the library first: a rename within a file system is never seen half done.
        staged = library.with_name(f".{library.name}.{os.getpid()}")
        shutil.copyfile(linked, staged)
        staged.replace(library)
    stamp_file.write_text(stamp)
    return library


def _stamp(compiler: str, flags: list[str]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256(
        repr((version, flags, LINK_FLAGS, X86_KERNELS, platform.machine())).encode()
    )
    for path in sources():
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise BuildError(f"{shlex.join(command)}\n{result.stderr.strip()}")
    if result.stderr:
        print(result.stderr, file=sys.stderr, end="")


if __name__ == "__main__":
    try:
        print(build())
    except BuildError as error:
        sys.exit(f"error: {error}")
