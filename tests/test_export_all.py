from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import run

from efficientnet.command import parse_flags
from efficientnet.formats.artifact import read_artifact
from efficientnet.machine.environment import current_environment
from export.studies import all_exports
from export.studies.all_exports import AllConfig, reason_of
from export.studies.export_table import Line, Summary, choose_default, publish, table_of


def line(name: str, precision: str, p50_ms: float | None, **changes: object) -> Line:
    values = {"name": name, "precision": precision, "p50_ms": p50_ms}
    artifact = None if p50_ms is None else f"artifacts/tiny/{name}-{precision}"
    return Line.model_validate(values | {"artifact": artifact} | changes)


def test_the_fastest_artifact_is_the_default():
    lines = [line("openvino", "fp32", 9.0), line("onnxruntime", "fp32", 8.0)]
    assert choose_default(lines)[0] == "artifacts/tiny/onnxruntime-fp32"
    assert choose_default([line("trt", "fp16", None, left_out="no GPU")]) == (None, [])


def test_an_int8_artifact_that_is_slower_is_reported_and_not_the_default():
    lines = [line("openvino", "fp32", 8.0), line("openvino", "int8", 9.5)]
    default, notes = choose_default(lines)
    assert default == "artifacts/tiny/openvino-fp32"
    assert any("openvino int8" in note and "fp32 (9.5 ms against 8.0 ms)" in note for note in notes)
    default, notes = choose_default([line("openvino", "fp32", 8.0), line("openvino", "int8", 5.0)])
    assert default == "artifacts/tiny/openvino-int8" and len(notes) == 1


def test_int8_that_is_slower_than_bf16_of_another_runtime_is_not_advised():
    lines = [
        line("onnxruntime", "fp32", 140.0),
        line("onnxruntime", "int8", 34.9),
        line("openvino", "bf16", 24.4),
        line("openvino", "int8", 26.4),
        line("native", "int8", 25.0),
        line("aoti-cuda", "fp16", 2.0),
    ]
    default, notes = choose_default(lines)
    assert default == "artifacts/tiny/aoti-cuda-fp16"
    for runtime in ("onnxruntime", "openvino", "native"):
        (note,) = [note for note in notes if note.startswith(f"{runtime} int8")]
        assert "openvino bf16" in note and "24.4 ms" in note


def test_the_table_tells_why_something_was_left_out():
    lines = [
        line("openvino", "fp32", 8.0, size_bytes=5_000_000, top1=0.5, drop=0.002),
        line("aoti", "bf16", None, left_out="no instructions for bf16"),
        line("tensorrt", "fp16", None, left_out="no NVIDIA GPU answers here"),
        line("tensorrt", "int8", None, left_out="no NVIDIA GPU answers here"),
    ]
    table = table_of(lines, "artifacts/tiny/openvino-fp32")
    text = table.aligned_text()
    assert "5 MB" in text and "50.00 %" in text and "-0.20" in text and "yes" in text
    assert table.notes == ("(1) no instructions for bf16", "(2) no NVIDIA GPU answers here")
    assert [row[-1] for row in table.rows] == ["", "(1)", "(2)", "(2)"]


@contextmanager
def ended_fork(words: tuple[str, ...], **_: object) -> Iterator[SimpleNamespace]:
    done = run(*words[1:], cwd=Path.cwd())
    yield SimpleNamespace(stderr=StringIO(done.stderr), returncode=done.returncode)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("checkpoint x\nerror: no GPU here; do this\n", "no GPU here; do this"),
        (
            "╭─ Value error ─╮\n│ Error parsing OrtConfig: --precision is bf16, for │\n"
            "│ which there is no kernel    │\n│ ──────── │\n",
            "--precision is bf16, for which there is no kernel",
        ),
        ("Traceback (most recent call last)\n", ""),
    ],
)
def test_the_reason_of_a_failure_is_its_message(text: str, reason: str):
    assert reason_of(text).strip() == reason


def test_a_published_table_stands_in_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- exports: written by a command -->\n<!-- /exports -->\nafter\n")
    eager = Line(name="eager", precision="fp32", artifact=str(tmp_path / "runs/one/checkpoint"))
    for variant in ("tiny", "b0"):
        summary = Summary(
            variant=variant,
            image_size=32,
            environment=current_environment(),
            started_at=datetime.now(UTC),
            lines=(eager, line("openvino", "fp32", 8.0)),
            default=None,
            notes=("a note",),
        )
        publish(summary, readme)
    text = readme.read_text()
    assert "**tiny, 32 px**" in text and "**b0, 32 px**" in text and "- a note" in text
    records = list(tmp_path.glob("reports/published/*/exports-*.json"))
    assert len(records) == 2
    for record in records:
        assert "one/checkpoint" in record.read_text() and str(tmp_path) not in record.read_text()


def test_what_belongs_to_one_artifact_is_not_offered_for_all_of_them(
    capsys: pytest.CaptureFixture[str],
):
    with pytest.raises(SystemExit):
        parse_flags(AllConfig, None, ["--help"])
    text = capsys.readouterr().out
    assert "--batches" in text and "--only" in text
    assert "--precision" not in text and "--output" not in text


def test_all_exports_of_a_runtime_end_with_a_table_and_a_default(
    fitted_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # One that is refused stands for all that need a GPU; OpenVINO's is passed over by --only.
    tried = [("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("onnxruntime-cuda", "fp16")]
    named = [*tried, ("openvino", "fp32")]
    candidates = [one for one in all_exports.CANDIDATES if (one[1].name, one[2]) in named]
    assert len(candidates) == len(named)
    monkeypatch.setattr(all_exports, "CANDIDATES", candidates)
    forks = SimpleNamespace(Popen=ended_fork, PIPE=None, DEVNULL=None)
    monkeypatch.setattr(all_exports, "subprocess", forks)
    monkeypatch.chdir(tmp_path)
    summary = all_exports.main(
        AllConfig(
            checkpoint=fitted_checkpoint,
            only=("ort",),
            seconds=0.2,
            num_parity_images=64,
            num_calibration_images=64,
            max_drop=2,
        )
    )
    by_name = {(one.name, one.precision): one for one in summary.lines}
    assert list(by_name) == [("eager", "fp32"), *tried]
    for precision in ("fp32", "int8"):
        one = by_name["onnxruntime", precision]
        assert one.p50_ms is not None and one.top1 is not None and one.left_out is None
    assert by_name["onnxruntime", "fp32"].drop == 0.0
    cuda = by_name["onnxruntime-cuda", "fp16"]
    assert cuda.artifact is None and "pip install onnxruntime-gpu" in (cuda.left_out or "")
    assert summary.default is not None
    link = tmp_path / "artifacts" / "tiny" / "default"
    assert read_artifact(link) == read_artifact(tmp_path / summary.default)
