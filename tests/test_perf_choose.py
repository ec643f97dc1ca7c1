import shutil
from datetime import timedelta
from pathlib import Path

import pytest
from facts import raises_naming
from test_perf_report import CPU, STARTED, make_accuracy, make_latency

from efficientnet.formats.records import LatencyRecord, append_record, read_records
from efficientnet.machine.environment import current_environment
from efficientnet.measuring.intervals import wilson_interval
from perf.choosing import choice
from perf.choosing.candidates import ChoiceError, make_candidate, pareto_front
from perf.choosing.choice_plot import draw_choice
from perf.choosing.config import ChooseConfig
from perf.measurements import accuracy, latency
from perf.measurements.config import AccuracyConfig, LatencyConfig

HERE = current_environment()
# Time of a call in ms, and top-1, of programs that none of them beats.
FRONT = {"native": (2.0, 0.80), "openvino": (4.0, 0.85), "onnxruntime": (8.0, 0.90)}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    # Most tests ask what is chosen: a picture takes longer than the choice.
    monkeypatch.setattr(choice, "draw_choice", lambda *_: b"picture")
    monkeypatch.setattr(choice, "NUM_PROCESSES", 1)
    return tmp_path


def write(
    programs: dict[str, tuple[float, float | None]],
    folder: Path = Path("reports"),
    changes: dict[str, object] | None = None,
) -> None:
    shared = {"environment": HERE, **(changes or {})}
    for runtime, (time_ms, top1) in programs.items():
        append_record(folder / "latency.jsonl", make_latency(runtime, time_ms, **shared))
        if top1 is not None:
            append_record(folder / "accuracy.jsonl", make_accuracy(runtime, top1, **shared))


def choose(budget_ms: float, **flags: object) -> choice.Choice:
    return choice.main(ChooseConfig(budget_ms=budget_ms, seconds=0, **flags))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("budget_ms", "runtime"), [(2.0, "native"), (7.9, "openvino"), (100.0, "onnxruntime")]
)
def test_the_most_accurate_within_the_budget_is_chosen(budget_ms: float, runtime: str):
    write(FRONT)
    assert choose(budget_ms).chosen.runtime == runtime


@pytest.mark.parametrize("include_unverified", [True, False])
def test_the_choice_is_drawn(monkeypatch: pytest.MonkeyPatch, include_unverified: bool):
    monkeypatch.setattr(choice, "draw_choice", draw_choice)
    write(FRONT | {"torch": (1.0, None)})
    answer = choose(7.9, include_unverified=include_unverified)
    assert Path(answer.picture).read_bytes().startswith(b"\x89PNG")


def test_of_equal_accuracy_the_faster_one_is_chosen():
    write({"native": (3.0, 0.9), "openvino": (2.0, 0.9), "onnxruntime": (4.0, 0.9)})
    assert choose(10).chosen.runtime == "openvino"


def test_the_percentile_that_is_asked_for_counts():
    samples = {"samples_ms": (1.0,), "p50_ms": 1.0, "p90_ms": 5.0, "p99_ms": None}
    write({"native": (1.0, 0.9)}, changes=None)
    record = make_latency("openvino", environment=HERE).model_copy(update=samples)
    append_record(Path("reports/latency.jsonl"), record)
    append_record(Path("reports/accuracy.jsonl"), make_accuracy("openvino", 0.95, environment=HERE))
    found = {p: choose(2, percentile=p).chosen for p in ("50", "90", "99")}
    assert {p: row.runtime for p, row in found.items()} == {
        "50": "openvino",
        "90": "native",
        "99": "native",
    }


def test_what_is_unverified_is_chosen_only_when_it_is_asked_for():
    write({"native": (1.0, None)})
    with raises_naming(ChoiceError, 1, "unverified"):
        choose(10)
    with raises_naming(ChoiceError, "unverified"):
        choose(10, include_unverified=True, min_top1=0.5)
    answer = choose(10, include_unverified=True)
    assert answer.chosen.top1 is None
    assert "unverified" in answer.verdict[0]
    write({"openvino": (9.0, 0.1)})
    assert choose(10, include_unverified=True).chosen.runtime == "openvino"


def test_nothing_within_the_limits_is_an_error_that_says_what_there_is():
    write(FRONT)
    with raises_naming(ChoiceError, "1 ms", "p90", 3, "2.00 ms"):
        choose(1)
    with raises_naming(ChoiceError, "95.0 %", "90.0 %"):
        choose(100, min_top1=0.95)


def test_without_records_the_commands_that_make_them_are_named():
    with raises_naming(ChoiceError, "python perf/latency.py"):
        choose(1)


def test_records_of_other_devices_do_not_count(caplog: pytest.LogCaptureFixture):
    write({"native": (1.0, 0.99)}, changes={"environment": CPU})
    with raises_naming(ChoiceError, 1, "example"):
        choose(10)
    write({"openvino": (2.0, 0.8)})
    assert choose(10).chosen.runtime == "openvino"
    assert "left out, measured on other devices" in caplog.text


