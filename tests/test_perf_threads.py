import json
import shutil
from pathlib import Path

import pytest
from commands import run
from facts import raises_naming

from efficientnet.formats.checkpoint import RECORD_FILE
from perf.measurements.config import ScalingConfig
from perf.studies.thread_scaling import Scaling, thread_counts


@pytest.mark.parametrize(
    ("num_cores", "expected"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (4, (1, 2, 4)), (64, (1, 2, 4, 8, 16, 32, 64))],
)
def test_threads_double_up_to_all_cores(num_cores: int, expected: tuple[int, ...]):
    assert thread_counts(num_cores) == expected


def test_numbers_of_threads_that_cannot_be_measured_are_refused():
    path = Path("artifacts/a")
    with raises_naming(ValueError, "--threads", 0):
        ScalingConfig((path,), threads=(0, 1))
    with raises_naming(ValueError, "--threads", "[2, 2]"):
        ScalingConfig((path,), threads=(2, 2))
    with raises_naming(ValueError, path):
        ScalingConfig((path, path))
    with raises_naming(ValueError, "artifacts/v2-s/native-int8"):
        ScalingConfig(())


def test_each_program_is_measured_on_each_number_of_threads_and_published(
    tiny_artifact: Path, tiny_checkpoint: Path, tmp_path: Path
):
    (tmp_path / "r.md").write_text("<!-- threads: written by a command -->\n<!-- /threads -->\n")
    flags = ["--threads", "1", "2", "--seconds", "0.2", "--turns", "2"]
    flags += ["--publish", "--readme", "r.md", "--json"]
    done = run("perf/threads.py", tiny_artifact, tiny_checkpoint, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = Scaling.model_validate_json(done.stdout)
    assert [time.num_threads for time in found.times] == [1, 2, 1, 2]
    assert len(found.programs) == 2 and all(len(time.turn_p50_ms) == 2 for time in found.times)
    shown = (tmp_path / "r.md").read_text()
    name = "threads-tiny-32px-batch-1"
    (picture,) = (tmp_path / "reports/published").glob(f"*/{name}.png")
    assert picture.relative_to(tmp_path).as_posix() in shown and "**tiny, 32 px, batch 1**" in shown
    assert Scaling.model_validate_json(picture.with_suffix(".json").read_text()) == found


def test_programs_of_different_images_are_not_drawn_together(
    tiny_artifact: Path, tiny_checkpoint: Path, tmp_path: Path
):
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    record = json.loads((other / RECORD_FILE).read_text())
    record["preprocess"]["image_size"] = 64
    (other / RECORD_FILE).write_text(json.dumps({**record, "preprocess_sha256": ""}))
    done = run("perf/threads.py", tiny_artifact, other, "--threads", "1", cwd=tmp_path)
    assert done.returncode == 1 and "64 px" in done.stderr and "32 px" in done.stderr
