"""The settings of pytest: whatever hangs or dies in a test ends the run and is named."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BODIES = {
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "deadlocked": "import threading; x = threading.Lock(); x.acquire(); x.acquire()",
}


@pytest.mark.parametrize("ending", BODIES)
def test_a_test_that_never_returns_ends_the_run_with_its_name(ending: str, tmp_path: Path):
    # More files than workers, and tests of its own left over: pytest-xdist waited for those.
    (tmp_path / "test_0.py").write_text(
        f"def test_ending(): {BODIES[ending]}\ndef test_a(): pass\ndef test_b(): pass\n"
    )
    for number in range(1, 5):
        (tmp_path / f"test_{number}.py").write_text("def test_c(): pass\ndef test_d(): pass\n")
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml")]
    command += ["--rootdir", str(tmp_path), "-p", "no:cacheprovider", "-n", "2"]
    command += ["--dist", "loadfile", "-o", "faulthandler_timeout=2", str(tmp_path)]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1
    assert "FAILED test_0.py::test_ending" in done.stdout
