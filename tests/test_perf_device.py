import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import pytest
import torch
from facts import raises_naming
from processes import process_exists, wait_until
from torch import Tensor, nn

from efficientnet.machine.environment import current_environment
from perf.device_parts import jobs, records, study
from perf.device_parts.commands import OUTCOME
from perf.device_parts.config import DeviceConfig, Part
from perf.device_parts.gpu_watch import GpuWatch
from perf.device_parts.jobs import Job, pending, plan_jobs, run_jobs, why_missing
from perf.device_parts.network_case import Scene, build_scene
from perf.device_parts.networks import cases_of, is_done
from perf.device_parts.order import DRY, Order
from perf.device_parts.records import JobEnd, LatencyMeasured, append, ends_by_job, read
from perf.device_parts.report import document
from perf.device_parts.study import DeviceError
from perf.device_parts.turns import EAGER, Bench, Case, Contender, compare

ROOT = Path(__file__).resolve().parent.parent

START = records.CallStart(
    started_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    minutes=8,
    is_dry_run=True,
    device="NVIDIA H100",
    compute_capability="9.0",
    cuda="13.0",
    cudnn=91900,
    environment=current_environment(),
)


def job(name: str, program: str, seconds: float = 1.0, missing: str | None = None) -> Job:
    return Job("limits", name, (sys.executable, "-c", program), seconds, missing)


def run(planned: list[Job], folder: Path, minutes: float = 0.2) -> dict[str, JobEnd]:
    run_jobs(planned, folder, minutes, is_dry_run=True, after_each=lambda: None)
    return ends_by_job(read(folder))


def bench(scene: Scene, *earlier: records.Line, is_dry_run: bool = True) -> Bench:
    order = Order("network", "network v2-s", scene.variant, "", "", is_dry_run)
    return Bench(order, scene, GpuWatch(), earlier)


def latency(**changes: object) -> LatencyMeasured:
    record = LatencyMeasured(
        job="network v2-s",
        variant="v2-s",
        method=EAGER,
        precision="fp16",
        batch_size=16,
        is_best_batch=False,
        image_size=384,
        region="device to device",
        turns_us=((5000, 5000), (5000, 6000)),
        p50_ms=5.0,
        num_calls=4,
        images_per_s=3200.0,
        of_eager=1.0,
    )
    return record.model_copy(update=changes)


def test_a_job_that_crashes_is_killed_or_hangs_leaves_the_others(tmp_path: Path):
    append(tmp_path, START)
    pid_file = tmp_path / "pid"
    hang = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])\n"
        f"pathlib.Path({str(pid_file)!r}).write_text(str(child.pid))\n"
        "print('it hangs now', file=sys.stderr, flush=True)\n"
        "time.sleep(99)"
    )
    ends = run(
        [
            # It hangs for as long as its share of the time.
            job("hangs", hang, 2),
            job("good", "pass", 5),
            job("crashes", "raise RuntimeError('no such kernel')", 5),
            job("is killed", "import os; os.kill(os.getpid(), 9)", 5),
            job("says so", f"raise SystemExit({jobs.OUT_OF_TIME})", 5),
            job("last", "pass", 5),
        ],
        tmp_path,
        minutes=0.4,
    )
    assert {name: end.status for name, end in ends.items()} == {
        "good": "done",
        "crashes": "failed",
        "is killed": "failed",
        "hangs": "out of time",
        "says so": "out of time",
        "last": "done",
    }
    assert "RuntimeError: no such kernel" in ends["crashes"].reason
    assert ends["crashes"].stderr[-1] == "RuntimeError: no such kernel"
    assert "SIGKILL" in ends["is killed"].reason
    assert ends["hangs"].stderr == ("it hangs now",)
    assert wait_until(lambda: not process_exists(int(pid_file.read_text())))
    text = document(read(tmp_path))
    assert "it hangs now" in text and "| last | done |" in text


def test_going_on_does_what_is_not_done_and_what_failed_last(tmp_path: Path):
    log = tmp_path / "log"
    append(tmp_path, START)

    def noting(name: str, rest: str = "") -> Job:
        return job(name, f"print({name!r}, file=open({str(log)!r}, 'a')); {rest}")

    first = [noting("good"), noting("bad", "raise SystemExit(3)")]
    run([*first, job("left out", "pass", missing="x is not installed")], tmp_path)
    ends = run([*first, noting("new")], tmp_path)
    assert log.read_text().split() == ["good", "bad", "new", "bad"]
    assert [ends[name].status for name in ("good", "bad", "new")] == ["done", "failed", "done"]
    assert ends["left out"].status == "skipped"
    assert "x is not installed" in document(read(tmp_path))


