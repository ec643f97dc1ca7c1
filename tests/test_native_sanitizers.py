import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from efficientnet.machine.processor import cpu_features
from efficientnet.runtimes.native import build

HERE = Path(__file__).parent
DRIVER, EMULATION = HERE / "native_kernels.cpp", HERE / "native_emulation.cpp"

# Enough optimization that the kernels' registers fit; no recovery, so that a finding is a failure.
FLAGS = ["-std=c++17", "-O1", "-g1", "-pthread", "-Wno-maybe-uninitialized", "-ffp-contract=off"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

# Instruction sets that are emulated -> what tells the kernels that they are there.
EMULATED = {
    "-mavx512vnni": None,
    "-mavxvnni": None,
    "-mavx512bf16": "-DEMULATES_BF16",
    "-mamx-tile": "-DEMULATES_TILES",
    "-mamx-int8": None,
    "-mamx-bf16": None,
}

is_x86 = platform.machine() in ("x86_64", "AMD64")


def build_driver(directory: Path, is_emulated: bool) -> Path:
    """Compile the engine with what drives it, for this processor's instructions or emulated."""
    compiler = build.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    units = [path for path in build.sources() if path.suffix == ".cpp"]
    if not is_x86:
        units = [path for path in units if path.name not in build.X86_KERNELS]
    if is_emulated:
        units = [EMULATION, *(path for path in units if path.name != "levels.cpp")]
    common = [compiler, *FLAGS, *SANITIZERS, f"-I{build.HERE}"]

    def compile_one(unit: Path) -> str:
        own = build.X86_KERNELS.get(unit.name, "").split()
        if is_emulated and own:
            told = [EMULATED[flag] for flag in own if EMULATED.get(flag)]
            own = [flag for flag in own if flag not in EMULATED]
            own += [*filter(None, told), "-include", str(EMULATION.with_suffix(".h"))]
        out = directory / f"{unit.stem}.o"
        subprocess.run([*common, *own, "-c", unit, "-o", out], check=True)
        return str(out)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*units, DRIVER]))
    program = directory / "driver"
    subprocess.run([*common, *objects, "-o", program], check=True)
    return program


@pytest.mark.slow
def test_kernels_of_all_levels_agree_and_keep_to_their_memory(tmp_path: Path):
    driver = build_driver(tmp_path, is_emulated=False)
    result = subprocess.run([driver, "60", "0"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.skipif(not is_x86, reason="the kernels beside the portable ones are for x86-64")
def test_kernels_for_other_processors_agree_where_their_instructions_are_emulated(tmp_path: Path):
    driver = build_driver(tmp_path, is_emulated=True)
    result = subprocess.run([driver, "20", "1000"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "avx_vnni" in result.stdout
    if "avx512vbmi" in cpu_features():
        assert "amx avx512_bf16" in result.stdout
