import json
import os
import signal
from pathlib import Path

import pytest
from commands import run, started
from processes import wait_until

SHORT = ("--batch-size", "256", "--progressive.num-stages", "2", "--epochs")


def test_the_whole_road_on_tiny(tmp_path: Path):
    """Train, export, measure, report, serve: each command finds what the one before has made."""

    def last_line(command: str, *arguments: str) -> Path:
        done = run(command, *arguments, cwd=tmp_path)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return Path(done.stdout.splitlines()[-1])

    checkpoint = tmp_path / last_line("training/run.py", "tiny", *SHORT, "2")
    artifact = tmp_path / last_line("export/ort.py")
    last_line("perf/accuracy.py")
    short = ("--seconds", "0.2", "--processes", "1", "--batches", "1", "4")
    records = tmp_path / last_line("perf/latency.py", *short)
    report = tmp_path / last_line("perf/report.py")
    answer = json.loads(str(last_line("serving/demo.py", "--artifact", str(artifact))))

    record = json.loads((checkpoint / "checkpoint.json").read_text())
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["checkpoint_sha256"] == record["weights_sha256"]
    measured = [json.loads(line) for line in records.read_text().splitlines()]
    assert {m["program_sha256"] for m in measured} == {
        record["weights_sha256"],
        manifest["program_sha256"],
    }
    assert {m["scenario"] for m in measured} == {"single_stream", "offline"}
    accuracies = [
        json.loads(line) for line in (tmp_path / "reports/accuracy.jsonl").read_text().splitlines()
    ]
    # The eager model, measured again, has the very accuracy that training has recorded.
    assert {a["top1"] for a in accuracies} == {record["top1"]}
    text = report.read_text()
    assert f"{100 * record['top1']:.1f}" in text and "onnxruntime" in text
    assert {p.name for p in report.parent.iterdir()} >= {
        "report.md",
        "report.html",
        "latency.png",
    }
    assert {entry["label"] for entry in answer} <= set("0123456789")


@pytest.mark.skipif(not hasattr(signal, "SIGINT"), reason="needs POSIX signals")
def test_ctrl_c_keeps_what_was_reached_and_the_run_goes_on(tmp_path: Path):
    with started("training/run.py", "tiny", *SHORT, "3", cwd=tmp_path) as (process, _, stderr):
        assert wait_until(lambda: "\nepoch" in stderr.read_text(), 60)
        os.kill(process.pid or 0, signal.SIGINT)
        process.join(60)
        errors = stderr.read_text()
    assert process.exitcode == 130 and "Traceback" not in errors
    command = errors.splitlines()[-1].partition("go on with: python ")[2].split()
    assert command[0] == "training/run.py"
    resumed = run(*command, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    lines = (tmp_path / "runs/latest/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
