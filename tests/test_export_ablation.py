import sys
from collections import Counter
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from facts import raises_naming

from efficientnet.errors import PipelineError
from efficientnet.formats.checkpoint import load_checkpoint
from efficientnet.machine.environment import current_environment
from efficientnet.network.model import EfficientNet
from efficientnet.runtimes.names import RUNTIMES, RuntimeName
from export.builders.measuring import measure_callables
from export.graphs.folding import count_ops
from export.graphs.fusion_forms import FORMS, EagerModel, graph_in_form, model_in_form
from export.studies import form_comparison as ablation
from export.studies.form_comparison import (
    AblationConfig,
    AblationRecord,
    FormRecord,
    table_of,
    to_markdown,
    why_not_here,
)

ROOT = Path(__file__).resolve().parent.parent

IMAGE = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> EfficientNet:
    return load_checkpoint(tiny_checkpoint)[0]


@pytest.fixture(scope="module")
def graphs(model: EfficientNet) -> dict[str, onnx.ModelProto]:
    return {form: graph_in_form(model, 32, form) for form in FORMS}


def row(form: str, turns: tuple[float, ...], base: tuple[float, ...]) -> FormRecord:
    return FormRecord(
        runtime="onnxruntime",
        form=form,  # type: ignore[arg-type]
        turn_p50_ms=turns,
        turn_ratios=tuple(a / b for a, b in zip(turns, base, strict=True)),
        max_abs_logit_error=2e-6,
        executed={"conv 1x1": 5, "SiLU": 2},
    )


def record(rows: list[FormRecord]) -> AblationRecord:
    return AblationRecord(
        variant="tiny",
        image_size=32,
        checkpoint_sha256="0" * 64,
        num_parity_images=64,
        data="digits",
        seconds=1.0,
        environment=current_environment(),
        started_at=datetime(2026, 1, 2, tzinfo=UTC),
        rows=tuple(rows),
    )


def test_only_nothing_has_batch_norm_and_only_fused_pools_globally(graphs):
    ops = {form: count_ops(graph) for form, graph in graphs.items()}
    assert [ops[form]["BatchNormalization"] for form in FORMS] == [19, 0, 0]
    assert [ops[form]["GlobalAveragePool"] for form in FORMS] == [0, 0, 5]
    assert [ops[form]["Gemm"] for form in FORMS] == [9, 9, 1]
    assert ops["nothing"] - ops["folded"] == {"BatchNormalization": 19}


def test_what_is_done_by_hand_leaves_what_the_exporter_would(model: EfficientNet, graphs):
    program = torch.onnx.export(
        model_in_form(model, "folded"),
        (torch.zeros(2, 3, 32, 32),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None
    assert count_ops(graphs["folded"]) == count_ops(program.model_proto)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_answers_like_the_network(model: EfficientNet, form):
    with torch.inference_mode():
        expected = model(torch.from_numpy(IMAGE)).numpy()
    found = EagerModel(model_in_form(model, form), "cpu")(IMAGE)
    # Rounding of folded weights, and another order of additions.
    np.testing.assert_allclose(found, expected, atol=1e-3 * expected.std())


def test_eager_torch_executes_every_operator_that_is_written(model: EfficientNet):
    counted: dict[str, Counter[str]] = {}
    for form in FORMS:
        infer = EagerModel(model_in_form(model, form), "cpu")
        with ablation.CountOperators() as operators:
            infer(IMAGE)
        counted[form] = operators.operators
    assert counted["nothing"].total() - counted["folded"].total() == 19
    assert counted["nothing"]["silu_"] == 17 and counted["fused"]["mul"] == 4


def test_a_gain_of_nothing_is_printed_as_that():
    base = (10.0, 10.0, 30.0, 30.0)
    rows = [
        row("nothing", base, base),
        row("folded", base, base),
        row("fused", (9.0, 9.5, 28.0, 30.5), base),
    ]
    text = table_of(rows).markdown()
    assert "| BN folded | 20.0 | 1.00 | 1.00 to 1.00 | 2.0e-06 | 7 | no gain |" in text
    assert "| BN folded + SE fused | 18.8 | 0.94 | 0.90 to 1.02 | 2.0e-06 | 7 | no gain |" in text


@pytest.mark.parametrize(("factor", "verdict"), [(0.9, "faster"), (1.1, "slower")])
def test_a_form_is_faster_or_slower_only_if_every_turn_says_so(factor: float, verdict: str):
    assert row("fused", (factor, factor * 3), (1.0, 3.0)).verdict == verdict


def test_the_published_text_names_what_is_executed_and_why_a_runtime_is_missing():
    missing = [FormRecord(runtime="tensorrt", form=form, reason="no GPU") for form in FORMS]
    text = to_markdown(record([row("fused", (1.0,), (1.0,)), *missing]))
    assert "- onnxruntime: 5 conv 1x1, 2 SiLU" in text
    assert text.count("not measured: no GPU") == 1 and "| tensorrt | all |" in text
    assert "2026-01-02 UTC" in text


def test_a_runtime_without_its_device_or_library_gives_a_reason(monkeypatch: pytest.MonkeyPatch):
    for runtime in ("torch-cuda", "aoti-cuda", "tensorrt"):
        reason = why_not_here(runtime)  # type: ignore[arg-type]
        assert reason is not None and "no NVIDIA GPU answers here" in reason
    monkeypatch.setitem(RUNTIMES, "openvino", RuntimeName("OpenVINO", "no_such_library"))
    assert why_not_here("openvino") == "No module named 'no_such_library'"
    assert why_not_here("onnxruntime") is None


@pytest.mark.usefixtures("own_processes")
def test_a_process_that_dies_is_named():
    with raises_naming(PipelineError, "broken", "exit code 1"):
        measure_callables({"broken": partial(sys.exit, 1)}, IMAGE, seconds=0.02, turns=1)


def test_what_was_measured_is_published(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "docs" / "results.md"
    results.parent.mkdir()
    results.write_text("# Title\n\n<!-- fusion: written by a command -->\n<!-- /fusion -->\n")
    found = ablation.main(
        AblationConfig(
            checkpoint=tiny_checkpoint,
            runtimes=("onnxruntime",),
            seconds=0.1,
            turns=2,
            num_parity_images=64,
            publish=True,
        )
    )
    for line in found.rows:
        assert line.reason is None and len(line.turn_p50_ms) == 2 and min(line.turn_p50_ms) > 0
        assert line.executed is not None and line.executed["SiLU"] == 13
    assert "| onnxruntime | BN folded + SE fused |" in results.read_text()
    (published,) = (tmp_path / "reports" / "published").glob("*/fusion.json")
    assert AblationRecord.model_validate_json(published.read_text()) == found
    assert published.with_suffix(".md").is_file()
