import json
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
from facts import raises_naming
from test_perf_report import CPU, make_latency

from efficientnet.formats.records import append_record
from efficientnet.machine.environment import current_environment
from efficientnet.network.variants import VARIANTS
from perf.studies import paper, paper_network
from perf.studies.config import PaperConfig
from perf.studies.paper import (
    PaperError,
    PaperRecord,
    PaperTimes,
    RowRecord,
    measure_row,
    section_of,
    verdict,
)
from perf.studies.paper_tables import NVIDIA_MS, TABLES, TIMM, PaperRow, PaperTable

SMALL = PaperTable(
    "Table 10: small",
    "ms",
    (
        PaperRow("Tiny", "tiny", 32, 5.0, 2),
        PaperRow("ResNet", "timm:resnet10t", 32, 7.0, 2),
        PaperRow("Nobody's", None, 0, None, 2),
        PaperRow("Broken", "timm:no_such_network", 32, 9.0, 2),
    ),
)
TIMES = PaperTimes(
    precision="fp16",
    samples_ms=((10.0, 12.0), (14.0,)),
    elapsed_s=0.036,
)
V100 = CPU.model_copy(update={"gpus": ("Tesla V100-SXM2-16GB, 16160 MiB, 550.54",)})


def make_row(ours: float | None = 25.0, paper: float | None = 24.0, **changes: object) -> RowRecord:
    fields: dict[str, object] = {
        "label": "EfficientNetV2-S",
        "network": "v2-s",
        "image_size": 384,
        "batch_size": 16,
        "paper": paper,
        "ours": ours,
        "times": TIMES if ours else None,
        "why_not": None if ours else "not asked for",
        "artifact": None,
        "artifact_value": None,
        "projected": None,
        **changes,
    }
    return RowRecord.model_validate(fields)


def make_record(rows: tuple[RowRecord, ...], **changes: object) -> PaperRecord:
    fields: dict[str, object] = {
        "environment": V100,
        "started_at": datetime(2026, 11, 29, tzinfo=UTC),
        "table": "10",
        "unit": "ms",
        "device": "Tesla V100-SXM2-16GB",
        "precision": "fp16",
        "num_threads": 2,
        "rows": rows,
        **changes,
    }
    return PaperRecord.model_validate(fields)


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        (24.0, "reproduced within 1 %"),
        (26.2, "reproduced within 9 %"),
        (22.0, "reproduced within 8 %"),
        (30.0, "not reproduced: 25 % slower"),
        (12.0, "not reproduced: 50 % faster"),
        (None, "not measured"),
    ],
)
def test_the_verdict_is_of_what_was_measured_on_the_papers_device(ours: float | None, words: str):
    assert verdict(make_row(ours), make_record(())) == words


def test_more_images_a_second_are_faster():
    record = make_record((), unit="images/s")
    assert verdict(make_row(48.0), record) == "not reproduced: 100 % faster"


@pytest.mark.parametrize(
    "changes", [{"device": "NVIDIA A100-SXM4-80GB"}, {"precision": "fp32"}, {"device": "a CPU"}]
)
def test_unlike_is_not_compared(changes: dict[str, str]):
    assert verdict(make_row(24.0), make_record((), **changes)).startswith("no verdict")
    assert verdict(make_row(24.0, batch_size=None), make_record(())).startswith("no verdict")


def test_every_row_names_a_network_that_can_be_built_or_none():
    timm = pytest.importorskip("timm")
    for table in TABLES.values():
        for row in table.rows:
            if row.network is None:
                continue
            known = row.network in VARIANTS or timm.is_model(row.network.removeprefix(TIMM))
            assert known and row.image_size >= 192, row.label
    assert VARIANTS.keys() >= NVIDIA_MS.keys()


def test_the_printed_times_are_those_of_the_variants():
    for row in TABLES["7"].rows:
        if row.network in VARIANTS:
            published = VARIANTS[row.network].published
            assert published is not None and published.latency_ms == row.value
            assert VARIANTS[row.network].eval_image_size == row.image_size


