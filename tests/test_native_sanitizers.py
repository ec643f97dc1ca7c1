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

# Of a test: on a busy machine, sixty take longer than a test may.
NUM_NETWORKS = 10

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


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_driver(tmp_path_factory.mktemp("driver"), is_emulated=False)


@pytest.fixture(scope="module")
def emulated_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_driver(tmp_path_factory.mktemp("emulated"), is_emulated=True)


def drive(driver: Path, seed: int) -> str:
    """Let NUM_NETWORKS random networks through; return what the driver says of them."""
    result = subprocess.run([driver, str(NUM_NETWORKS), str(seed)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(0, 60, NUM_NETWORKS))
def test_kernels_of_all_levels_agree_and_keep_to_their_memory(driver: Path, seed: int):
    drive(driver, seed)


@pytest.mark.slow
@pytest.mark.skipif(not is_x86, reason="the kernels beside the portable ones are for x86-64")
@pytest.mark.parametrize("seed", range(1000, 1020, NUM_NETWORKS))
def test_kernels_for_other_processors_agree_where_their_instructions_are_emulated(
    emulated_driver: Path, seed: int
):
    levels = drive(emulated_driver, seed)
    assert "avx_vnni" in levels
    if "avx512vbmi" in cpu_features():
        assert "amx avx512_bf16" in levels
