import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
from commands import run
from common_fixtures import QUANTIZATION
from facts import raises_naming, require_named
from onnx import numpy_helper

from efficientnet.command import parse_flags
from efficientnet.formats.artifact import (
    ArtifactError,
    ArtifactManifest,
    read_artifact,
    write_manifest,
)
from efficientnet.formats.checkpoint import CheckpointError
from efficientnet.machine.atomic import sha256_of_file
from efficientnet.network.model import EfficientNet
from efficientnet.runtimes import open_runtime
from export import ort
from export.builders import openvino_builder as ov_build
from export.checks import parity, stepwise
from export.checks.layers import first_above, layers_by_block, relative_error
from export.checks.parity import GATE, ParityConfig, ParityReport, complete, find_checkpoint
from export.checks.stepwise import StepwiseParity
from export.graphs.folding import fold_batch_norm
from export.graphs.precision import typed_graph
from export.inputs.config import ExportConfig
from export.inputs.reference import Reference, batches_of, load_reference

CHANGED_BLOCK = "features.3.0"
CHANGED_LAYER = "features.3.0.block.1.0/Conv"


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> Reference:
    return load_reference(ExportConfig(checkpoint=tiny_checkpoint, num_parity_images=64))


@pytest.fixture(scope="module")
def artifacts(
    tiny_checkpoint: Path,
    tiny_artifact: Path,
    openvino_artifact: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("artifacts")
    half = ort.OrtConfig(tiny_checkpoint, folder / "half", "fp16", num_parity_images=64)
    return {
        "onnxruntime fp32": tiny_artifact,
        "onnxruntime fp16": ort.main(half),
        "openvino fp32": openvino_artifact,
    }


@pytest.fixture(scope="module")
def steps(reference: Reference) -> StepwiseParity:
    """The steps that all artifacts of one checkpoint share, run once."""
    return StepwiseParity(reference)


@pytest.fixture
def shared_steps(steps: StepwiseParity, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command take them over."""
    monkeypatch.setattr(parity, "StepwiseParity", lambda _: steps)


@pytest.fixture(scope="module")
def report(
    tiny_checkpoint: Path, artifacts: dict[str, Path], steps: StepwiseParity
) -> ParityReport:
    config = ParityConfig(
        tuple(artifacts.values()), checkpoint=tiny_checkpoint, num_images=64, layers=True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "StepwiseParity", lambda _: steps)
        return parity.main(config)


def test_every_step_of_a_faithful_artifact_agrees(report: ParityReport):
    steps = {record.steps[-1].name: record.steps for record in report.artifacts}
    assert list(steps) == ["onnxruntime fp32", "onnxruntime fp16", "openvino fp32"]
    for record in report.artifacts:
        assert record.first_broken is None
        assert all(step.parity and step.problem is None for step in record.steps)
    folds = ["batch norm folded, in float64", "batch norm folded, fp32"]
    exported = [*folds, "ONNX fp32, not optimized"]
    names = {last: [step.name for step in own[:-1]] for last, own in steps.items()}
    assert names["onnxruntime fp16"] == [*exported, "model.onnx, not optimized"]
    assert names["openvino fp32"] == exported


def test_folding_may_change_the_logits_by_1e_5_of_their_std(report: ParityReport):
    fold = report.artifacts[0].steps[0].parity
    assert fold is not None
    bound = fold.tolerances.max_abs_logit_error
    # That of these logits is about 1, and the bound is not the same for all networks.
    assert 0.5e-5 < bound < 2e-5 and bound != 1e-5
    assert 0 < fold.max_abs_logit_error < 0.1 * bound


def test_layers_of_each_runtime_are_those_of_the_eager_model(
    report: ParityReport, reference: Reference
):
    blocks = list(layers_by_block(reference.model))
    for record, largest in zip(report.artifacts, (1e-5, 5e-3, 1e-5), strict=True):
        assert record.layers is not None
        assert record.layers.step == record.steps[-1].name
        assert [error.name for error in record.layers.blocks] == blocks
        assert all(0 < error.error < largest for error in record.layers.blocks)
        assert record.layers.layers and not record.layers.is_above_bound


def test_layers_have_the_names_of_the_nodes(reference: Reference, tiny_artifact: Path):
    graph = onnx.load(tiny_artifact / "model.onnx").graph
    nodes = {node.output[0] for node in graph.node if node.op_type != "Reshape"}
    assert {name for names in layers_by_block(reference.model).values() for name in names} == nodes


def test_the_command_names_the_broken_step_and_layer_and_prints_json_on_demand(
    tiny_checkpoint: Path, tiny_artifact: Path, tmp_path: Path
):
    broken = perturbed(tiny_artifact, tmp_path / "broken")
    flags = ("--checkpoint", tiny_checkpoint, "--num-images", 64, "--layers", "--json")
    done = run("export/parity.py", broken, *flags)
    assert done.returncode == 1
    require_named(done.stderr, "error: 1 of 1", broken, CHANGED_BLOCK, CHANGED_LAYER, "0.0001")
    assert "Traceback" not in done.stderr
    (bad,) = ParityReport.model_validate_json(done.stdout.splitlines()[-1]).artifacts
    assert bad.first_broken == "model.onnx, not optimized"
    assert [step.problem is None for step in bad.steps] == [True, True, True, False, False]
    assert bad.layers is not None and bad.layers.layer == CHANGED_LAYER


def test_a_changed_weight_of_an_openvino_program_is_found(
    steps: StepwiseParity, artifacts: dict[str, Path], tmp_path: Path
):
    directory = tmp_path / "broken"
    shutil.copytree(artifacts["openvino fp32"], directory)
    model = ov_build.read_fused(
        with_changed_weight(onnx.load(artifacts["onnxruntime fp32"] / "model.onnx"))
    )
    openvino.save_model(model, directory / ov_build.PROGRAM_FILE, compress_to_fp16=False)
    manifest = rehashed(directory)
    record = steps.compare(directory, manifest, wants_layers=True)
    assert record.first_broken == "openvino fp32"
    assert record.layers is not None
    assert (record.layers.block, record.layers.layer) == (CHANGED_BLOCK, CHANGED_LAYER)


def test_a_wrong_fold_is_found_before_anything_is_exported(
    reference: Reference, tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
):
    def fold_wrongly(model: EfficientNet) -> EfficientNet:
        folded = fold_batch_norm(model)
        layer = folded.get_submodule("features.2.0.block.0.0")
        layer.bias.data *= 1.02  # type: ignore
        return folded

    monkeypatch.setattr(stepwise, "fold_batch_norm", fold_wrongly)
    record = StepwiseParity(reference).compare(
        tiny_artifact, read_artifact(tiny_artifact), wants_layers=True
    )
    assert record.first_broken == "batch norm folded, in float64"
    assert record.layers is not None
    assert record.layers.layer == "features.2.0.block.0.0/Conv"


def test_an_unchecked_artifact_that_passes_is_completed(
    tiny_checkpoint: Path, tiny_artifact: Path, tmp_path: Path, shared_steps: None
):
    directory = unchecked(tiny_artifact, tmp_path / "unchecked")
    with raises_naming(ArtifactError, "never compared", "export/parity.py"):
        open_runtime(directory)
    report = parity.main(ParityConfig((directory,), checkpoint=tiny_checkpoint, num_images=64))
    assert report.artifacts[0].is_completed
    found = read_artifact(directory)
    assert found.parity == report.artifacts[0].steps[-1].parity
    assert found.parity is not None and found.parity.num_images == 64
    assert open_runtime(directory).info.precision == "fp32"


def test_an_unchecked_artifact_that_breaks_is_left_as_it_is(
    tiny_checkpoint: Path,
    tiny_artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shared_steps: None,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    directory = unchecked(perturbed(tiny_artifact, tmp_path / "broken"), tmp_path / "unchecked")
    before = (directory / "manifest.json").read_bytes()
    with raises_naming(parity.ParityError, "1 of 1", directory):
        parity.main(ParityConfig((directory,), checkpoint=tiny_checkpoint, num_images=64))
    result = Path(capsys.readouterr().out.splitlines()[-1])
    assert result == Path("reports/parity.json")
    assert not json.loads(result.read_text())["artifacts"][0]["is_completed"]
    assert (directory / "manifest.json").read_bytes() == before
    with raises_naming(ArtifactError, "never compared", "export/parity.py"):
        open_runtime(directory)


def test_an_unchecked_quantised_artifact_must_pass_the_accuracy_gate(
    reference: Reference, report: ParityReport, tiny_artifact: Path, tmp_path: Path
):
    val = reference.dataset.val
    batches = batches_of(val, reference.preprocess)
    answers = [int(label) for batch in batches for label in reference.answer(batch).argmax(axis=1)]
    right = tuple(replace(s, label=label) for s, label in zip(val, answers, strict=True))
    easy = replace(reference, dataset=replace(reference.dataset, val=right))
    broken = perturbed(tiny_artifact, tmp_path / "broken")
    for name, program, max_drop, is_good in (
        ("good", tiny_artifact, 0.005, True),
        ("bad", broken, 0.005, False),
        ("allowed", broken, 1.0, True),
    ):
        limits = {"max_drop": max_drop, "num_gate_images": 100}
        asked_for = QUANTIZATION.model_copy(update=limits)
        directory = unchecked(program, tmp_path / name, precision="int8", quantization=asked_for)
        manifest = read_artifact(directory, allow_unchecked=True)
        done = complete(easy, directory, manifest, report.artifacts[0])
        assert done.is_completed == is_good
        assert done.first_broken == (None if is_good else GATE)
        assert done.gate is not None and (done.gate.drop == 0.0) == (program == tiny_artifact)
        assert (done.gate.max_drop, done.gate.num_images) == (max_drop, 100)
        kept = read_artifact(directory, allow_unchecked=True)
        assert (kept.parity is not None) == (kept.gate is not None) == is_good


def test_what_the_cpu_provider_cannot_run_is_skipped_with_the_reason(
    reference: Reference, tiny_artifact: Path
):
    manifest = read_artifact(tiny_artifact)
    made = graph_of(reference, tiny_artifact, manifest, runtime="tensorrt", precision="bf16")
    assert made is not None and "no convolution in bf16" in str(made[1])


def test_the_graph_of_a_quantised_engine_is_made_again_by_its_calibration(
    reference: Reference, tiny_artifact: Path, tmp_path: Path
):
    config = ExportConfig(precision="int8", num_calibration_images=64, seed=3)
    typed = typed_graph(reference, config, (CHANGED_BLOCK,), "tensorrt", tmp_path)
    manifest = read_artifact(tiny_artifact).model_copy(update={"quantization": typed.quantization})
    made = graph_of(reference, tmp_path, manifest, runtime="tensorrt", precision="int8")
    assert made is not None and made[1] == typed.model
    elsewhere = graph_of(reference, tiny_artifact, manifest, runtime="tensorrt", precision="int8")
    assert elsewhere is not None and "cannot be repeated" in str(elsewhere[1])


def test_the_first_layer_above_the_bound_is_named_or_the_largest_rise():
    assert first_above({"a": 0.1, "b": 0.6, "c": 0.9}, 0.5) == "b"
    assert first_above({"a": 0.1, "b": 0.15, "c": 0.3}, 0.5) == "c"


def test_a_map_that_is_not_finite_differs_without_end():
    assert relative_error(np.float16([1, np.inf]), np.float32([1, 2])) == float("inf")
    assert relative_error(np.float16([1, np.nan]), np.float32([1, 2])) == float("inf")
    assert relative_error(np.float32([1, 2]), np.float32([1, 2])) == 0.0


def test_an_artifact_of_another_checkpoint_is_refused(
    tiny_artifact: Path, tiny_checkpoint: Path, tmp_path: Path
):
    directory = tmp_path / "other"
    shutil.copytree(tiny_artifact, directory)
    manifest = read_artifact(directory)
    write_manifest(directory, manifest.model_copy(update={"checkpoint_sha256": "0" * 64}))
    with raises_naming(ArtifactError, directory, "checkpoint"):
        parity.main(ParityConfig((directory,), checkpoint=tiny_checkpoint))


def test_the_checkpoint_is_found_by_its_hash(tiny_checkpoint: Path, tmp_path: Path):
    (tmp_path / "runs" / "broken" / "checkpoint").mkdir(parents=True)
    (tmp_path / "runs" / "broken" / "checkpoint" / "checkpoint.json").write_text("{")
    kept = tmp_path / "runs" / "tiny" / "checkpoints" / "step-1"
    shutil.copytree(tiny_checkpoint, kept)
    sha256 = json.loads((kept / "checkpoint.json").read_text())["weights_sha256"]
    artifact = Path("artifacts/tiny/x")
    assert find_checkpoint(artifact, sha256, tmp_path / "runs") == kept
    with raises_naming(CheckpointError, "2 checkpoints", "--checkpoint"):
        find_checkpoint(artifact, "0" * 64, tmp_path / "runs")


@pytest.mark.parametrize("arguments", [[], ["artifact", "--num-images", "63"]])
def test_wrong_usage_is_told_before_any_work(arguments: list[str]):
    with pytest.raises((SystemExit, ValueError)):
        parse_flags(ParityConfig, None, arguments)


def perturbed(artifact: Path, directory: Path) -> Path:
    shutil.copytree(artifact, directory)
    path = directory / "model.onnx"
    onnx.save(with_changed_weight(onnx.load(path)), path)
    rehashed(directory)
    return directory


def with_changed_weight(graph: onnx.ModelProto) -> onnx.ModelProto:
    (node,) = [node for node in graph.graph.node if node.name == CHANGED_LAYER]
    (tensor,) = [t for t in graph.graph.initializer if t.name == node.input[1]]
    weight = numpy_helper.to_array(tensor).copy()
    weight[0, 0, 1, 1] += 50
    tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    return graph


def rehashed(directory: Path) -> ArtifactManifest:
    manifest = ArtifactManifest.model_validate_json((directory / "manifest.json").read_text())
    hashes = {name: sha256_of_file(directory / name) for name in manifest.other_files}
    program = sha256_of_file(directory / manifest.program_file)
    manifest = manifest.model_copy(update={"program_sha256": program, "other_files": hashes})
    write_manifest(directory, manifest)
    return manifest


def unchecked(artifact: Path, directory: Path, **changes: object) -> Path:
    shutil.copytree(artifact, directory)
    manifest = read_artifact(directory)
    write_manifest(directory, manifest.model_copy(update={"parity": None, **changes}))
    return directory


def graph_of(reference: Reference, directory: Path, manifest: ArtifactManifest, **changes: object):
    return stepwise._graph_of_artifact(reference, directory, manifest.model_copy(update=changes))
