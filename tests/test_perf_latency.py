import dataclasses
import io
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from commands import ROOT, started
from commands import run as run_command
from facts import raises_naming
from PIL import Image
from processes import child_pids, process_exists, wait_until

from efficientnet.formats.artifact import ArtifactError
from efficientnet.formats.records import AccuracyRecord, LatencyRecord, append_record, read_records
from efficientnet.images.datasets import DatasetError, Sample, load_dataset
from efficientnet.images.preprocess import PreprocessSpec, preprocess
from efficientnet.machine.environment import current_environment
from efficientnet.measuring.contender import Contender, ContenderError, running
from efficientnet.measuring.inputs import Inputs, map_inputs, prepare_inputs, rotate
from efficientnet.measuring.peaks import gpu_peak
from efficientnet.measuring.programs import Program, read_program, read_programs
from efficientnet.network.cost import DevicePeak
from perf.measurements import latency, recording
from perf.measurements.latency import LatencyConfig, choose_batch_sizes, without_accuracy
from perf.measurements.program_subject import ProgramSubject
from perf.measurements.recording import results_table
from perf.measurements.scenarios import OFFLINE, SCENARIOS

PUBLISHED = ROOT / "reports" / "published" / "2026-11-22-amd-epyc-2-cores"

SPEC = PreprocessSpec(
    image_size=8, interpolation="bilinear", crop_fraction=None, mean=(0, 0, 0), std=(1, 1, 1)
)
CPU_PEAK = DevicePeak(1e11, 1e10, "measured")
TINY_PREPROCESS = SPEC.model_copy(update={"image_size": 32})


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path, tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory):
    """One real run of the command on a checkpoint and an artifact."""
    folder = tmp_path_factory.mktemp("latency")
    flags = ["--seconds", "0.2", "--turns", "2", "--processes", "1", "--threads", "1"]
    flags += ["--batches", "1", "4"]
    paths = [str(tiny_checkpoint), str(tiny_artifact)]
    done = run_command("perf/latency.py", *paths, *flags, cwd=folder, has_contenders=True)
    assert done.returncode == 0, done.stderr
    return done, read_records(folder / "reports" / "latency.jsonl", LatencyRecord)


@pytest.fixture(scope="module")
def records(run) -> list[LatencyRecord]:
    return run[1]


