import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = ["training", "export", "serving", "perf"]


@pytest.mark.parametrize("stage", STAGES)
def test_no_file_of_a_command_folder_shadows_a_library(stage: str):
    # `python stage/file.py` puts the folder first on the path: export/onnx.py would replace onnx.
    installed = set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names)
    ours = {path.stem for path in (ROOT / stage).iterdir() if path.suffix == ".py"}
    assert not (ours - {"__init__"}) & installed


def test_no_test_folder_replaces_a_stage():
    assert not [path for path in (ROOT / "tests").iterdir() if path.name in STAGES]


def test_import_contracts_hold():
    program = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run(
        [program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_every_pinned_package_of_the_bento_has_the_version_of_the_constraints():
    pinned = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", read("constraints.txt"), re.M))
    packages = re.findall(r"^\s*- ([A-Za-z0-9_.-]+)==(\S+)$", read("bentofile.yaml"), re.M)
    assert len(packages) >= 5
    assert {name: pinned[name] for name, _ in packages} == dict(packages)


def test_the_makefile_has_at_most_thirteen_targets():
    targets = re.findall(r"^([a-z][a-z-]*):", read("Makefile"), re.M)
    assert len(targets) == len(set(targets)) <= 13


def test_no_committed_file_tells_of_the_machine_it_was_written_on():
    listing = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    home = re.compile(rb"(/home/|/Users/|/root/|index-url)")
    for name in listing.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".toml", ".txt", ".md", ".yaml", ".html", ".jsonl", ""):
            assert not home.search(path.read_bytes()) or path == Path(__file__), name


def read(name: str) -> str:
    return (ROOT / name).read_text()
