import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import COMMANDS, ROOT, help_of_all, run
from facts import require_named


def run_program(program: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples_line_by_line_without_loading_torch(command: str):
    text, has_torch = help_of_all()[command]
    assert "->" in text
    lines = [line.strip() for line in text.splitlines()]
    doc = (ROOT / command).read_text(encoding="utf-8").split('"""')[1]
    examples = [line.strip() for line in doc.splitlines() if f"python {command}" in line]
    assert examples and set(examples) <= set(lines)
    assert not has_torch


@pytest.mark.parametrize("command", ["perf/report.py", "serving/run.py"])
def test_an_unknown_flag_is_wrong_usage(command: str):
    done = run(command, "--no-such-flag", "1")
    assert done.returncode == 2
    assert "no-such-flag" in done.stderr + done.stdout


def test_a_misspelled_flag_names_the_nearest():
    done = run("training/run.py", "tiny", "--epoch", "1")
    assert done.returncode == 2
    assert "--epochs" in done.stderr + done.stdout


def test_an_unknown_variant_names_the_nearest():
    done = run("training/run.py", "v2s")
    assert done.returncode == 2
    require_named(done.stderr, "v2s", "v2-s")


def test_a_value_outside_its_limits_is_wrong_usage():
    done = run("training/run.py", "tiny", "--epochs", "0")
    assert done.returncode == 2
    require_named(done.stderr + done.stdout, "epochs", 0, 1)


def test_training_on_a_missing_folder_starts_nothing(tmp_path: Path):
    done = run("training/run.py", "tiny", "--data", tmp_path / "nowhere", "--output", tmp_path)
    assert done.returncode == 1
    require_named(done.stderr, "error", tmp_path / "nowhere")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_resuming_what_is_no_run_is_an_error(tmp_path: Path):
    done = run("training/run.py", "--resume", tmp_path)
    assert done.returncode == 1
    require_named(done.stderr, "error", tmp_path, "checkpoint.json")


def test_exporting_without_a_run_says_how_to_make_one(tmp_path: Path):
    done = run("export/ort.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "python training/run.py v2-s" in done.stderr


def test_tensorrt_without_a_gpu_says_what_to_install():
    done = run("export/trt.py")
    assert done.returncode == 1
    assert "pip install tensorrt-cu13" in done.stderr and "Traceback" not in done.stderr


def test_the_last_line_of_stdout_is_what_was_made(tiny_checkpoint: Path, tmp_path: Path):
    done = run("export/ort.py", "--checkpoint", tiny_checkpoint, "--output", tmp_path / "artifact")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "artifact")]
    assert f"checkpoint {tiny_checkpoint}" in done.stderr


def test_a_full_disk_is_said_plainly_and_leaves_the_older_artifact(tiny_checkpoint: Path):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    program = (
        "from pathlib import Path\n"
        "from efficientnet.command import run_command\n"
        "def main(_):\n"
        "    with open('/dev/full', 'w') as file:\n"
        "        file.write('x')\n"
        "run_command(lambda: None, main)\n"
    )
    done = run_program(program)
    assert done.returncode == 1
    assert "error: the disk is full" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("prints_json", [False, True])
def test_a_long_result_goes_to_a_file_unless_json_is_asked_for(tmp_path: Path, prints_json: bool):
    program = (
        "from pathlib import Path\n"
        "from pydantic import RootModel\n"
        "from efficientnet.command import JsonFlags, run_command\n"
        "class Config(JsonFlags):\n"
        "    result_file = Path('reports/numbers.json')\n"
        f"run_command(lambda: Config(json={prints_json}), lambda _: RootModel[list[int]]([1, 2]))\n"
    )
    done = run_program(program, cwd=tmp_path)
    written = tmp_path / "reports" / "numbers.json"
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("[1,2]\n" if prints_json else "reports/numbers.json\n")
    assert written.exists() != prints_json
    assert prints_json or json.loads(written.read_text()) == [1, 2]


def test_a_bug_keeps_its_traceback():
    program = (
        "import json\n"
        "from efficientnet.command import run_command\n"
        "run_command(lambda: None, lambda _: json.loads('{'))\n"
    )
    done = run_program(program)
    assert done.returncode == 1 and "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("command", "library"), [("export/ort.py", "onnxruntime"), ("export/ov.py", "openvino")]
)
def test_a_runtime_that_is_not_installed_is_told_in_one_line(
    tiny_checkpoint: Path, tmp_path: Path, command: str, library: str
):
    (tmp_path / f"{library}.py").write_text(f"raise ModuleNotFoundError('No module {library}')\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(ROOT / command), "--checkpoint", str(tiny_checkpoint)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    require_named(done.stderr, "error", library)
    assert "Traceback" not in done.stderr and not (tmp_path / "artifacts").exists()
