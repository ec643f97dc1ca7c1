import subprocess
import sys
import zipfile
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from facts import raises_naming
from onnx import helper

from efficientnet.errors import PipelineError
from efficientnet.formats.checkpoint import load_checkpoint
from efficientnet.machine.environment import current_environment
from efficientnet.network.model import EfficientNet
from efficientnet.reporting.publishing import PublishError
from efficientnet.runtimes.names import RUNTIMES, RuntimeName
from export.builders.measuring import measure_callables
from export.graphs.folding import count_ops
from export.graphs.fusable_parts import (
    GATE_MUL,
    GATE_SIGMOID,
    RESIDUAL,
    SILU,
    Executed,
    FusedPart,
    count_parts,
    find_parts,
)
from export.graphs.fusion_forms import FORMS, EagerModel, graph_in_form, model_in_form, open_eager
from export.studies import form_comparison as ablation
from export.studies.ablation_rows import FormRecord, why_not_here
from export.studies.executed_layers import (
    executed_by_inductor,
    executed_by_onnxruntime,
    executed_by_openvino,
    executed_by_tensorrt,
    executed_by_torch,
)
from export.studies.form_comparison import AblationConfig, AblationRecord, table_of, to_markdown

ROOT = Path(__file__).resolve().parent.parent

# tiny: 19 convolutions with batch norm, 13 of them with SiLU; four blocks with squeeze-excite, each
# with one SiLU inside; four blocks with a residual.
TINY_PARTS = {RESIDUAL: 4, GATE_SIGMOID: 4, GATE_MUL: 4, SILU: 17}

IMAGE = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> EfficientNet:
    return load_checkpoint(tiny_checkpoint)[0]


@pytest.fixture(scope="module")
def graphs(model: EfficientNet) -> dict[str, onnx.ModelProto]:
    return {form: graph_in_form(model, 32, form) for form in FORMS}


