import dataclasses
import io
import json
import re
import statistics
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from facts import raises_naming, require_named
from matplotlib.figure import Figure

from efficientnet.command import parse_flags
from efficientnet.formats.records import (
    AccuracyRecord,
    LatencyRecord,
    ServerLoad,
    TriedRate,
    append_record,
    pack_hits,
    read_records,
)
from efficientnet.machine.environment import EnvironmentRecord
from efficientnet.measuring.clock import summarize
from efficientnet.reporting.publishing import PublishError, device_slug
from perf.measurements.scenarios import OFFLINE, SCENARIOS
from perf.pages import report
from perf.pages.document import build_document
from perf.pages.plots import draw
from perf.pages.report import ReportConfig, ReportError
from perf.pages.rows import join

BEGIN = "<!-- results: written by perf/report.py -->"
END = "<!-- /results -->"

ROOT = Path(__file__).resolve().parent.parent

STARTED = datetime(2026, 11, 22, 8, 30, tzinfo=UTC)
WEIGHTS = "c" * 64

CPU = EnvironmentRecord(
    cpu="Example(R) CPU 9000 8-Core Processor @ 3.00GHz",
    num_cores=2,
    memory_bytes=8_000_000_000,
    gpus=(),
    system="Linux 6",
    python="3.12.0",
    libraries={"torch": "2.14.0", "onnxruntime": "1.31.1"},
    git_commit="abc123",
)


# Of a test that looks at them; in others all pictures are the same.
PICTURES = ("test_the_picture_takes", "test_the_command_writes", "test_another_scenario")


@pytest.fixture(autouse=True)
def pictures_take_no_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    def save(_: Figure, file: io.BytesIO, **__: object) -> None:
        file.write(b"\x89PNG")

    if not request.node.name.startswith(PICTURES):
        monkeypatch.setattr(Figure, "savefig", save)


def program_of(runtime: str) -> str:
    return WEIGHTS if runtime == "torch" else runtime.encode().hex().ljust(64, "0")


def make_latency(
    runtime: str = "onnxruntime",
    p50_ms: float = 3.0,
    *,
    num_samples: int = 1000,
    scenario: str = "single_stream",
    batch_size: int = 1,
    **changes: object,
) -> LatencyRecord:
    samples = [p50_ms] * num_samples
    fields: dict[str, object] = {
        "program_sha256": program_of(runtime),
        "checkpoint_sha256": WEIGHTS,
        "variant": "tiny",
        "runtime": runtime,
        "precision": "fp32",
        "image_size": 32,
        "data": "digits",
        "environment": CPU,
        "started_at": STARTED,
        "batch_size": batch_size,
        "scenario": scenario,
        "timed_region": "end_to_end",
        "clock": "perf_counter",
        "num_threads": 2,
        "num_warmup": 10,
        "is_warmup_stable": True,
        "num_iterations": num_samples,
        "num_turns": 2,
        "num_input_images": 256,
        "seed": 0,
        "turn_p50_ms": (p50_ms, p50_ms),
        "samples_ms": tuple(samples),
        "throughput_images_per_s": batch_size * 1000 / statistics.fmean(samples),
        "peak_device_memory_bytes": None,
        "peak_process_memory_bytes": 100_000_000,
        "mfu": None,
        "mbu": None,
        "harness_overhead_ms": 0.002,
        "cores_busy_elsewhere": 0.0,
        **vars(summarize(samples)),
        **changes,
    }
    return LatencyRecord.model_validate(fields)


def make_accuracy(
    runtime: str = "onnxruntime", top1: float = 0.9, **changes: object
) -> AccuracyRecord:
    fields: dict[str, object] = {
        "program_sha256": program_of(runtime),
        "checkpoint_sha256": WEIGHTS,
        "variant": "tiny",
        "runtime": runtime,
        "precision": "fp32",
        "image_size": 32,
        "data": "digits",
        "environment": CPU,
        "started_at": STARTED + timedelta(hours=1),
        "top1": top1,
        "top5": 1.0,
        "num_images": 1000,
        "dataset_sha256": "d" * 64,
        **changes,
    }
    return AccuracyRecord.model_validate(fields)