def make_samples(num_images: int) -> list[Sample]:
    samples: list[Sample] = []
    for value in range(num_images):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (value % 256, value // 256, 0)).save(buffer, format="PNG")
        samples.append(Sample(f"{value}.png", 0, buffer.getvalue()))
    return samples


def test_the_command_appends_a_record_for_each_path_and_scenario(run):
    done, records = run
    assert done.stdout.splitlines()[-1] == "reports/latency.jsonl"
    scenarios = ("single_stream", "offline")
    expected = [(runtime, name) for name in scenarios for runtime in ("torch", "onnxruntime")]
    assert [(record.runtime, record.scenario) for record in records] == expected
    for told in ("warm-up, tiny eager PyTorch fp32", "images/s at batch", "time / eager"):
        assert told in done.stderr


def test_one_scenario_at_one_batch_size_is_measured_without_a_sweep(
    tiny_artifact: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    output = tmp_path / "latency.jsonl"
    latency.main(LatencyConfig((tiny_artifact,), 0.1, 2, 1, 1, (4,), ("offline",), output))
    (record,) = read_records(output, LatencyRecord)
    assert (record.scenario, record.batch_size) == ("offline", 4)
    assert "warm-up" in caplog.text
    assert "sweep" not in caplog.text and "images/s at batch" not in caplog.text


def test_records_lead_back_to_the_weights(
    records: list[LatencyRecord], tiny_checkpoint: Path, tiny_artifact: Path
):
    weights = read_program(tiny_checkpoint).program_sha256
    assert {record.checkpoint_sha256 for record in records} == {weights}
    assert records[0].program_sha256 == weights
    assert records[1].program_sha256 == read_program(tiny_artifact).program_sha256


def test_records_say_how_they_were_measured_and_keep_every_sample(records: list[LatencyRecord]):
    for record in records:
        assert (record.timed_region, record.clock) == ("end_to_end", "perf_counter")
        assert (record.num_threads, record.num_turns, record.seed) == (1, 2, 0)
        assert (record.data, record.num_input_images) == ("digits", 256)
        assert record.num_warmup > 0
        assert record.peak_process_memory_bytes > 0
        assert record.peak_device_memory_bytes is None
        assert 0 < record.harness_overhead_ms < record.min_ms
        assert record.started_at == records[0].started_at
        assert record.batch_size in ((1,) if record.scenario == "single_stream" else (1, 4))
        assert isinstance(record.samples_ms, tuple)
        assert len(record.samples_ms) == record.num_iterations
        assert min(record.samples_ms) == record.min_ms
        assert len(record.turn_p50_ms) == 2
        assert (record.p99_ms is None) == (record.num_iterations < 1000)
        assert (record.p50_ms is None) == (record.num_iterations < 20)


def test_each_process_holds_the_libraries_of_its_own_runtime_only(records: list[LatencyRecord]):
    eager, onnx = records[0], records[1]
    assert onnx.peak_process_memory_bytes < eager.peak_process_memory_bytes / 2


def test_the_table_compares_with_the_eager_row_of_the_run(records: list[LatencyRecord]):
    table = results_table(["eager", "onnx", "eager", "onnx"], records)
    rate = table.columns.index("images/s / eager")
    assert [table.rows[row][rate] for row in (0, 2)] == ["1.00", "1.00"]
    expected = records[1].throughput_images_per_s / records[0].throughput_images_per_s
    assert float(table.rows[1][rate]) == pytest.approx(expected, abs=0.01)


def test_three_processes_share_the_turns_and_many_samples_go_into_a_file(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(recording, "MAX_SAMPLES_IN_RECORD", 2)
    output = tmp_path / "latency.jsonl"
    config = LatencyConfig((tiny_artifact,), seconds=0.1, turns=4, batches=(2,), output=output)
    assert latency.main(config) == output
    records = read_records(output, LatencyRecord)
    assert [record.scenario for record in records] == ["single_stream", "offline"]
    for record in records:
        assert (record.num_turns, record.num_processes) == (4, 3)
        assert len(record.turn_p50_ms) == 4
        assert isinstance(record.samples_ms, str)
        samples = np.load(tmp_path / record.samples_ms)
        assert len(samples) == record.num_iterations
        assert samples.max() == pytest.approx(record.max_ms)


def test_a_scenario_that_picks_no_batch_size_is_measured_at_each(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    every_batch = dataclasses.replace(OFFLINE, name="every_batch", picks_fastest=False)
    monkeypatch.setitem(SCENARIOS, every_batch.name, every_batch)
    output = tmp_path / "latency.jsonl"
    scenarios = ("every_batch", "multi_stream", "batch16")
    config = LatencyConfig((tiny_artifact,), 0.1, 2, 1, 1, (8, 16), scenarios, output)
    latency.main(config)
    found = [(r.scenario, r.batch_size) for r in read_records(output, LatencyRecord)]
    every = [("every_batch", 8), ("every_batch", 16)]
    assert found == [("multi_stream", 8), ("batch16", 16), *every]


def test_flags_that_do_not_fit_each_other_or_a_program_are_wrong_usage(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
):
    with raises_naming(ValueError, "--turns", 2, "--processes", 3):
        LatencyConfig(turns=2)
    with raises_naming(ValueError, "--batches", "multi_stream", 8):
        LatencyConfig(batches=(1, 16), scenarios=("multi_stream",))
    monkeypatch.setattr(latency, "choose_batch_sizes", lambda program, asked: (1, 4))
    with raises_naming(ValueError, "batch16", 16):
        latency.main(LatencyConfig((tiny_artifact,), scenarios=("batch16",)))


def test_without_paths_the_newest_checkpoint_and_its_artifacts_are_measured(
    tiny_checkpoint: Path, tiny_artifact: Path, tmp_path: Path
):
    runs, artifacts = tmp_path / "runs", tmp_path / "artifacts"
    shutil.copytree(tiny_checkpoint, runs / "tiny-1" / "checkpoint")
    (runs / "latest").symlink_to("tiny-1")
    shutil.copytree(tiny_artifact, artifacts / "tiny" / "onnxruntime-fp32")
    other = artifacts / "tiny" / "onnxruntime-other"
    shutil.copytree(tiny_artifact, other)
    manifest = other / "manifest.json"
    weights = read_program(tiny_checkpoint).program_sha256
    manifest.write_text(manifest.read_text().replace(weights, "0" * 64))
    (artifacts / "tiny" / "damaged").mkdir()
    (artifacts / "tiny" / "damaged" / "manifest.json").write_text("{")
    programs = read_programs([], runs, artifacts)
    assert [program.path.parent.name for program in programs] == ["tiny-1", "tiny"]
    assert [program.runtime for program in programs] == ["torch", "onnxruntime"]


def test_a_path_given_twice_is_an_error(tiny_artifact: Path):
    with raises_naming(ValueError, "twice"):
        LatencyConfig((tiny_artifact, tiny_artifact / ".." / tiny_artifact.name))


def test_a_damaged_artifact_is_found_before_any_work(
    tiny_checkpoint: Path, tiny_artifact: Path, tmp_path: Path
):
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_artifact, damaged)
    with (damaged / "model.onnx").open("ab") as program:
        program.write(b"x")
    output = tmp_path / "latency.jsonl"
    with raises_naming(ArtifactError, damaged / "model.onnx", "SHA-256"):
        latency.main(LatencyConfig((tiny_checkpoint, damaged), output=output))
    assert not output.exists()


def test_a_path_that_is_nothing_of_ours_is_an_error(tmp_path: Path):
    with raises_naming(ArtifactError, tmp_path):
        read_programs([tmp_path])
    with raises_naming(FileNotFoundError, tmp_path / "nothing"):
        read_programs([tmp_path / "nothing"])


def test_data_that_has_moved_is_an_error_that_names_the_flag(tiny_artifact: Path, tmp_path: Path):
    moved = tmp_path / "artifact"
    shutil.copytree(tiny_artifact, moved)
    manifest = moved / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"digits"', '"/was/here"'))
    with raises_naming(FileNotFoundError, "--data", "/was/here"):
        latency.main(LatencyConfig((moved,), output=tmp_path / "latency.jsonl"))


def test_an_output_that_cannot_be_written_is_found_before_any_work(
    tiny_artifact: Path, tmp_path: Path
):
    (tmp_path / "file").touch()
    with raises_naming(OSError, "--output"):
        latency.main(LatencyConfig((tiny_artifact,), output=tmp_path / "file" / "latency.jsonl"))


def test_batch_sizes_that_an_artifact_does_not_take_are_left_out(tiny_artifact: Path):
    program = dataclasses.replace(read_program(tiny_artifact), max_batch_size=8)
    assert choose_batch_sizes(program, (16, 8, 1, 8)) == (1, 8)
    with raises_naming(ValueError, 8):
        choose_batch_sizes(program, (16, 32))


def test_inputs_are_held_out_images_preprocessed_like_everywhere():
    samples = load_dataset("digits").val
    with prepare_inputs(samples, SPEC, largest_batch=4, seed=1).file as file:
        images = map_inputs(file.fileno(), SPEC.image_size)
    own = {preprocess(sample.read(), SPEC).tobytes() for sample in samples}
    assert images.shape == (264, 3, 8, 8)
    assert all(image.tobytes() in own for image in images[:256])


def test_no_two_calls_in_a_row_see_the_same_buffer():
    inputs = prepare_inputs(make_samples(5), SPEC, largest_batch=4, seed=0)
    with inputs.file as file:
        images = map_inputs(file.fileno(), SPEC.image_size)
    assert inputs.num_images == 5
    for batch_size in (1, 3, 4):
        batches = rotate(images, batch_size)
        before = next(batches)
        for _ in range(20):
            batch = next(batches)
            assert batch.shape == (batch_size, 3, 8, 8)
            assert not np.shares_memory(before, batch)
            before = batch


def test_images_that_cannot_be_decoded_are_not_measured():
    samples = make_samples(300)
    broken = [
        dataclasses.replace(s, source=b"not an image") if i % 100 == 0 else s
        for i, s in enumerate(samples)
    ]
    inputs = prepare_inputs(broken, SPEC, 1, seed=0)
    with inputs.file as file:
        images = map_inputs(file.fileno(), SPEC.image_size)
    assert inputs.num_images == 256
    assert len({image.tobytes() for image in images[:256]}) == 256
    with raises_naming(DatasetError, "none of 1"):
        prepare_inputs(broken[:1], SPEC, 1, seed=0)


@pytest.fixture
def inputs():
    inputs = prepare_inputs(load_dataset("digits").val, TINY_PREPROCESS, 1, seed=0)
    with inputs.file:
        yield inputs


def contender(inputs: Inputs, program: Path) -> Contender:
    descriptor = inputs.file.fileno()
    opener = partial(ProgramSubject, program, 1, descriptor, inputs.image_size)
    return Contender("row", opener, (descriptor,))


@pytest.mark.usefixtures("own_processes")
def test_a_program_or_a_call_that_fails_says_why_in_one_line(
    inputs, tiny_artifact: Path, tmp_path: Path
):
    with (
        raises_naming(ContenderError, "row", tmp_path, "manifest.json"),
        running([contender(inputs, tmp_path)]),
    ):
        pytest.fail("it is not open")
    row = contender(inputs, tiny_artifact)
    with running([row]), raises_naming(ContenderError, 65, "1 to 64"):
        row.ask("turn", 65, 0.1)


@pytest.mark.usefixtures("own_processes")
def test_a_process_that_was_killed_is_named(inputs, tiny_artifact: Path):
    row = contender(inputs, tiny_artifact)
    with running([row]):
        os.kill(row._process.pid, signal.SIGKILL)
        with raises_naming(ContenderError, "row", "SIGKILL", "memory"):
            row.ask("turn", 1, 0.1)


@pytest.mark.usefixtures("own_processes")
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_program_whose_process_is_killed_takes_nothing_from_the_others(
    tiny_checkpoint: Path,
    tiny_artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_processes: int,
):
    measure, tried = latency.measure, []

    def measure_and_kill(programs, *rest):
        tried.append([program.program.runtime for program in programs])
        if len(tried) == 2:
            os.kill(programs[1].process._process.pid, signal.SIGKILL)
        return measure(programs, *rest)

    monkeypatch.setattr(latency, "measure", measure_and_kill)
    output = tmp_path / "latency.jsonl"
    scenarios = ("single_stream", "multi_stream")[: 3 - num_processes]
    paths = (tiny_checkpoint, tiny_artifact)

    with raises_naming(ContenderError, "1 of 2", tiny_artifact, "SIGKILL", output):
        latency.main(LatencyConfig(paths, 0.1, 2, num_processes, 1, (1, 8), scenarios, output))

    both = ["torch", "onnxruntime"]
    assert tried == [both, both, ["torch"]]
    found = [(record.scenario, record.runtime) for record in read_records(output, LatencyRecord)]
    whole = [("single_stream", runtime) for runtime in both]
    # One of two processes is no measurement.
    expected = {1: [*whole, ("multi_stream", "torch")], 2: whole[:1]}
    assert found == expected[num_processes]


def test_a_program_whose_device_is_gone_takes_nothing_from_the_others(
    tiny_artifact: Path, tmp_path: Path
):
    gone = tmp_path / "tensorrt"
    shutil.copytree(tiny_artifact, gone)
    manifest = gone / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"onnxruntime"', '"tensorrt"', 1))
    output = tmp_path / "latency.jsonl"

    with raises_naming(ContenderError, "1 of 2", gone, output):
        paths = (gone, tiny_artifact)
        latency.main(LatencyConfig(paths, 0.1, 2, 1, 1, (1,), ("single_stream",), output))

    assert [record.runtime for record in read_records(output, LatencyRecord)] == ["onnxruntime"]
    with raises_naming(ContenderError, gone):
        latency.main(LatencyConfig((gone,), 0.1, 2, 2, 1, (1,), ("single_stream",), output))


@pytest.mark.usefixtures("own_processes")
def test_ctrl_c_is_left_to_the_process_that_measures(inputs, tiny_artifact: Path):
    row = contender(inputs, tiny_artifact)
    with running([row]):
        os.kill(row._process.pid, signal.SIGINT)
        assert row.ask("turn", 1, 0.01).turn.samples_ms


def test_a_process_ends_with_the_one_that_started_it(tiny_artifact: Path):
    script = f"""
from functools import partial
from pathlib import Path
from efficientnet.measuring.contender import Contender, running
from efficientnet.images.datasets import load_dataset
from efficientnet.images.preprocess_spec import PreprocessSpec
from efficientnet.measuring.inputs import prepare_inputs
from perf.measurements.program_subject import ProgramSubject
spec = PreprocessSpec.model_validate_json({TINY_PREPROCESS.model_dump_json()!r})
file = prepare_inputs(load_dataset("digits").val, spec, 1, seed=0).file
opener = partial(ProgramSubject, Path({str(tiny_artifact)!r}), 1, file.fileno(), spec.image_size)
row = Contender("row", opener, (file.fileno(),))
with running([row]):
    print("ready", flush=True)
    row.ask("turn", 1, 600)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    (worker,) = child_pids(process.pid)
    process.kill()
    process.communicate(timeout=30)
    assert wait_until(lambda: not process_exists(worker))


def test_ctrl_c_ends_all_processes_and_leaves_no_records(tiny_artifact: Path, tmp_path: Path):
    command = started("perf/latency.py", tiny_artifact, cwd=tmp_path, has_contenders=True)
    with command as (process, stdout, stderr):
        assert wait_until(lambda: "warm-up" in stderr.read_text(), 60)
        workers = child_pids(process.pid or 0)
        os.kill(process.pid or 0, signal.SIGINT)
        process.join(30)
        assert (process.exitcode, stdout.read_text()) == (130, "")
        assert stderr.read_text().splitlines()[-1] == "error: interrupted"
    assert len(workers) == 2
    assert wait_until(lambda: not any(map(process_exists, workers)))
    assert not (tmp_path / "reports" / "latency.jsonl").exists()


def test_a_program_on_a_gpu_gets_the_peak_of_the_gpu(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
):
    here = read_program(tiny_artifact)
    environment = current_environment().model_copy(update={"gpus": ("NVIDIA L4, 23034 MiB, 580",)})
    monkeypatch.setattr(latency, "current_environment", lambda: environment)
    monkeypatch.setattr(latency, "cpu_peaks", lambda _, kinds: dict.fromkeys(kinds, CPU_PEAK))
    there = dataclasses.replace(here, path=Path("there"), runs_on_gpu=True, precision="fp16")
    unknown = dataclasses.replace(there, path=Path("unknown"), precision="fp8")
    peaks = latency.peaks_of([here, there], 1)
    assert peaks[here.path] == CPU_PEAK
    assert peaks[there.path] == gpu_peak("NVIDIA L4", "fp16")
    monkeypatch.setattr(
        latency, "current_environment", lambda: environment.model_copy(update={"gpus": ()})
    )
    assert latency.peaks_of([unknown], 1) == {unknown.path: None}


def test_only_programs_without_an_accuracy_are_named(tmp_path: Path):
    measured = read_records(PUBLISHED / "accuracy.jsonl", AccuracyRecord)[0]
    append_record(tmp_path / "accuracy.jsonl", measured)
    hashes = {Path("old"): measured.program_sha256, Path("new"): "0" * 64}
    programs = [SimpleNamespace(path=path, program_sha256=sha) for path, sha in hashes.items()]
    assert without_accuracy(cast(list[Program], programs), tmp_path) == [Path("new")]
    assert without_accuracy(cast(list[Program], programs), tmp_path / "nowhere") == list(hashes)