def test_times_of_the_appendix_and_of_table_7_are_the_same():
    at_16 = {row.network: row.value for row in TABLES["batch"].rows if row.batch_size == 16}
    for row in TABLES["7"].rows:
        if (rate := at_16.get(row.network)) and row.value:
            assert 16 / rate == pytest.approx(row.value / 1000, rel=0.01)


@pytest.mark.usefixtures("own_processes")
def test_a_row_is_measured_in_a_process_of_its_own():
    row = PaperRow("Tiny", "tiny", 32, 5.0, 4)
    times = measure_row(row, PaperConfig("10", seconds=0.1), 1)
    assert isinstance(times, PaperTimes), times
    assert times.precision == "fp32" and len(times.samples_ms) == paper.TURNS


def test_a_table_is_measured_and_rows_that_fail_leave_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TABLES, "10", SMALL)
    # In this process, whose memory is not to be limited.
    monkeypatch.setattr(paper_network, "_limit_memory", lambda: None)
    here = current_environment()
    changes = {"environment": here, "scenario": "offline", "batch_size": 2}
    append_record(Path("reports/latency.jsonl"), make_latency("openvino", 0.5, **changes))
    append_record(
        Path("reports/latency.jsonl"), make_latency("native", 0.1, **{**changes, "batch_size": 1})
    )
    readme = tmp_path / "results.md"
    readme.write_text("<!-- paper: written by a command -->\n<!-- /paper -->\n")
    config = PaperConfig("10", seconds=0.1, projected=True, threads=1, publish=True, readme=readme)
    path = paper.main(config)
    rows = json.loads(path.with_suffix(".json").read_text())["rows"]
    assert [row["ours"] is not None for row in rows] == [True, True, False, False]
    assert rows[2]["why_not"] == "neither this project nor timm has it"
    assert "no_such_network" in rows[3]["why_not"]
    assert (rows[0]["artifact"], rows[0]["artifact_value"]) == ("OpenVINO fp32", 0.5)
    assert rows[1]["projected"] is None and 0 < rows[0]["projected"] < rows[0]["ours"]
    text = path.read_text()
    assert "paper's device is a V100 GPU, this one is a CPU" in text
    assert "not measured: neither this project nor timm has it" in text
    assert text.count("no verdict: not a V100") == 2
    assert "this one is a CPU" in caplog.text
    assert (
        section_of(PaperRecord.model_validate_json(path.with_suffix(".json").read_text())) in text
    )
    assert "**Table 10: small, ms, on" in readme.read_text()


def test_rows_that_are_not_asked_for_are_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paper, "measure_row", lambda *_: TIMES)
    record = json.loads(paper.main(PaperConfig("7", ("v2-s",))).with_suffix(".json").read_text())
    measured = [row["label"] for row in record["rows"] if row["ours"] is not None]
    assert measured == ["EfficientNetV2-S"]
    assert record["rows"][-4]["ours"] == 12.0
    with raises_naming(ValueError, "table 10", "EfficientNet-B7"):
        paper.main(PaperConfig("10", ("b3",)))


def test_a_run_that_was_ended_is_resumed_with_the_rows_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    measured: list[str] = []

    def measure(row: PaperRow, *_: object) -> PaperTimes:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(row.label)
        return TIMES

    def is_measured() -> list[bool]:
        rows = json.loads(Path("reports/paper/table-10.json").read_text())["rows"]
        return [row["ours"] is not None for row in rows]

    monkeypatch.setattr(paper, "measure_row", measure)
    monkeypatch.setitem(TABLES, "10", SMALL)
    with raises_naming(PaperError, "table-10.json", "leave it out"):
        paper.main(PaperConfig("10", resume=True))
    # The last one first: what is kept stays, wherever a resumed run ends.
    paper.main(PaperConfig("10", ("no_such_network",)))
    with pytest.raises(KeyboardInterrupt):
        paper.main(PaperConfig("10", resume=True))
    assert measured == ["Broken", "Tiny"] and is_measured() == [True, False, False, True]
    measured.clear()
    started_at = json.loads(Path("reports/paper/table-10.json").read_text())["started_at"]
    path = paper.main(PaperConfig("10", resume=True))
    assert measured == ["ResNet", "Nobody's"] and is_measured() == [True] * 4
    assert json.loads(path.with_suffix(".json").read_text())["started_at"] == started_at
    for changes in ({"seconds": 61.0}, {"threads": 7}):
        with raises_naming(PaperError, *changes.values(), "measure all rows again"):
            paper.main(PaperConfig("10", resume=True, **changes))  # pyright: ignore[reportArgumentType]
    path.with_suffix(".json").write_text("{}")
    with raises_naming(PaperError, "table-10.json", "damaged"):
        paper.main(PaperConfig("10", resume=True))