def pair() -> tuple[list[LatencyRecord], list[AccuracyRecord]]:
    latencies = [
        make_latency("torch", 6.0),
        make_latency("onnxruntime", 3.0),
        make_latency("torch", 20.0, scenario="offline", batch_size=4),
        make_latency("onnxruntime", 20.0, scenario="offline", batch_size=8),
    ]
    return latencies, [make_accuracy("torch"), make_accuracy("onnxruntime")]


def markdown_of(latencies: list[LatencyRecord], accuracies: list[AccuracyRecord]) -> str:
    return report.to_markdown(build_document(join(latencies, accuracies)), {"latency.png": ""})


def data_of(page: str) -> dict:
    """Read what the page's script shows."""
    _, _, rest = page.partition('<script type="application/json" id="data">')
    return json.loads(rest.partition("</script>")[0])


def cells(markdown: str, runtime: str, scenario: str = "Single stream") -> dict[str, str]:
    """Read the row of a runtime from the table under a heading."""
    _, _, rest = markdown.partition(f"## {scenario}")
    lines = [line for line in rest.partition("\n## ")[0].splitlines() if line.startswith("|")]
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    (row,) = (line for line in split[2:] if line[1] == runtime)
    return dict(zip(split[0], row, strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    latencies, accuracies = pair()
    for record in latencies:
        append_record(tmp_path / "latency.jsonl", record)
    for record in accuracies:
        append_record(tmp_path / "accuracy.jsonl", record)
    return tmp_path


def config_of(folder: Path, **changes: object) -> ReportConfig:
    return ReportConfig(
        latency=folder / "latency.jsonl",
        accuracy=folder / "accuracy.jsonl",
        output=folder / "out",
        readme=folder / "README.md",
        **{"layers": folder / "no-layers.json", **changes},  # pyright: ignore[reportArgumentType]
    )


def test_the_report_begins_with_the_verdict():
    text = markdown_of(*pair())
    assert text.index("takes 0.50") < text.index("## ")
    assert (
        "ONNX Runtime fp32 takes 0.50 of eager PyTorch's time at batch 1 (3.00 ms against 6.00 ms) "
        "at the same top-1 of 90.0 %. At the best batch size it classifies 2.00 times as many "
        "images a second (400 at batch 8 against 200 at batch 4)."
    ) in text


def test_a_verdict_tells_what_the_speed_cost_in_accuracy():
    latencies, _ = pair()
    text = markdown_of(latencies, [make_accuracy("torch"), make_accuracy("onnxruntime", 0.885)])
    assert "at a top-1 of 88.5 % against 90.0 % (-1.5 points)" in text


def test_each_row_has_its_speed_accuracy_and_ratio():
    text = markdown_of(*pair())
    row = cells(text, "ONNX Runtime")
    assert row["variant"] == "tiny"
    assert (row["p50 ms"], row["p99 ms"], row["images/s"]) == ("3.00", "3.00", "333")
    assert (row["time / eager"], row["top-1 (images)"]) == ("0.50", "90.0 % (1,000)")
    assert (row["size px"], row["batch"], row["threads"]) == ("32", "1", "2")
    assert (row["peak memory"], row["stable"]) == ("100 MB", "yes")
    assert cells(text, "ONNX Runtime", "Offline")["images/s / eager"] == "2.00"
    assert cells(text, "eager PyTorch")["time / eager"] == "1.00"


def test_recall_balance_and_the_largest_class_stand_in_the_report():
    latencies, accuracies = pair()
    classes = (("cat", 240, 240), ("dog", 120, 0))
    changes = {"classes": classes, "num_classes": 2, "top1": 240 / 360, "num_images": 360}
    accuracies = [record.model_copy(update=changes) for record in accuracies]
    markdown = markdown_of(latencies, accuracies)
    assert cells(markdown, "ONNX Runtime")["balanced"] == "50.0 %"
    assert cells(markdown, "ONNX Runtime")["top-1 (images)"].startswith("66.7 % (360) (")
    assert "| dog | 120 | 33.3 % | 0.0 % |" in markdown
    verdict = markdown.partition("\n## ")[0]
    assert "largest class, cat: 66.7 %" in verdict


def test_the_report_says_how_where_and_when_it_was_measured():
    text = markdown_of(*pair())
    for fact in ("end_to_end", "perf_counter", "256 different held-out images of digits"):
        assert fact in text
    for fact in (CPU.cpu, "torch 2.14.0", "abc123", "2026-11-22 08:30", "2026-11-22 09:30"):
        assert fact in text
    assert "GPU rows are not measured" in text
    assert text.count("not measured here: no V100") == 1


def test_a_speed_without_accuracy_stands_apart_as_time_only():
    latencies, accuracies = pair()
    text = markdown_of(latencies, accuracies[:1])
    tables, _, time_only = text.partition("## Time only: unverified")
    assert "ONNX Runtime" not in tables
    assert "tiny ONNX Runtime fp32 (program 6f6e6e7): run `python perf/accuracy.py" in time_only
    assert re.search(
        r"\| tiny \| ONNX Runtime \| fp32 \| single stream .* unverified \|", time_only
    )


def test_the_command_for_a_missing_accuracy_names_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    artifact = tmp_path / "artifacts" / "tiny" / "onnxruntime-fp32"
    artifact.mkdir(parents=True)
    sha256 = program_of("onnxruntime")
    (artifact / "manifest.json").write_text(
        f'{{"runtime": "onnxruntime", "program_sha256": "{sha256}"}}'
    )
    latencies, accuracies = pair()
    text = markdown_of(latencies, accuracies[:1])
    assert "run `python perf/accuracy.py artifacts/tiny/onnxruntime-fp32`" in text


def test_the_eager_model_is_no_reference_without_its_accuracy():
    latencies, accuracies = pair()
    text = markdown_of(latencies, accuracies[1:])
    assert cells(text, "ONNX Runtime")["time / eager"] == "- (a)"
    assert "6.00 ms" not in text


def test_an_accuracy_of_the_same_file_in_another_runtime_does_not_count():
    other = make_accuracy("openvino", program_sha256=program_of("onnxruntime"))
    assert join([make_latency("onnxruntime")], [other]).groups == ()


def test_another_scenario_is_one_object(monkeypatch: pytest.MonkeyPatch):
    every_batch = dataclasses.replace(
        OFFLINE,
        name="every_batch",
        title="Every batch size",
        where="at each batch size",
        picks_fastest=False,
        columns=("runtime", "images/s / eager", "batch"),
        order=lambda record: record.batch_size,
        headline=lambda own, _: f"was last asked for {own.batch_size} images",
    )
    monkeypatch.setitem(SCENARIOS, every_batch.name, every_batch)
    latencies, accuracies = pair()
    for size, eager_ms, ms in ((4, 20.0, 10.0), (1, 6.0, 6.0), (2, 10.0, 9.0)):
        sizes = {"scenario": "every_batch", "batch_size": size}
        latencies.append(make_latency("torch", eager_ms, **sizes))
        latencies.append(make_latency("onnxruntime", ms, **sizes))
    joined = join(latencies, accuracies)
    text = report.to_markdown(build_document(joined), {"latency.png": ""})

    table = text.partition("## Every batch size\n\n")[2].splitlines()
    assert table[0] == "| runtime | images/s / eager | batch |"
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:8]] == [
        *(["eager PyTorch", "1.00", size] for size in "124"),
        *(["ONNX Runtime", *cells] for cells in (("1.00", "1"), ("1.11", "2"), ("2.00", "4"))),
    ]
    assert "(400 at batch 8 against 200 at batch 4). At each batch size it was last asked" in text
    assert len(draw(joined.groups)) > len(draw(join(*pair()).groups))


