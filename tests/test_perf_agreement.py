from pathlib import Path

import pytest
from commands import run
from test_perf_report import CPU, STARTED

from perf.studies import other_tools, tool_agreement
from perf.studies.config import AgreementConfig
from perf.studies.other_tools import OtherTool, ToolError
from perf.studies.tool_agreement import Agreement, AgreementRow, section_of


def make_row(ours: tuple[float, ...], theirs: tuple[float, ...]) -> AgreementRow:
    return AgreementRow(
        name="tiny OpenVINO fp32",
        program_sha256="0" * 64,
        tool="benchmark_app 1",
        scope="all of it",
        ours_ms=ours,
        theirs_ms=theirs,
        overhead_ms=0.0123,
        why_not=None,
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ((10.0, 10.0), (10.4, 10.4), "agree within 5 %"),
        ((10.0, 10.0), (9.6, 9.6), "agree within 5 %"),
        ((12.0, 12.1), (10.0, 10.1), "differ"),
        ((12.0, 14.0), (10.0, 10.1), "inconclusive: rounds of one tool differ by 15 %"),
        ((12.0, 14.0), (), "not compared"),
    ],
)
def test_medians_agree_within_a_twentieth(ours: tuple, theirs: tuple, verdict: str):
    assert make_row(ours, theirs).verdict == verdict


def test_the_section_tells_of_both_and_of_the_overhead():
    rows = (make_row((10.0, 10.8), (10.0, 10.0)), make_row((10.0, 10.0), ()))
    record = Agreement(environment=CPU, started_at=STARTED, num_threads=2, seconds=1.0, rows=rows)
    text = section_of(record)
    assert "| 1.04 | 1.00 to 1.08 | 12.3 | agree within 5 % |" in text
    assert "benchmark_app 1: all of it" in text and "adds 12.3 us" in text


def test_the_eager_model_is_compared_with_torchs_tool_and_others_say_why_not(
    tiny_checkpoint: Path, tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    readme = tmp_path / "results.md"
    readme.write_text("<!-- agreement: written by a command -->\n<!-- /agreement -->\n")

    def output_of_fork(_: str, command: list[str], *__: object) -> str:
        assert command[1:4] == ["-P", "-m", "perf.studies.torch_timer"]
        return run("perf/studies/torch_timer.py", *command[4:]).stdout

    monkeypatch.setattr(other_tools, "output_of", output_of_fork)
    paths = (tiny_checkpoint, tiny_artifact)
    config = AgreementConfig(paths, seconds=0.2, rounds=2, threads=1, publish=True, readme=readme)
    eager, onnx = tool_agreement.main(config).rows
    assert eager.tool is not None and eager.tool.startswith("torch.utils.benchmark ")
    assert len(eager.ours_ms) == len(eager.theirs_ms) == 2 and min(eager.theirs_ms) > 0
    assert 0 < eager.overhead_ms < min(eager.ours_ms)
    assert onnx.tool is None and onnx.theirs_ms == ()
    assert "has no tool that measures" in readme.read_text()


def test_a_tool_that_fails_leaves_our_time(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> float:
        raise ToolError("it fell over")

    tool = OtherTool("faller", "numpy", "", fail)
    monkeypatch.setitem(other_tools.TOOLS, "onnxruntime", tool)
    (row,) = tool_agreement.main(
        AgreementConfig((tiny_artifact,), seconds=0.1, rounds=2, threads=1)
    ).rows
    assert row.why_not == "it fell over" and len(row.ours_ms) == 2
    assert row.verdict == "not compared"


def test_an_artifact_of_openvino_is_measured_with_benchmark_app(
    openvino_artifact: Path,
):
    config = AgreementConfig((openvino_artifact,), seconds=0.2, rounds=2, threads=1)
    (row,) = tool_agreement.main(config).rows
    assert row.why_not is None and len(row.theirs_ms) == 2 and min(row.theirs_ms) > 0