def test_training_rows_come_from_the_records_of_training_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    text = paper.main(PaperConfig("3")).read_text()
    assert text.count("not measured: run python training/speed.py --table 3") == 4


def test_latencies_of_each_runtime_stand_beside_table_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    here, other_day = current_environment(), datetime(2026, 11, 1, tzinfo=UTC)
    small = (PaperRow("None", "tiny", 32, 155, tpu=262), PaperRow("Fused", "b0", 32, 216))
    table = PaperTable("Table 3: small", "images/s", small, True, has_latencies=True)
    monkeypatch.setitem(TABLES, "3", table)
    for runtime, ms, changes in (
        ("torch", 9.0, {"started_at": other_day}),
        ("torch", 8.0, {}),
        ("openvino", 2.0, {}),
        ("openvino", 0.5, {"precision": "int8", "turn_p50_ms": (0.5, 0.7, 0.9)}),
        ("onnxruntime", 3.0, {"image_size": 64}),
        ("onnxruntime", 3.0, {"num_threads": 1}),
        ("onnxruntime", 3.0, {"scenario": "offline"}),
        ("onnxruntime", 3.0, {"environment": CPU.model_copy(update={"cpu": "Another CPU"})}),
        ("native", 4.0, {"variant": "b0", "precision": "bf16"}),
    ):
        record = make_latency(runtime, ms, **{"environment": here, **changes})
        append_record(Path("reports/latency.jsonl"), record)

    path = paper.main(PaperConfig("3", threads=2))

    text = path.read_text()
    header, _, *lines = (line for line in text.splitlines() if line.startswith("|"))
    first, second = (
        dict(zip(header.split(" | "), line.split(" | "), strict=True)) for line in lines
    )
    assert (first["paper: V100"], first["paper: TPU core"]) == ("155", "262")
    none = "not measured"
    assert {name: cell for name, cell in first.items() if name.endswith(", ms")} == {
        "eager PyTorch fp32, ms": "8.00",
        "ONNX Runtime fp32, ms": none,
        "OpenVINO fp32, ms": "2.00",
        "OpenVINO int8, ms": "0.700",
        "native engine bf16, ms": none,
    }
    assert (second["native engine bf16, ms"], second["OpenVINO fp32, ms"]) == ("4.00", none)
    assert "All its programs took turns" in text and "no verdict: not a V100" not in text
    record = PaperRecord.model_validate_json(path.with_suffix(".json").read_text())
    (eager, *_), changes = record.rows[0].latencies, {"started_at": other_day}
    rows = (
        record.rows[0],
        record.rows[1].model_copy(update={"latencies": (eager, eager.model_copy(update=changes))}),
    )
    assert "Of 2 runs" in section_of(record.model_copy(update={"rows": rows}))


def test_nvidias_numbers_stand_beside_and_a_projection_says_its_error():
    text = section_of(make_record((make_row(label="B7", network="b7"), make_row(projected=30.0))))
    header, _, first, second = (line for line in text.splitlines() if line.startswith("|"))
    cells = dict(zip(header.split(" | "), second.split(" | "), strict=True))
    assert cells["NVIDIA V100 TensorRT fp16"] == "12.8"
    assert cells["NVIDIA A100 TensorRT int8"] == "3.90"
    assert cells["projected"] == "30.0 (+25 %)"
    assert re.search(r"\| 97\.3 \| .* \| 52\.8 \|", first)
    assert "Projected: no measurement" in text