def test_a_record_of_an_unknown_scenario_is_left_out_and_named(folder: Path):
    append_record(folder / "latency.jsonl", make_latency(scenario="at_night"))

    text = report.main(config_of(folder)).read_text()

    assert cells(text, "ONNX Runtime")["p50 ms"] == "3.00"
    require_named(text, "at_night", *SCENARIOS)


def test_the_newest_records_count():
    later = STARTED + timedelta(days=1)
    latencies = [make_latency(p50_ms=3.0), make_latency(p50_ms=2.0, started_at=later)]
    accuracies = [make_accuracy(top1=0.5), make_accuracy(top1=0.6)]
    row = cells(markdown_of(latencies, accuracies), "ONNX Runtime")
    assert (row["p50 ms"], row["top-1 (images)"]) == ("2.00", "60.0 % (1,000)")


def test_of_offline_the_newest_best_batch_size_counts():
    latencies = [
        make_latency(scenario="offline", batch_size=8),
        make_latency(scenario="offline", batch_size=16, started_at=STARTED + timedelta(days=1)),
    ]
    text = markdown_of(latencies, [make_accuracy()])
    assert cells(text, "ONNX Runtime", "Offline")["batch"] == "16"


def test_a_ratio_is_of_rows_that_took_turns_in_the_same_run():
    latencies, accuracies = pair()
    later = make_latency("onnxruntime", 1.0, started_at=STARTED + timedelta(days=1))
    text = markdown_of([*latencies, later], accuracies)
    assert cells(text, "ONNX Runtime")["time / eager"] == "- (a)"
    assert "(a) no ratio: the eager model of the same weights was not measured in the same run" in (
        text
    )