def test_what_the_time_does_not_reach_is_not_begun_and_comes_first_next_time(tmp_path: Path):
    planned = [job("long", "import time; time.sleep(99)", 480), job("late", "pass", 480)]
    append(tmp_path, START)
    ends = run(planned, tmp_path, minutes=0.01)
    assert ends["long"].status == "out of time" and ends["late"].status == "not begun"
    assert [left.name for left in pending(planned, ends)] == ["late", "long"]


def test_a_missing_library_is_a_skip_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jobs, "find_spec", lambda name: None)
    config = DeviceConfig(parts=("training", "limits"), dry_run=True)
    planned = plan_jobs(config, tmp_path, tmp_path)
    assert {job.name: job.missing for job in planned} == {
        "limits": None,
        "training b0": "timm is not installed",
    }
    assert why_missing("tensorrt", False) == "tensorrt is not installed"


def test_onnxruntime_without_its_cuda_provider_is_a_skip(monkeypatch: pytest.MonkeyPatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "has CPUExecutionProvider and no CUDA" in str(why_missing("onnxruntime", False))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [jobs.CUDA_PROVIDER])
    assert why_missing("onnxruntime", False) is None


def test_every_part_has_jobs_and_the_first_are_the_important_ones(tmp_path: Path):
    planned = plan_jobs(DeviceConfig(), tmp_path, tmp_path)
    assert {job.part for job in planned} == set(get_args(Part))
    names = [job.name for job in planned]
    assert len(set(names)) == len(names)
    assert names[:3] == ["tests", "limits", "network v2-s"]
    assert json.loads(planned[2].command[-1])["variant"] == "v2-s"