def row(form: str, turns: tuple[float, ...], base: tuple[float, ...]) -> FormRecord:
    fused = FusedPart(part=SILU, total=3, executed_by={"QuickGelu": 2, "Conv": 1})
    return FormRecord(
        runtime="onnxruntime",
        form=form,  # type: ignore[arg-type]
        turn_p50_ms=turns,
        turn_ratios=tuple(a / b for a, b in zip(turns, base, strict=True)),
        max_abs_logit_error=2e-6,
        executed=Executed(kinds={"Conv": 5, "QuickGelu": 2}, fates=(fused,)),
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


def where(executed: Executed, part: str) -> dict[str, int]:
    (fused,) = (fused for fused in executed.fates if fused.part == part)
    return fused.executed_by


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


@pytest.mark.parametrize("form", FORMS)
def test_the_parts_are_found_in_every_graph(model: EfficientNet, graphs, form):
    found = find_parts(graphs[form].graph)
    assert {part: len(nodes) for part, nodes in found.items()} == TINY_PARTS
    assert count_parts(model) == TINY_PARTS


def test_onnxruntime_folds_batch_norm_by_itself_and_keeps_silu_apart(graphs, tmp_path: Path):
    executed: dict[str, Executed] = {}
    for form, graph in graphs.items():
        onnx.save(graph, tmp_path / f"{form}.onnx")
        executed[form] = executed_by_onnxruntime(tmp_path / f"{form}.onnx", IMAGE, TINY_PARTS)
    assert all("BatchNormalization" not in e.kinds for e in executed.values())
    assert 0 < executed["folded"].num_nodes <= executed["nothing"].num_nodes
    assert where(executed["fused"], SILU) == {"QuickGelu": 17}
    assert where(executed["fused"], GATE_SIGMOID) == {"Conv": 4}
    assert where(executed["nothing"], GATE_SIGMOID) == {"FusedGemm": 4}
    for part, total in TINY_PARTS.items():
        assert sum(where(executed["fused"], part).values()) == total


def test_openvino_does_silu_and_the_gates_sigmoid_inside_of_convolutions(graphs, tmp_path: Path):
    onnx.save(graphs["fused"], tmp_path / "model.onnx")
    executed = executed_by_openvino(tmp_path / "model.onnx", IMAGE, graphs["fused"])
    assert where(executed, SILU) == {"Convolution": 17}
    assert where(executed, GATE_SIGMOID) == {"Convolution": 4}
    assert not {"Const", "Input", "Output"} & set(executed.kinds)
    assert executed.kinds["Convolution"] == 27


def test_eager_torch_executes_every_operator_that_is_written(model: EfficientNet):
    executed = {
        form: executed_by_torch(EagerModel(model_in_form(model, form), "cpu"), IMAGE, TINY_PARTS)
        for form in FORMS
    }
    assert executed["nothing"].num_nodes - executed["folded"].num_nodes == 19
    assert where(executed["nothing"], SILU) == {"silu_": 17}
    assert where(executed["fused"], GATE_MUL) == {"mul": 4}


def test_what_inductor_fused_is_read_from_the_code_of_the_package(tmp_path: Path):
    library = "AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mkldnn__convolution_pointwise"
    code = f"""
void AOTInductorModel::run_impl(
    cpp_fused_clone_0((const float*)(a.data_ptr()));
    {library}(buf0, w, "swish", {{}}, &out));
    {library}(buf0, w, "none", {{}}, &out));
    {library}(buf0, w, "sigmoid", {{}}, &out));
    {library}_binary_(buf0, buf1, w, "add", &alpha));
    cpp_fused_mul_unsqueeze_4((float*)(b.data_ptr()));
    cpp_fused_mul_unsqueeze_12((float*)(b.data_ptr()));
}} // AOTInductorModel::run_impl
    cpp_fused_mul_99(elsewhere);
"""
    package = tmp_path / "model.pt2"
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("model/data/aotinductor/model/abc.wrapper.cpp", code)
    totals = {RESIDUAL: 1, GATE_SIGMOID: 1, GATE_MUL: 2, SILU: 2}
    executed = executed_by_inductor(package, totals)
    assert executed.kinds == {
        "mkldnn__convolution_pointwise": 3,
        "cpp_fused_mul_unsqueeze": 2,
        "cpp_fused_clone": 1,
        "mkldnn__convolution_pointwise_binary": 1,
    }
    assert where(executed, RESIDUAL) == {"mkldnn__convolution_pointwise_binary": 1}
    assert where(executed, GATE_SIGMOID) == {"mkldnn__convolution_pointwise": 1}
    assert where(executed, GATE_MUL) == {"cpp_fused_mul_unsqueeze": 2}
    assert where(executed, SILU) == {"mkldnn__convolution_pointwise": 1, "not found": 1}


def test_what_tensorrt_fused_is_read_from_the_names_of_its_layers():
    silu = [
        helper.make_node("Sigmoid", ["x"], ["s"], name="block.2/Sigmoid"),
        helper.make_node("Mul", ["x", "s"], ["y"], name="block.2/Mul"),
        helper.make_node("Sigmoid", ["y"], ["t"], name="block.2/Sigmoid_2"),
        helper.make_node("Mul", ["y", "t"], ["z"], name="block.2/Mul_2"),
    ]
    graph = helper.make_model(helper.make_graph(silu, "g", [], []))
    layers = [
        {"Name": "conv + PWN(PWN(block.2/Sigmoid), block.2/Mul)", "LayerType": "CaskConvolution"},
        {"Name": "fusion", "Metadata": "[ONNX Layer: block.2/Mul_2]", "LayerType": "PointWise"},
    ]
    executed = executed_by_tensorrt(layers, graph)
    assert where(executed, SILU) == {"CaskConvolution": 1, "PointWise": 1}
    assert executed.num_nodes == 2


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


def test_the_published_text_names_what_became_of_the_parts_and_why_a_runtime_is_missing():
    missing = [FormRecord(runtime="tensorrt", form=form, reason="no GPU") for form in FORMS]
    text = to_markdown(record([row("fused", (1.0,), (1.0,)), *missing]))
    assert "- onnxruntime: SiLU (3): 2 in QuickGelu, 1 in Conv" in text
    assert text.count("not measured: no GPU") == 1 and "| tensorrt | all |" in text
    assert "2026-01-02 UTC" in text


def test_a_runtime_without_its_device_or_library_gives_a_reason(monkeypatch: pytest.MonkeyPatch):
    for runtime in ("torch-cuda", "aoti-cuda", "tensorrt"):
        reason = why_not_here(runtime)  # type: ignore[arg-type]
        assert reason is not None and "no NVIDIA GPU answers here" in reason
    monkeypatch.setitem(RUNTIMES, "openvino", RuntimeName("OpenVINO", "no_such_library"))
    assert why_not_here("openvino") == "No module named 'no_such_library'"
    assert why_not_here("onnxruntime") is None


def test_eager_models_take_turns(tiny_checkpoint: Path):
    openers = {form: partial(open_eager, tiny_checkpoint, form, "cpu") for form in FORMS}
    turns = measure_callables(openers, IMAGE, seconds=0.02, turns=2)
    assert list(turns) == list(FORMS)
    assert all(len(medians) == 2 and min(medians) > 0 for medians in turns.values())


@pytest.mark.usefixtures("own_processes")
def test_a_process_that_dies_is_named():
    with raises_naming(PipelineError, "broken", "exit code 1"):
        measure_callables({"broken": partial(sys.exit, 1)}, IMAGE, seconds=0.02, turns=1)


def test_nothing_is_measured_when_the_readme_has_no_place(tiny_checkpoint: Path, tmp_path: Path):
    readme = tmp_path / "README.md"
    readme.write_text("# Nothing\n")
    with raises_naming(PublishError, readme):
        ablation.main(AblationConfig(tiny_checkpoint, publish=True, readme=readme))


def test_what_was_measured_is_published(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    results = write_results(tmp_path)
    found = ablation.main(
        AblationConfig(
            tiny_checkpoint,
            runtimes=("onnxruntime",),
            seconds=0.1,
            turns=2,
            num_parity_images=64,
            publish=True,
        )
    )
    for line in found.rows:
        assert line.reason is None and len(line.turn_p50_ms) == 2 and min(line.turn_p50_ms) > 0
    assert "| onnxruntime | BN folded + SE fused |" in results.read_text()
    (published,) = (tmp_path / "reports" / "published").glob("*/fusion.json")
    assert AblationRecord.model_validate_json(published.read_text()) == found
    assert published.with_suffix(".md").is_file()


@pytest.mark.slow
def test_the_command_measures_one_runtime_after_the_other(tiny_checkpoint: Path, tmp_path: Path):
    results = write_results(tmp_path)
    runtimes = ("onnxruntime", "openvino", "tensorrt")
    command = [
        *(sys.executable, str(ROOT / "export" / "ablation.py")),
        *("--checkpoint", str(tiny_checkpoint), "--num-parity-images", "64"),
        *("--runtimes", *runtimes, "--seconds", "0.1", "--turns", "2", "--publish", "--json"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = AblationRecord.model_validate_json(done.stdout.splitlines()[-1]).rows
    assert [(line.runtime, line.form) for line in found] == [
        (runtime, form) for runtime in runtimes for form in FORMS
    ]
    assert all(line.reason is None for line in found[:6])
    assert "| openvino | BN folded + SE fused |" in results.read_text()


def write_results(folder: Path) -> Path:
    results = folder / "docs" / "results.md"
    results.parent.mkdir()
    results.write_text("# Title\n\n<!-- fusion: written by a command -->\n<!-- /fusion -->\n")
    return results