def test_a_ratio_stays_when_the_eager_row_was_measured_again():
    latencies, accuracies = pair()
    later = make_latency("torch", 60.0, started_at=STARTED + timedelta(days=1))
    text = markdown_of([*latencies, later], accuracies)
    assert cells(text, "ONNX Runtime")["time / eager"] == "0.50"
    assert cells(text, "eager PyTorch")["p50 ms"] == "60.0"


def test_rows_of_different_machines_are_not_compared():
    latencies, accuracies = pair()
    other = CPU.model_copy(update={"cpu": "Another CPU"})
    latencies[1] = make_latency("onnxruntime", 3.0, environment=other)
    joined = join(latencies, accuracies)
    text = markdown_of(latencies, accuracies)
    assert [len(group.rows) for group in joined.groups] == [3, 1]
    assert joined.groups[1].rows[0].eager is None
    assert "## Single stream: one image at a time, machine 1" in text
    assert "accuracy measured on another machine" in text


def test_another_commit_on_the_same_machine_is_the_same_group():
    latencies, accuracies = pair()
    newer = CPU.model_copy(update={"git_commit": "def456"})
    latencies.append(make_latency("openvino", environment=newer))
    joined = join(latencies, [*accuracies, make_accuracy("openvino")])
    assert len(joined.groups) == 1


def test_two_networks_of_the_same_variant_are_told_apart():
    latencies, accuracies = pair()
    other = {"program_sha256": "e" * 64, "checkpoint_sha256": "e" * 64}
    latencies.append(make_latency("torch", 7.0, **other))
    accuracies.append(make_accuracy("torch", **other))
    text = markdown_of(latencies, accuracies)
    assert "| tiny (ccccccc) | ONNX Runtime |" in text
    assert "| tiny (eeeeeee) | eager PyTorch |" in text


def test_a_network_that_was_trained_again_takes_the_place_of_the_older_one():
    older = make_latency(p50_ms=9.0, checkpoint_sha256="a" * 64, program_sha256="a" * 64)
    newer = make_latency(started_at=STARTED + timedelta(hours=2))
    old_accuracy = make_accuracy(checkpoint_sha256="a" * 64, program_sha256="a" * 64)
    joined = join([older, newer], [old_accuracy, make_accuracy()])
    (group,) = joined.groups
    assert [row.latency for row in group.rows] == [newer]
    assert joined.unverified == ()