def test_without_a_gpu_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(study, "current_gpu", lambda: None)
    with raises_naming(DeviceError, "no NVIDIA GPU", "--dry-run"):
        study.main(DeviceConfig(output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_device_or_with_a_damaged_record_is_refused(tmp_path: Path):
    append(tmp_path, START)
    with raises_naming(DeviceError, "NVIDIA H100", "dry run", "--output"):
        study.main(DeviceConfig(output=tmp_path, dry_run=True))
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"kind": "end"\n')
    with raises_naming(records.RecordsError, "line 2"):
        read(tmp_path)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return build_scene("tiny", torch.device("cpu"))


def test_programs_take_turns_and_one_that_fails_is_told(scene: Scene):
    eager = scene.program("fp32")

    def out_of_memory() -> Callable[[Tensor], Tensor]:
        raise torch.OutOfMemoryError("no room for 2 GiB. And so on")

    found = compare(
        bench(scene),
        Case("fp32", 2),
        [
            Contender(EAGER, "device to device", lambda: eager),
            Contender("too large", "device to device", out_of_memory),
            Contender("upside down", "device to device", lambda: lambda x: -eager(x)),
            Contender("of arrays", "host to host", lambda: lambda x: eager(torch.from_numpy(x))),
        ],
    )
    by_method = {record.method: record for record in found}
    assert by_method["too large"].problem == "out of memory: no room for 2 GiB"
    good, wrong = by_method[EAGER], by_method["upside down"]
    assert good.parity and good.parity.num_images == 64
    assert good.parity.max_relative_error < 1e-4 and good.parity.top1_agreement == 1
    assert wrong.parity and wrong.parity.top1_agreement < 0.1
    assert by_method["of arrays"].parity == good.parity
    assert good.of_eager == 1 and by_method["of arrays"].of_eager is None
    assert len(good.turns_us) == DRY.pace.num_turns
    assert good.num_calls == sum(map(len, good.turns_us))


def test_no_call_sees_the_images_of_the_call_before(scene: Scene):
    for size in (1, 16, 48, 100, 200):
        batches, arrays = scene.batches(size), scene.host_batches(size)
        assert len(batches) == len(arrays) >= 2 and {len(batch) for batch in batches} == {size}
        assert not torch.equal(batches[0], batches[1])
        for batch, array in zip(batches, arrays, strict=True):
            assert torch.equal(batch.cpu(), torch.from_numpy(array))


def test_images_tell_the_random_network_apart(scene: Scene):
    assert len(set(scene.reference.argmax(1).tolist())) > 5
    assert not any(isinstance(m, nn.BatchNorm2d) and m.training for m in scene.network.modules())


def test_other_jobs_measure_at_the_batch_size_that_the_network_job_found(scene: Scene):
    older, found = (
        latency(batch_size=size, is_best_batch=True, variant="tiny") for size in (32, 128)
    )
    now = bench(scene, START, older, found, is_dry_run=False)
    assert [case.batch_size for case in cases_of(now, "fp16")] == [16, 1, 128]
    assert [case.batch_size for case in cases_of(now, "bf16")] == [16, 1, 64]
    assert [case.is_best_batch for case in cases_of(now, "fp16", 16)] == [True, False]
    assert is_done(now, Case("fp16", 128), EAGER) and not is_done(now, Case("fp16", 1), EAGER)


def test_the_report_shows_the_papers_time_where_it_is_the_papers_case(tmp_path: Path):
    lines = [
        START,
        latency(),
        latency(method="TensorRT", p50_ms=None, of_eager=None, problem="KeyError: no such layer"),
        latency(batch_size=1),
        latency(variant="b0", job="network b0", image_size=224),
    ]
    text = document(lines)
    assert "V100, another device" in text
    papers = text[text.index("## The V2 paper's case") : text.index("## v2-s")]
    assert "| v2-s | 384 | eager (network v2-s) | device to device | 5.00 | 24.0 |" in papers
    assert "b0" not in papers and "KeyError: no such layer" in text
    assert text.count("| 24.0 |") == 2


def test_a_measurement_that_was_repeated_counts_once(tmp_path: Path):
    text = document([START, latency(), latency(p50_ms=7.0), latency(p50_ms=None, problem="oh")])
    assert "| 7.00 |" in text and "| 5.00 |" not in text and "oh" not in text


def test_what_held_the_clocks_down_is_read_from_nvidia_smi():
    watch = GpuWatch()
    watch.collect(["1980, 61, 0x0000000000000004\n", "345, 40, 0x0000000000000001\n"])
    watch.collect(["[N/A], [N/A], [N/A]\n", "an error\n"])
    state = watch.since(0.0)
    assert state is not None and state.slowed_by == ("power cap",)
    assert state.sm_clock_mhz == (345, 1980) and state.max_temperature_c == 61
    assert watch.since(1e12) is None


def test_outcomes_are_read_from_what_pytest_prints():
    printed = {
        "tests/test_a.py::test_b[fp16-1] PASSED   [ 50%]": ("tests/test_a.py::test_b[fp16-1]", 0),
        "tests/test_a.py::test_c SKIPPED (no GPU) [ 60%]": ("tests/test_a.py::test_c", 0),
        "ERROR tests/test_d.py - ModuleNotFoundError: x": ("tests/test_d.py", 1),
    }
    for line, (test, kind) in printed.items():
        found = OUTCOME.match(line)
        assert found and (found[4] if kind else found[1]) == test
    assert OUTCOME.match("tests are collected") is None


def test_a_dry_run_leaves_records_and_a_report(tmp_path: Path):
    output = tmp_path / "out"
    config = DeviceConfig(parts=("limits", "network", "tensorrt"), dry_run=True, output=output)
    report = study.main(config)
    assert report == output / "report.md"
    lines = read(output)
    statuses = {end.job: end.status for end in ends_by_job(lines).values()}
    assert statuses == {"limits": "done", "network tiny": "done", "tensorrt tiny": "skipped"}
    assert {line.unit for line in lines if isinstance(line, records.LimitMeasured)} == {
        "bytes/s",
        "operations/s",
    }
    measured = [line for line in lines if isinstance(line, LatencyMeasured)]
    assert {line.precision for line in measured} == {"fp32", "fp16", "bf16"}
    for line in measured:
        assert line.problem is None and line.p50_ms and line.parity
        assert (
            line.parity.max_relative_error
            < {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.4}[line.precision]
        )
    text = report.read_text()
    assert "A dry run" in text and "## tiny, 32 px" in text and "## Limits" in text
    assert sorted(path.name for path in output.iterdir()) == ["records.jsonl", "report.md"]
    # Once more: nothing is left to do.
    study.main(replace(config, parts=("limits", "network")))
    again = read(output)
    assert [line for line in again if not isinstance(line, records.CallStart)] == [
        line for line in lines if not isinstance(line, records.CallStart)
    ]


@pytest.mark.slow
def test_a_dry_run_of_all_parts_has_every_part(tmp_path: Path):
    output = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "perf/device.py", "--dry-run", "--minutes", "20", "--output", output],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(output / "report.md")
    lines = read(output)
    ends = ends_by_job(lines).values()
    assert {end.part for end in ends} == set(get_args(Part))
    statuses = {end.part: end.status for end in ends}
    assert statuses == dict.fromkeys(get_args(Part), "done") | {
        "tensorrt": "skipped",
        "tensorrt-rtx": "skipped",
    }
    assert not [x for x in lines if isinstance(x, LatencyMeasured) and x.problem]
    methods = {line.method for line in lines if isinstance(line, LatencyMeasured)}
    assert len(methods) >= 5
    trained = [line.record for line in lines if isinstance(line, records.TrainingMeasured)]
    assert {record["contender"] for record in trained} == {"ours", "timm", "timm again"}
    assert {record["is_loader_fed"] for record in trained} == {True, False}
    assert [line for line in lines if isinstance(line, records.LoaderMeasured)]
    (tests,) = [line for line in lines if isinstance(line, records.PytestMeasured)]
    assert tests.is_complete and set(tests.outcomes.values()) == {"skipped"}
