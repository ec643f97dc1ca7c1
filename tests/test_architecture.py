import importlib.metadata
import re
import subprocess
import sys
import tomllib
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


def test_every_command_and_room_has_its_place_in_the_contracts():
    contracts = tomllib.loads(read("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    rooms = {c["containers"][0]: c for c in contracts if "containers" in c}
    assert rooms.keys() == {"efficientnet", "training", "export", "perf"}
    for stage, contract in rooms.items():
        placed = {name for layer in contract["layers"] for name in re.findall(r"\w+", layer)}
        there = {path.parent.name for path in (ROOT / stage).glob("*/__init__.py")}
        if stage in STAGES:
            there |= {path.stem for path in (ROOT / stage).glob("*.py")} - {"__init__"}
        assert placed == there, stage


def test_the_tables_of_the_architecture_are_the_files_first_lines():
    sections = re.findall(r"^### `(\w+)/`(.*?)(?=^##)", read("docs/architecture.md"), re.M | re.S)
    assert {stage for stage, _ in sections} == {"efficientnet", *STAGES}
    for stage, text in sections:
        written = dict(re.findall(r"^\| `(\w+)(?:/|\.py)` \| (.*) \|$", text, re.M))
        files = [(path.parent.name, path) for path in (ROOT / stage).glob("*/__init__.py")]
        if stage == "serving":
            files = [(p.stem, p) for p in (ROOT / stage).glob("[!_]*.py")]
            assert written.pop("page")
        first = {name: path.read_text().splitlines()[0].strip('"') for name, path in files}
        assert written == first, stage


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