def test_a_percentile_that_is_missing_is_explained():
    latencies, accuracies = pair()
    latencies[1] = make_latency("onnxruntime", num_samples=150)
    text = markdown_of(latencies, accuracies)
    row = cells(text, "ONNX Runtime")
    assert (row["p50 ms"], row["p90 ms"], row["p99 ms"]) == ("3.00", "3.00", "- (a)")
    assert "(a) too few calls: p50 needs 20, p90 100, p99 1,000" in text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_warmup_stable": False}, "the warm-up had not settled"),
        ({"turn_p50_ms": (3.0, 3.5)}, "the medians of its turns differ by 15 %"),
        ({"cores_busy_elsewhere": 0.7}, "other programs kept 0.7 of 2 cores busy"),
    ],
)
def test_an_unstable_row_is_kept_and_labeled(changes: dict, reason: str):
    latencies, accuracies = pair()
    latencies[1] = make_latency("onnxruntime", **changes)
    text = markdown_of(latencies, accuracies)
    assert cells(text, "ONNX Runtime")["stable"] == "no (a)"
    assert f"(a) {reason}" in text
    assert "The measurement is not stable" in text


@pytest.mark.parametrize(
    ("records", "sentence"),
    [
        ([make_latency("torch", 6.0)], "Eager PyTorch fp32 takes 6.00 ms at batch 1 at a top-1"),
        ([make_latency(p50_ms=3.0)], "the eager model was not measured in the same run"),
        ([make_latency(num_samples=5)], "there are too few calls for a median at batch 1"),
        ([make_latency(scenario="offline", batch_size=8)], "at batch 8 at a top-1 of 90.0 %"),
    ],
)
def test_there_is_a_verdict_without_anything_to_compare(
    records: list[LatencyRecord], sentence: str
):
    text = markdown_of(records, [make_accuracy("torch"), make_accuracy("onnxruntime")])
    assert sentence in text


@pytest.mark.parametrize("num_programs", [1, 12])
def test_the_picture_takes_one_row_and_twelve(num_programs: int):
    runtimes = ["torch", *(f"runtime{i}" for i in range(1, num_programs))]
    latencies = [make_latency(runtime, 1.0 + i) for i, runtime in enumerate(runtimes)]
    picture = draw(join(latencies, [make_accuracy(runtime) for runtime in runtimes]).groups)
    assert picture.startswith(b"\x89PNG")


def test_the_command_writes_markdown_page_and_picture(folder: Path):
    made = report.main(config_of(folder))
    assert made == folder / "out" / "report.md"
    assert "![" in made.read_text() and "](latency.png)" in made.read_text()
    assert (folder / "out" / "latency.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "batches.png",
        "latency.png",
        "report.html",
        "report.md",
        "samples.png",
        "tradeoff.png",
    ]
    for picture in (folder / "out").glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert f"]({picture.name})" in made.read_text()


def test_the_page_needs_nothing_beside_it_and_fits_a_phone(folder: Path):
    report.main(config_of(folder))
    page = (folder / "out" / "report.html").read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "prefers-color-scheme: dark" in page
    assert all(
        source.startswith("data:") for source in re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    )
    # The name of SVG is an address that nothing is loaded from.
    outside = page.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"src=|url\(|@import|https?://|fetch\(", outside)
    assert "ONNX Runtime fp32 takes 0.50 of eager PyTorch&#x27;s time" in page


def test_names_cannot_put_markup_into_the_page(folder: Path):
    variant = "<script>alert(1)</script>"
    append_record(folder / "latency.jsonl", make_latency("<b>", variant=variant))
    append_record(folder / "accuracy.jsonl", make_accuracy("<b>", variant=variant))
    report.main(config_of(folder))
    page = (folder / "out" / "report.html").read_text()
    assert page.count("<script") == 2 and "<b>" not in page
    assert variant in [row["cells"][0] for row in data_of(page)["rows"]]


def test_without_any_accuracy_there_is_no_report_but_a_command(folder: Path):
    (folder / "accuracy.jsonl").unlink()
    with raises_naming(ReportError, "python perf/accuracy.py"):
        report.main(config_of(folder))
    assert not (folder / "out").exists()


