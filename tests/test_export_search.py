import logging
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import openvino
import pytest
from facts import raises_naming

from efficientnet.command import parse_flags
from efficientnet.formats.artifact import read_artifact, write_manifest
from efficientnet.network.model import EfficientNet
from export.builders import batch_splitting, search
from export.builders import onnxruntime_builder as ort_build
from export.builders import openvino_builder as ov_build
from export.builders.search import faster_in_float, time_of
from export.checks.gate import AccuracyDropError, GateError
from export.checks.logit_agreement import ParityError
from export.graphs.folding import is_within
from export.inputs.config import ExportConfig, OpenVinoConfig, OrtConfig
from export.inputs.reference import Reference, load_reference

DEPTHWISE = "features.3.0.block.1"
BLOCK = "features.1.0"

SMALL: dict[str, Any] = {
    "num_parity_images": 64,
    "num_calibration_images": 64,
    "num_gate_images": 100,
    "max_drop": 100,
}


@pytest.fixture(scope="module")
def reference(fitted_checkpoint: Path) -> Reference:
    return load_reference(ExportConfig(checkpoint=fitted_checkpoint, num_parity_images=64))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(search, "SECONDS", 0.1)
    monkeypatch.setattr(search, "TURNS", 2)
    monkeypatch.setattr(search, "NUM_CALLS", 2)


def times(model: EfficientNet, **other: float) -> list[tuple[str, float]]:
    modules = [name for name, _ in model.named_modules() if name.endswith(".0") and "block" in name]
    named = {name.replace("_", "."): ms for name, ms in other.items()}
    return list((dict.fromkeys(modules, 1.0) | named).items())


def test_a_layer_is_timed_with_its_silu_and_a_block_with_all_in_it():
    ms = [("features.1.0.block.0.0", 2.0), ("features.1.0.block.0.2", 1.0), ("features.1.0", 0.5)]
    assert time_of("features.1.0.block.0", ms) == 3.0
    assert time_of("features.1.0", ms) == 3.5
    assert time_of("features.1.0.block", [("features.1.0.blocks", 1.0)]) == 0


def test_layers_and_blocks_are_chosen_that_gain_more_than_noise(reference: Reference):
    model, in_int8 = reference.model, times(reference.model)
    assert faster_in_float(model, in_int8, in_int8) == {}
    assert faster_in_float(model, times(model, features_3_0_block_1_0=0.96), in_int8) == {}
    # Of its block it is too small a part.
    found = faster_in_float(model, times(model, features_3_0_block_1_0=0.9), in_int8)
    assert found == {"layers": (DEPTHWISE,)}
    found = faster_in_float(model, times(model, features_3_0_block_1_0=0.1), in_int8)
    assert found == {"layers": (DEPTHWISE,), "blocks": ("features.3.0",)}
    # The stem is a layer and a block, and is built once.
    stem = times(model, features_0_0=0.5), times(model, features_0_0=1.0)
    assert faster_in_float(model, *stem) == {"layers": ("features.0",)}


def test_layers_in_float_have_float_weights_in_openvino(fitted_checkpoint: Path, tmp_path: Path):
    def in_int8(path: Path) -> set[str]:
        model = openvino.Core().read_model(path / ov_build.PROGRAM_FILE)
        found: set[str] = set()
        for op in model.get_ops():
            if op.get_type_name() in ("Convolution", "GroupConvolution"):
                weight = op.input_value(1).get_node()
                while weight.get_type_name() != "Constant":
                    weight = weight.input_value(0).get_node()
                if weight.get_element_type().to_string() == "i8":
                    found.add(op.get_friendly_name())
        return found

    def export(name: str, layers: tuple[str, ...]) -> Path:
        config = OpenVinoConfig(
            fitted_checkpoint, tmp_path / name, "int8", float_layers=layers, **SMALL
        )
        return ov_build.main(config)

    plain, mixed = export("plain", ()), export("mixed", (DEPTHWISE, BLOCK))
    assert in_int8(plain) - in_int8(mixed) == {
        name for name in in_int8(plain) if is_within(name, DEPTHWISE) or is_within(name, BLOCK)
    }
    assert any(is_within(name, DEPTHWISE) for name in in_int8(plain))
    record = read_artifact(mixed).quantization
    assert record is not None and record.float_layers == (DEPTHWISE, BLOCK)
    assert record.kept_blocks == ()


def test_layers_in_float_have_float_weights_in_onnxruntime(fitted_checkpoint: Path, tmp_path: Path):
    config = OrtConfig(
        fitted_checkpoint, tmp_path / "mixed", "int8", float_layers=(DEPTHWISE, BLOCK), **SMALL
    )
    graph = onnx.load(ort_build.main(config) / ort_build.PROGRAM_FILE).graph
    convolutions = [n for n in graph.node if n.op_type == "Conv" and ".gate." not in n.name]
    in_float = {n.name for n in convolutions if "DequantizeLinear" not in n.input[1]}
    expected = {
        n.name for n in convolutions if is_within(n.name, DEPTHWISE) or is_within(n.name, BLOCK)
    }
    assert in_float == expected and len(in_float) >= 2
    record = read_artifact(tmp_path / "mixed").quantization
    assert record is not None and record.float_layers == (DEPTHWISE, BLOCK)


