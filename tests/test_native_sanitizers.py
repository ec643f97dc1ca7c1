import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from efficientnet.runtimes.native import build

DRIVER = Path(__file__).with_name("native_kernels.cpp")

# Enough optimization that the kernels' registers fit; no recovery, so that a finding is a failure.
FLAGS = ["-std=c++17", "-O1", "-g1", "-pthread", "-Wno-maybe-uninitialized", "-ffp-contract=off"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = build.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    units = [path for path in build.sources() if path.suffix == ".cpp"]
    if platform.machine() not in ("x86_64", "AMD64"):
        units = [path for path in units if path.name not in build.X86_KERNELS]
    directory = tmp_path_factory.mktemp("native")
    common = [compiler, *FLAGS, *SANITIZERS]

    def compile_one(unit: Path) -> str:
        own = build.X86_KERNELS.get(unit.name, "").split()
        out = directory / f"{unit.stem}.o"
        include = f"-I{build.HERE}"
        subprocess.run([*common, *own, include, "-c", unit, "-o", out], check=True)
        return str(out)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*units, DRIVER]))
    program = directory / "driver"
    subprocess.run([*common, *objects, "-o", program], check=True)
    return program


@pytest.mark.slow
def test_kernels_of_all_levels_agree_and_keep_to_their_memory(driver: Path):
    result = subprocess.run([driver, "60", "0"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