def test_without_any_latency_the_error_says_what_to_run(tmp_path: Path):
    with raises_naming(ReportError, "python perf/latency.py"):
        report.main(config_of(tmp_path))


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (('"format_version":1', '"format_version":9'), ("line 2", "version 9")),
        (('"batch_size":1', '"batch_size":0'), ("line 2", "batch_size")),
        (("{", ""), ("line 2", "JSON")),
    ],
)
def test_a_record_that_cannot_be_read_is_named_with_its_line_and_the_others_stay(
    folder: Path, change: tuple[str, str], facts: tuple[str, ...]
):
    path = folder / "latency.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = lines[1].replace(*change)
    path.write_text("\n".join(lines) + "\n")

    text = report.main(config_of(folder)).read_text()

    (line,) = (line for line in text.splitlines() if "line 2" in line)
    require_named(line, "latency.jsonl", *facts)
    assert str(folder) not in text
    assert cells(text, "eager PyTorch")["p50 ms"] == "6.00"
    assert cells(text, "ONNX Runtime", "Offline")["batch"] == "8"


def test_where_no_record_can_be_read_the_error_says_why(folder: Path):
    path = folder / "latency.jsonl"
    path.write_text(path.read_text().replace('"format_version":1', '"format_version":9'))

    with raises_naming(ReportError, path, "version 9", "python perf/latency.py"):
        report.main(config_of(folder))


def test_publishing_is_a_flag_without_a_value():
    assert parse_flags(ReportConfig, None, ["--publish"]).publish
    assert not parse_flags(ReportConfig, None, []).publish


def test_publishing_copies_the_records_used_and_writes_the_table(folder: Path):
    time_only = make_latency("without_accuracy")
    append_record(folder / "latency.jsonl", time_only)
    (folder / "README.md").write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nThe end.\n")
    report.main(config_of(folder, publish=True))
    report.main(config_of(folder, publish=True))
    published = next((folder / "out" / "published").iterdir())
    assert published.name == "2026-11-22-example-9000-2-cores"
    assert sorted(path.name for path in published.iterdir()) == [
        "accuracy.jsonl",
        "batches.png",
        "latency.jsonl",
        "latency.png",
        "report.md",
        "samples.png",
        "tradeoff.png",
    ]
    latencies, accuracies = pair()
    key = LatencyRecord.model_dump_json
    found = read_records(published / "latency.jsonl", LatencyRecord)
    assert sorted(found, key=key) == sorted([*latencies, time_only], key=key)
    assert len(read_records(published / "accuracy.jsonl", AccuracyRecord)) == len(accuracies)
    readme = (folder / "README.md").read_text()
    assert readme.startswith(f"# Title\n\n{BEGIN}\n") and readme.endswith(f"{END}\n\nThe end.\n")
    assert "old" not in readme
    assert "ONNX Runtime fp32 takes 0.50" in readme
    assert f"](out/published/{published.name}/report.md)" in readme
    assert readme.count("| tiny | ONNX Runtime |") == 2
    assert readme.count("| unverified |") == 1


def test_published_files_hold_no_path_of_this_machine(folder: Path):
    (folder / "README.md").write_text(f"{BEGIN}\n{END}\n")
    report.main(config_of(folder, publish=True))
    texts = [path for path in (folder / "out").rglob("*") if path.suffix in {".md", ".jsonl"}]
    assert len(texts) == 4
    for path in [*texts, folder / "README.md"]:
        assert str(folder) not in path.read_text()
        assert str(Path.home()) + "/" not in path.read_text()


def test_publishing_takes_the_samples_along(folder: Path):
    (folder / "README.md").write_text(f"{BEGIN}\n{END}\n")
    np.save(folder / "samples.npy", np.ones(1000, dtype=np.float32))
    (folder / "latency.jsonl").unlink()
    append_record(folder / "latency.jsonl", make_latency(samples_ms="samples.npy"))
    report.main(config_of(folder, publish=True))
    published = next((folder / "out" / "published").iterdir())
    assert np.load(published / "samples.npy").size == 1000