def test_records_of_another_format_are_an_error(caplog: pytest.LogCaptureFixture):
    write(FRONT)
    path = Path("reports/latency.jsonl")
    newer = path.read_text().replace('"format_version":1', '"format_version":2')
    published = Path("reports/published/2026-11-22-here/latency.jsonl")
    published.parent.mkdir(parents=True)
    published.write_text(newer)
    assert choose(100).chosen is not None
    assert "left out: reports/published" in caplog.text
    path.write_text(newer)
    with raises_naming(ValueError, "version 2", 1):
        choose(100)


def test_published_records_of_this_device_count():
    folder = Path("reports/published/2026-11-22-here")
    write(FRONT, folder)
    assert choose(100).chosen.runtime == "onnxruntime"


def test_the_newest_time_of_a_program_counts():
    write(FRONT)
    newer = {"environment": HERE, "started_at": STARTED + timedelta(days=1)}
    append_record(Path("reports/latency.jsonl"), make_latency("onnxruntime", 50.0, **newer))
    assert choose(10).chosen.runtime == "openvino"


def test_accuracies_of_different_images_do_not_compare():
    write({"native": (1.0, 0.9)})
    other = {"environment": HERE, "data": "photos", "dataset_sha256": "e" * 64}
    append_record(Path("reports/latency.jsonl"), make_latency("openvino", 2.0, environment=HERE))
    append_record(Path("reports/accuracy.jsonl"), make_accuracy("openvino", 0.95, **other))
    with raises_naming(ChoiceError, "digits", "ddddddd", "photos", "eeeeeee"):
        choose(10)
    for data in ("photos", "eee"):
        assert choose(10, data=data).chosen.runtime == "openvino"
    with raises_naming(ChoiceError, "--data nowhere"):
        choose(10, data="nowhere")


def test_the_front_leaves_out_what_another_beats_in_both():
    times = {"a": (1.0, 0.8), "b": (2.0, 0.7), "c": (2.0, 0.9), "d": (3.0, 0.9), "e": (4.0, 0.95)}
    config = ChooseConfig(budget_ms=10, percentile="50")
    candidates = [
        make_candidate(make_latency(name, time_ms), make_accuracy(name, top1), config, HERE)
        for name, (time_ms, top1) in times.items()
    ]
    assert [candidate.runtime for candidate in pareto_front(candidates)] == ["a", "c", "e"]


def test_a_faster_program_of_about_the_same_accuracy_is_named():
    write({"native": (1.0, 0.89), "openvino": (2.0, 0.6), "onnxruntime": (3.0, 0.9)})
    answer = choose(10)
    assert "do not tell it from" in answer.verdict[-1] and "native" in answer.verdict[-1]


def test_the_choice_is_verified_in_turns_with_the_eager_model(
    tiny_checkpoint: Path, tiny_artifact: Path
):
    shutil.copytree(tiny_checkpoint, "runs/tiny-1/checkpoint")
    shutil.copytree(tiny_artifact, "artifacts/tiny/onnxruntime-fp32")
    paths = (Path("artifacts/tiny/onnxruntime-fp32"),)
    accuracy.main(AccuracyConfig(paths))
    latency.main(LatencyConfig(paths, 0.3, 2, 1, 1, (1,), ("single_stream",)))
    answer = choice.main(ChooseConfig(budget_ms=1e6, seconds=0.3, percentile="50"))
    (fresh,) = answer.fresh_runs
    assert fresh.holds and fresh.fresh_ms and fresh.reference_ms
    records = read_records(Path("reports/latency.jsonl"), LatencyRecord)
    assert [record.runtime for record in records] == ["onnxruntime", "torch", "onnxruntime"]
    assert answer.chosen.path == str(paths[0])


def test_what_does_not_hold_in_a_fresh_run_gives_way_to_the_next(
    tiny_checkpoint: Path, tiny_artifact: Path
):
    shutil.copytree(tiny_checkpoint, "runs/tiny-1/checkpoint")
    shutil.copytree(tiny_artifact, "artifacts/tiny/onnxruntime-fp32")
    paths = (Path("artifacts/tiny/onnxruntime-fp32"), Path("runs/tiny-1/checkpoint"))
    accuracy.main(AccuracyConfig(paths))
    latency.main(LatencyConfig(paths, 0.2, 2, 1, 1, (1,), ("single_stream",)))
    path = Path("reports/latency.jsonl")
    too_good = [
        record.model_copy(update={"p50_ms": 1e-9}) for record in read_records(path, LatencyRecord)
    ]
    path.unlink()
    for record in too_good:
        append_record(path, record)
    with raises_naming(ChoiceError, "ONNX Runtime", "eager PyTorch"):
        choice.main(ChooseConfig(budget_ms=1e-6, seconds=0.2, percentile="50"))


def test_a_program_that_is_gone_cannot_be_verified():
    write(FRONT)
    with raises_naming(ChoiceError, "artifacts/", "runs/"):
        choice.main(ChooseConfig(budget_ms=100))


def test_the_interval_of_a_share_is_wilsons():
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    known = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for counts, expected in known.items():
        assert wilson_interval(*counts) == pytest.approx(expected, abs=5e-5)
    assert wilson_interval(20, 20)[1] == 1.0
    with raises_naming(ValueError, "3 hits", "2 images"):
        wilson_interval(3, 2)