def test_a_search_measures_every_mixture_and_keeps_the_fastest(
    fitted_checkpoint: Path,
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    profiled: list[tuple[Path, ...]] = []

    def profile(paths: tuple[Path, ...], *_: object) -> list[dict[str, Any]]:
        profiled.append(paths)
        for path in paths:
            read_artifact(path)
        in_float = times(reference.model, features_3_0_block_1_0=0.1)
        return [
            {"layers": [{"module": module, "ms": ms} for module, ms in found]}
            for found in (in_float, times(reference.model))
        ]

    wanted = "symmetric int8, layers in "

    def measure(openers: dict[str, Any], *_: object) -> dict[str, tuple[float, ...]]:
        for opener in openers.values():
            opener()(reference.parity_images[:1])
        return {name: (1.0 if name.startswith(wanted) else 2.0,) for name in openers}

    # Each kind is built once; its mixtures are copies that say which layers they have in float.
    write, built = ov_build.write_openvino, dict[object, Path]()

    def write_or_copy(reference: Reference, config: OpenVinoConfig, **settings: Any) -> Path:
        kind = config.precision, config.activations
        if kind not in built:
            built[kind] = write(reference, config, **settings)
        else:
            shutil.copytree(built[kind], config.output)
            manifest = read_artifact(config.output)
            assert manifest.quantization is not None
            named = {"float_layers": config.float_layers}
            mixed = manifest.quantization.model_copy(update=named)
            write_manifest(config.output, manifest.model_copy(update={"quantization": mixed}))
        return config.output

    monkeypatch.setattr(ov_build, "write_openvino", write_or_copy)
    monkeypatch.setattr(search, "profile", profile)
    monkeypatch.setattr(search, "measure_callables", measure)
    caplog.set_level(logging.INFO)
    config = OpenVinoConfig(fitted_checkpoint, tmp_path / "found", "int8", search=True, **SMALL)
    best = ov_build.main(config)
    assert len(profiled) == 2
    quantization = read_artifact(best).quantization
    assert quantization is not None and quantization.float_layers == (DEPTHWISE,)
    assert "symmetric" in quantization.method.split() and best == tmp_path / "found"
    assert [path.name for path in tmp_path.iterdir()] == ["found"]
    assert not (best / "tried").exists()
    (table,) = [m for m in caplog.messages if "measured in turns" in m]
    assert len(table.splitlines()) == 2 + 1 + 2 * 3 + 1


def test_a_search_by_the_runtimes_own_profile_and_its_winner_gets_streams(
    fitted_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(batch_splitting, "LEAST_GAIN", -1e9)  # any ratio is a gain
    caplog.set_level(logging.INFO)
    output = tmp_path / "found"
    config = OrtConfig(fitted_checkpoint, output, "int8", batches=(1, 4), search=True, **SMALL)
    manifest = read_artifact(ort_build.main(config))
    assert manifest.precision == "int8" and manifest.streamed_batches == (4,)
    assert "all layers in fp32, to compare with" in caplog.messages
    assert any("measured in turns, batch 1" in message for message in caplog.messages)
    if manifest.binding is not None:
        flags = shlex.split(manifest.binding.rebuild)[2:]
        assert parse_flags(OrtConfig, None, flags) == config


def test_nothing_is_written_when_every_mixture_loses_too_much(
    fitted_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    errors = iter([AccuracyDropError("it loses too much"), ParityError("it answers otherwise")])

    def refuse(_: Reference, config: OpenVinoConfig, **__: object) -> Path | None:
        if config.precision == "int8":
            raise next(errors)
        return config.output

    monkeypatch.setattr(ov_build, "write_openvino", refuse)
    config = OpenVinoConfig(fitted_checkpoint, tmp_path / "found", "int8", search=True, **SMALL)
    with raises_naming(AccuracyDropError, "--max-drop"):
        ov_build.main(config)
    assert list(tmp_path.iterdir()) == []


def test_a_search_without_images_to_judge_by_builds_nothing(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    few = replace(reference, dataset=replace(reference.dataset, val=reference.dataset.val[:99]))
    config = OpenVinoConfig(reference.checkpoint, tmp_path / "found", "int8", search=True, **SMALL)
    monkeypatch.setattr(ov_build, "load_reference", lambda _: few)
    monkeypatch.setattr(ov_build, "write_openvino", lambda *_, **__: pytest.fail("it was built"))
    with raises_naming(GateError, 99, "held-out"):
        ov_build.main(config)


def test_a_layer_that_is_not_there_is_named_before_work_starts(
    fitted_checkpoint: Path, tmp_path: Path
):
    config = OrtConfig(
        fitted_checkpoint, tmp_path / "x", "int8", float_layers=("features.9.block",), **SMALL
    )
    with raises_naming(ValueError, "features.9.block"):
        ort_build.main(config)
    assert list(tmp_path.iterdir()) == []