def test_publishing_without_the_samples_is_an_error(folder: Path):
    (folder / "README.md").write_text(f"{BEGIN}\n{END}\n")
    append_record(folder / "latency.jsonl", make_latency(samples_ms="gone.npy"))
    with raises_naming(PublishError, "gone.npy"):
        report.main(config_of(folder, publish=True))
    assert not (folder / "out" / "published").exists()


@pytest.mark.parametrize("readme", [None, "# Title\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n"])
def test_publishing_needs_a_place_in_the_readme(folder: Path, readme: str | None):
    if readme is not None:
        (folder / "README.md").write_text(readme)
    with raises_naming(PublishError, "README.md"):
        report.main(config_of(folder, publish=True))
    assert not (folder / "out" / "published").exists()


def test_a_measured_v100_row_takes_the_place_of_the_papers_line():
    v100 = CPU.model_copy(update={"gpus": ("Tesla V100-SXM2-16GB, 16384 MiB, 535.1",)})
    changes = {"environment": v100, "precision": "fp16"}
    records = [make_latency("tensorrt", scenario="offline", batch_size=16, **changes)]
    text = markdown_of(records, [make_accuracy("tensorrt", **changes)])
    assert "no V100" not in text


def test_a_row_below_its_floor_says_that_the_floor_is_wrong():
    latencies, accuracies = pair()
    possible = [record.model_copy(update={"floor_ms": 1.0}) for record in latencies]
    assert "which therefore is wrong" not in markdown_of(possible, accuracies)
    impossible = [record.model_copy(update={"floor_ms": 4.0}) for record in latencies]
    text = markdown_of(impossible, accuracies)
    assert "0.75 (" in text and "which therefore is wrong" in text


def test_a_machine_is_named_by_its_instruction_sets():
    sets = ("avx2", "avx512", "vnni", "bf16", "amx")
    xeon = CPU.model_copy(
        update={"cpu": "Intel(R) Xeon(R) Processor", "instruction_sets": sets, "num_cores": 2}
    )
    assert device_slug([xeon]) == "intel-xeon-avx2-avx512-vnni-bf16-amx-2-cores"
    assert "Xeon(R) Processor with avx2, avx512, vnni, bf16, amx" in xeon.processor
    # A record from before they were written down.
    assert device_slug([xeon.model_copy(update={"instruction_sets": ()})]) == "intel-xeon-2-cores"


def test_a_rate_within_a_bound_is_told_with_all_that_were_tried():
    latencies, accuracies = pair()
    tried = (
        TriedRate(images_per_s=50, num_images=1000, num_late=3, p99_ms=14, held=True),
        TriedRate(images_per_s=75, num_images=640, num_late=11, p99_ms=None, held=False),
        TriedRate(images_per_s=50, num_images=1000, num_late=4, p99_ms=15, held=True),
    )
    load = ServerLoad(bound_ms=15, images_per_s=50, tried=tried)
    none = ServerLoad(bound_ms=15, images_per_s=0, tried=tried[1:2])
    for runtime, server in (("torch", none), ("onnxruntime", load)):
        changes = {"throughput_images_per_s": server.images_per_s, "server": server}
        latencies.append(make_latency(runtime, scenario="server", **changes))

    text = markdown_of(latencies, accuracies)

    row = cells(text, "ONNX Runtime", "Server")
    assert (row["bound ms"], row["images/s"], row["images/s / eager"]) == ("15.0", "50.0", "- (a)")
    assert "(a) no ratio: the eager model kept the bound at no rate" in text
    assert cells(text, "eager PyTorch", "Server")["images/s"].startswith("none (")
    assert "50.0/s held (p99 14.0 ms); 75.0/s did not (11 of 640 late)" in text
    assert "within 15.0 ms at up to 50.0 images a second" not in text.partition("\n## ")[0]


def test_the_page_has_what_two_rows_are_compared_by(folder: Path):
    hits = pack_hits([True] * 900 + [False] * 100)
    append_record(folder / "accuracy.jsonl", make_accuracy("onnxruntime", hits=hits))
    path = folder / "latency.jsonl"
    path.unlink()
    for record in pair()[0]:
        append_record(path, record.model_copy(update={"floor_ms": 1.5, "mfu": 0.5, "mbu": 0.1}))
    report.main(config_of(folder))

    data = data_of((folder / "out" / "report.html").read_text())

    assert [table["scenario"] for table in data["tables"]] == ["single_stream", "offline"]
    eager, onnx = data["rows"][:2]
    assert (eager["isEager"], onnx["isEager"]) == (True, False)
    assert (onnx["p50"], onnx["floor"], onnx["limit"]) == (3, 1.5, "computing")
    assert (onnx["top1"], data["hits"][onnx["hits"]]) == (0.9, hits)
    assert onnx["low"] < 0.9 < onnx["high"]
    assert (onnx["turns"], len(onnx["quantiles"])) == ([3, 3], 41)
    assert eager["hits"] is None


def test_a_thousand_records_are_a_page_whose_rows_the_script_shows_in_pages(tmp_path: Path):
    with (
        (tmp_path / "latency.jsonl").open("w") as latencies,
        (tmp_path / "accuracy.jsonl").open("w") as accuracies,
    ):
        for number in range(1_000):
            runtime = ("onnxruntime", "openvino", "native")[number % 3]
            program: dict[str, Any] = {"program_sha256": f"{number:064x}"}
            latency = make_latency(runtime, 1 + number / 1000, num_samples=20, **program)
            latencies.write(latency.model_dump_json() + "\n")
            accuracies.write(make_accuracy(runtime, **program).model_dump_json() + "\n")

    report.main(config_of(tmp_path))

    page = (tmp_path / "out" / "report.html").read_text()
    assert len(data_of(page)["rows"]) == 1_000
    assert len(page) < 1_500_000
    # What the browser lays out before the script runs.
    assert page.count("<tr>") < 50 and "ROWS_A_PAGE" in page
    assert (tmp_path / "out" / "latency.png").stat().st_size < 2_000_000


def test_times_over_commits_are_a_line_for_each_program_of_a_machine(folder: Path):
    old, new = (CPU.model_copy(update={"git_commit": commit}) for commit in ("old", "new"))
    earlier = STARTED - timedelta(days=7)
    (folder / "history" / "a").mkdir(parents=True)
    for ms, environment, started_at in ((5.0, old, earlier), (4.0, new, earlier + timedelta(1))):
        record = make_latency(p50_ms=ms, environment=environment, started_at=started_at)
        append_record(folder / "history" / "a" / "latency.jsonl", record)
    elsewhere = new.model_copy(update={"cpu": "Another CPU"})
    append_record(folder / "history" / "latency.jsonl", make_latency(environment=elsewhere))

    report.main(config_of(folder, history=folder / "history"))

    (line,) = data_of((folder / "out" / "report.html").read_text())["history"]
    assert (line["network"], line["runtime"], line["batch"]) == ("tiny, 32 px", "ONNX Runtime", 1)
    assert [(commit, p50) for commit, _, p50 in line["points"]] == [
        ("old", 5.0),
        ("new", 4.0),
        ("abc123", 3.0),
    ]
    assert (folder / "out" / "history.png").is_file()
    with raises_naming(FileNotFoundError, "--history", folder / "nowhere"):
        report.main(config_of(folder, history=folder / "nowhere"))


def test_layers_that_were_measured_stand_beside_their_limits(folder: Path):
    layers = next((ROOT / "reports" / "published").glob("*/layers-v2-s-384px-int8.json"))
    report.main(config_of(folder, layers=layers))

    data = data_of((folder / "out" / "report.html").read_text())
    (own,) = data["layers"].values()
    assert len(own) == 20 and own[0]["ms"] > own[0]["least"] > 0
    assert "](layers.png)" in (folder / "out" / "report.md").read_text()
    damaged = folder / "layers.json"
    damaged.write_text(layers.read_text().replace('"format_version": 1', '"format_version": 9'))
    text = report.main(config_of(folder, layers=damaged)).read_text()
    require_named(text, "layers.json", "version 9", "python perf/layers.py")
