import copy
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from common_fixtures import QUANTIZATION
from facts import raises_naming
from networks import random_network

from efficientnet.formats.artifact import (
    AccuracyGate,
    BlockCost,
    ParityRecord,
    ParityTolerances,
    read_artifact,
)
from efficientnet.images.datasets import Dataset, load_dataset
from efficientnet.network.model import ConvNormAct, ReLU6, ResidualBlock
from efficientnet.network.variants import VARIANTS
from export import ort
from export.builders.openvino_builder import pattern_of, quantize, read_fused
from export.checks import sensitivity
from export.checks.gate import (
    AccuracyDropError,
    Attempt,
    Gate,
    GateError,
    is_allowed,
    keep_within_drop,
    paired_drop,
    require_better_than_chance,
)
from export.checks.layers import layers_by_block
from export.checks.logit_agreement import compare_logits, require_parity, tolerances_for
from export.checks.sensitivity import named_blocks, rank_blocks
from export.graphs.calibration import (
    CALIBRATION_FILE,
    CalibrationError,
    choose_samples,
    collect_ranges,
    record_calibration,
)
from export.graphs.folding import FloatPrecision, count_ops, export_onnx, fold_batch_norm, is_within
from export.graphs.precision import graph_of, typed_graph
from export.graphs.quantization import SCHEMES, insert_quantization, tensors_to_quantize
from export.inputs.config import ExportConfig, OpenVinoConfig, OrtConfig
from export.inputs.reference import Reference, load_reference


@pytest.fixture(scope="module")
def reference(fitted_checkpoint: Path) -> Reference:
    return load_reference(ExportConfig(checkpoint=fitted_checkpoint, num_parity_images=64))


@pytest.fixture(scope="module")
def config() -> ExportConfig:
    return ExportConfig(precision="int8", num_calibration_images=64)


Exported = Callable[[FloatPrecision], onnx.ModelProto]


@pytest.fixture(scope="module")
def exported(reference: Reference) -> Exported:
    """The network's graph by precision, exported once; each call gives a copy to change."""
    graphs: dict[FloatPrecision, onnx.ModelProto] = {}

    def copy_of(precision: FloatPrecision) -> onnx.ModelProto:
        if precision not in graphs:
            graphs[precision] = export_onnx(reference.model, reference.image_size, precision)
        return copy.deepcopy(graphs[precision])

    return copy_of


@cache
def quantized(
    reference: Reference, config: ExportConfig, scheme: str, kept: tuple[str, ...] = ()
) -> onnx.ModelProto:
    """Return a graph in 8 bits, not to be changed."""
    with tempfile.TemporaryDirectory() as folder:
        return typed_graph(reference, config, kept, scheme, Path(folder)).model


@pytest.mark.parametrize("scheme", ["onnxruntime", "onnxruntime-7-bits", "tensorrt"])
def test_an_int8_graph_answers_nearly_like_the_model(
    reference: Reference, config: ExportConfig, scheme: str
):
    graph = quantized(reference, config, scheme)
    onnx.checker.check_model(graph, full_check=True)
    options = onnxruntime.SessionOptions()
    # As it is written: fused kernels without VNNI add up in 16 bits.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options)
    (logits,) = session.run(None, {"images": reference.parity_images})
    expected = reference.parity_logits
    parity = compare_logits(logits, expected, tolerances_for("int8", expected))
    require_parity(parity)
    # 0.1 std by a simulation in torch; a graph that is not quantized at all has 1e-6.
    assert 1e-3 < parity.mean_abs_logit_error / expected.std() < 0.3


def test_each_runtime_gets_the_number_types_of_its_kernels(
    reference: Reference, config: ExportConfig
):
    def types(scheme: str) -> tuple[set[int], set[int]]:
        graph = quantized(reference, config, scheme).graph
        kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
        activations = {kinds[n.input[2]] for n in graph.node if n.op_type == "QuantizeLinear"}
        constants = {
            kinds[n.input[0]]
            for n in graph.node
            if n.op_type == "DequantizeLinear" and n.input[0] in kinds
        }
        return activations, constants

    tensor = onnx.TensorProto
    assert types("onnxruntime") == ({tensor.UINT8}, {tensor.INT8, tensor.INT32})
    assert types("tensorrt") == ({tensor.INT8}, {tensor.INT8})
    assert types("tensorrt-fp8") == ({tensor.FLOAT8E4M3FN}, {tensor.FLOAT8E4M3FN})


def test_tensorrt_gets_both_inputs_of_a_residual_addition_in_8_bits(
    reference: Reference, config: ExportConfig
):
    graph = quantized(reference, config, "tensorrt").graph
    makers = {output: node.op_type for node in graph.node for output in node.output}
    additions = [node for node in graph.node if node.op_type == "Add"]
    assert len(additions) == 4
    for node in additions:
        assert [makers[name] for name in node.input] == ["DequantizeLinear"] * 2


def test_squeeze_excite_and_the_classifier_stay_in_float32(
    reference: Reference, config: ExportConfig
):
    graph = quantized(reference, config, "onnxruntime").graph
    constants = {t.name: t.data_type for t in graph.initializer}
    layers = [n for n in graph.node if n.op_type in ("Conv", "Gemm")]
    gates = [n for n in layers if n.op_type == "Gemm" or ".gate." in n.name]
    assert len(gates) == 9
    for node in gates:
        for name in node.input[1:]:
            if name in constants:
                assert constants[name] == onnx.TensorProto.FLOAT


def test_squeeze_excite_transposes_no_map_of_8_bits(
    reference: Reference, config: ExportConfig, tmp_path: Path
):
    def num_executed(kept: tuple[str, ...] = ()) -> Counter[str]:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        # It warns that the file is for this processor.
        options.log_severity_level = 3
        graph = quantized(reference, config, "onnxruntime", kept)
        onnxruntime.InferenceSession(graph.SerializeToString(), options)
        return count_ops(onnx.load(tmp_path / "optimized.onnx"))

    plain = num_executed()
    # The images, and the last map, whose mean the classifier reads.
    assert plain["Transpose"] == 2 and plain["MatMulInteger"] == 4
    kept = num_executed(("features.3.0",))
    assert kept["GlobalAveragePool"] == plain["GlobalAveragePool"] + 1
    assert kept["MatMulInteger"] == 3


def test_fp8_leaves_narrow_and_depthwise_convolutions_in_16_bits(
    reference: Reference, config: ExportConfig
):
    graph = quantized(reference, replace(config, precision="fp8"), "tensorrt-fp8").graph
    shapes = {t.name: t.dims for t in graph.initializer}
    in_fp8 = {
        node.name: shapes[node.input[1].replace("DequantizeLinear", "quantized")]
        for node in graph.node
        if node.op_type == "Conv" and "DequantizeLinear" in node.input[1]
    }
    assert in_fp8
    for outputs, inputs, height, width in in_fp8.values():
        assert outputs >= 16 and inputs >= 16 and height * width <= 32
    stem = next(node for node in graph.node if node.op_type == "Conv")
    assert stem.name not in in_fp8
    in_int8 = quantized(reference, config, "tensorrt").graph
    assert any(n.op_type == "Conv" and n.name == stem.name for n in in_int8.node)
    (first,) = [n for n in in_int8.node if n.name == stem.name]
    assert "DequantizeLinear" in first.input[1]


def test_weights_of_7_bits_cannot_overflow_16_bits(reference: Reference, config: ExportConfig):
    graph = quantized(reference, config, "onnxruntime-7-bits").graph
    weights = [
        onnx.numpy_helper.to_array(t)
        for t in graph.initializer
        if t.data_type == onnx.TensorProto.INT8
    ]
    assert max(int(np.abs(w).max()) for w in weights) == 63
    assert 2 * 255 * 63 < 2**15


def test_kept_blocks_have_float32_weights(reference: Reference, config: ExportConfig):
    graph = quantized(reference, config, "onnxruntime", kept=("features.2.0",)).graph
    kept = [n for n in graph.node if n.op_type == "Conv" and is_within(n.name, "features.2.0")]
    others = [n for n in graph.node if n.op_type == "Conv" and is_within(n.name, "features.2.1")]
    assert kept and others
    assert not any("DequantizeLinear" in n.input[1] for n in kept)
    assert all("DequantizeLinear" in n.input[1] for n in others)


def stored_as(
    graph: onnx.ModelProto, node: onnx.NodeProto, index: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, scale, and what a runtime makes of both, of a constant of a convolution."""
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.graph.initializer}
    name = node.input[index].removesuffix("/DequantizeLinear")
    values, scale = constants[f"{name}/quantized"], constants[f"{name}/scale"]
    wide = scale.astype(np.float64).reshape(-1, *[1] * (values.ndim - 1))
    return values, scale, values.astype(np.float64) * wide


@pytest.mark.parametrize("scheme", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("size", [1e-3, 2e-4, 1e-6, 3e-7, 0.0])
def test_channels_of_tiny_weights_keep_their_signs_and_biases(
    exported: Exported, scheme: str, size: float
):
    layer = "features.1.0.block.0.0/Conv"
    graph = exported("fp16" if scheme == "tensorrt" else "fp32")
    chosen = SCHEMES[scheme]
    ranges = dict.fromkeys(tensors_to_quantize(graph, (), chosen), (-1.0, 3.0))
    (conv,) = [node for node in graph.graph.node if node.name == layer]
    constants = {t.name: t for t in graph.graph.initializer}
    weight = onnx.numpy_helper.to_array(constants[conv.input[1]]).copy()
    bias = onnx.numpy_helper.to_array(constants[conv.input[2]]).copy()
    weight[0] = np.float32(size) * np.sign(np.arange(weight[0].size).reshape(weight[0].shape) - 1.5)
    bias[0] = 0.5
    for name, values in ((conv.input[1], weight), (conv.input[2], bias)):
        constants[name].CopyFrom(onnx.numpy_helper.from_array(values, name))
    insert_quantization(graph, ranges, (), chosen)
    (conv,) = [node for node in graph.graph.node if node.name == layer]
    values, scale, found = stored_as(graph, conv, 1)
    assert np.abs(values.astype(int)).max() <= 127 and (scale > 0).all()
    # Half a step, and what the scale itself was rounded by.
    errors = np.abs(found - weight).max(axis=(1, 2, 3))
    assert (errors <= 0.6 * scale.astype(np.float64)).all()
    assert (found[0] * weight[0] >= 0).all()
    if scheme == "onnxruntime":
        _, _, found_bias = stored_as(graph, conv, 2)
        np.testing.assert_allclose(found_bias, bias, atol=1e-3)


def test_scales_of_16_bits_are_normal_numbers(exported: Exported):
    assert SCHEMES["tensorrt"].float_precision == "fp16"
    graph = exported("fp16")
    tensors = tensors_to_quantize(graph, (), SCHEMES["tensorrt"])
    insert_quantization(graph, dict.fromkeys(tensors, (0.0, 1e-9)), (), SCHEMES["tensorrt"])
    scales = [t for t in graph.graph.initializer if t.name.endswith("/scale")]
    assert len(scales) > len(tensors)
    for tensor in scales:
        assert (onnx.numpy_helper.to_array(tensor) >= np.finfo(np.float16).tiny).all()


def test_activations_that_16_bits_do_not_hold_are_an_error(exported: Exported):
    graph = exported("fp16")
    tensors = tensors_to_quantize(graph, (), SCHEMES["tensorrt"])
    ranges = dict.fromkeys(tensors, (-1.0, 1.0)) | {tensors[3]: (-1e7, 1.0)}
    with raises_naming(CalibrationError, "1.0e+07", "fp16"):
        insert_quantization(graph, ranges, (), SCHEMES["tensorrt"])


def test_a_pattern_takes_the_nodes_of_one_module_only():
    # NNCF matches from the start of a name only.
    def takes(name: str, node: str) -> bool:
        return re.compile(pattern_of(name)).match(node) is not None

    assert takes("features.6.1", "features.6.1.block.0.0/Conv")
    assert takes("features.6.1", "features.6.1/Add") and takes("features.6.1", "features.6.1")
    assert not takes("features.6.1", "features.6.10.block.0.0/Conv")
    assert not takes("features.6.1", "features.6.14/Add")
    assert is_within("features.1.1.block.0/Conv", "features.1.1")
    assert is_within("features.1.1/Add", "features.1.1")
    assert not is_within("features.1.10.block.0/Conv", "features.1.1")


def test_squeeze_excites_own_layers_have_no_part_in_the_ranking(
    reference: Reference, config: ExportConfig, monkeypatch: pytest.MonkeyPatch
):
    shapes: list[tuple[int, ...]] = []

    def quantize_weights(weight: torch.Tensor, _: str) -> torch.Tensor:
        shapes.append(tuple(weight.shape))
        return weight

    monkeypatch.setattr(sensitivity, "_quantize_weights", quantize_weights)
    rank_blocks(reference, config)
    layers = [m for m in reference.model.modules() if isinstance(m, ConvNormAct)]
    # Each convolution once a batch of 16 images.
    assert len(shapes) == len(layers) * 64 // 16


def test_calibration_takes_training_images_only_and_names_them(
    reference: Reference, config: ExportConfig, tmp_path: Path
):
    samples = choose_samples(reference, config)
    held_out = {sample.name for sample in reference.dataset.val}
    assert len(samples) == 64 and not held_out & {sample.name for sample in samples}
    assert samples == choose_samples(reference, config)
    assert samples != choose_samples(reference, replace(config, seed=1))
    record_calibration(tmp_path, samples, config, "a method", "fp32")
    content = json.loads((tmp_path / CALIBRATION_FILE).read_text())
    assert content["num_images"] == 64 and content["seed"] == 0
    assert set(content["images"]) == {sample.name for sample in samples}
    assert all(len(sha256) == 64 for sha256 in content["images"].values())


def test_ranges_that_are_no_numbers_are_an_error(exported: Exported):
    graph = exported("fp32")
    images = np.full((2, 3, 32, 32), np.nan, np.float32)
    with raises_naming(CalibrationError, "features.0.0/Conv", "nan"):
        collect_ranges(graph, ["features.0.0/Conv"], [images])


def test_a_range_is_the_mean_over_batches_and_holds_zero(exported: Exported, reference: Reference):
    graph = exported("fp32")
    name = "features.0.0/Conv"
    batches = [reference.parity_images[:8], reference.parity_images[8:10] + 3.0]
    ranges = collect_ranges(graph, ["images", name], batches)
    layer = fold_batch_norm(reference.model).features[0][0]
    with torch.inference_mode():
        activations = [layer(torch.from_numpy(batch)).numpy() for batch in batches]
    for found, values in ((ranges["images"], batches), (ranges[name], activations)):
        low, high = np.mean([v.min() for v in values]), np.mean([v.max() for v in values])
        assert found == pytest.approx((min(low, 0.0), max(high, 0.0)), abs=1e-4)
    assert ranges["images"][1] > 1 and reference.parity_images.max() < ranges["images"][1]


def test_a_drop_is_that_of_the_images_that_changed():
    before = np.array([True] * 90 + [False] * 10)
    after = before.copy()
    after[:3] = False
    after[95] = True
    drop, low, high = paired_drop(before, after)
    assert drop == pytest.approx(0.02)
    assert low < 0.02 < high
    assert paired_drop(before, before)[0] == 0.0


def test_every_block_is_ranked_by_what_it_does_to_the_logits(
    reference: Reference, config: ExportConfig
):
    before = reference.answer(reference.parity_images[:8])
    ranking = rank_blocks(reference, config)
    names = [name for name, _ in named_blocks(reference.model)]
    assert sorted(cost.block for cost in ranking) == sorted(names)
    errors = [cost.logit_error for cost in ranking]
    assert errors == sorted(errors, reverse=True) and errors[-1] > 0
    np.testing.assert_array_equal(reference.answer(reference.parity_images[:8]), before)


def test_a_block_with_one_huge_weight_in_each_channel_is_the_costliest(
    reference: Reference, config: ExportConfig
):
    broken = load_reference(ExportConfig(checkpoint=reference.checkpoint, num_parity_images=64))
    block = dict(named_blocks(broken.model))["features.3.1"]
    assert isinstance(block, ResidualBlock)
    depthwise_norm, projection = block.block[1][1], block.block[3][0]
    with torch.no_grad():
        # The huge weights meet a channel that is always zero: the network's answers stay as they
        # are, and in 8 bits all other weights of the layer round to zero.
        depthwise_norm.weight[0] = depthwise_norm.bias[0] = 0
        projection.weight[:, 0] = 1000 * projection.weight.abs().max()
    assert rank_blocks(broken, config)[0].block == "features.3.1"


def fake_gate(drop: float, num_images: int = 1000, max_drop: float = 0.005) -> AccuracyGate:
    return AccuracyGate(
        num_images=num_images,
        reference_top1=0.9,
        top1=0.9 - drop,
        drop=drop,
        drop_low=drop - 0.01,
        drop_high=drop + 0.01,
        max_drop=max_drop,
        dataset_sha256="",
    )


def judged(built: Attempt, drop: float, mean_error: float = 0.0) -> Attempt:
    parity = ParityRecord(
        num_images=64,
        max_abs_logit_error=1.0,
        mean_abs_logit_error=mean_error,
        top1_agreement=1.0,
        tolerances=ParityTolerances(
            max_abs_logit_error=6.0, max_mean_logit_error=0.5, min_top1_agreement=0.97
        ),
    )
    update = {"gate": fake_gate(drop), "parity": parity}
    return built._replace(manifest=built.manifest.model_copy(update=update))


def test_as_many_images_may_be_lost_as_max_drop_says():
    # 0.7 / 100 is less than 0.007.
    assert is_allowed(fake_gate(14 / 2000, 2000, 0.7 / 100))
    assert not is_allowed(fake_gate(15 / 2000, 2000, 0.7 / 100))
    assert is_allowed(fake_gate(-0.01, 2000, 0.0))


@pytest.mark.parametrize("needed", range(9))
@pytest.mark.parametrize("is_lost", [True, False])
def test_as_few_blocks_as_will_do_are_kept(
    tiny_artifact: Path, tmp_path: Path, needed: int, is_lost: bool
):
    names = [f"features.{i}" for i in range(8)]
    manifest = read_artifact(tiny_artifact).model_copy(update={"quantization": QUANTIZATION})
    built: list[tuple[str, ...]] = []

    def attempt(kept: tuple[str, ...]) -> Attempt:
        built.append(kept)
        return Attempt(tmp_path / str(len(kept)), manifest)

    def judge(tried: Attempt) -> Attempt:
        if int(tried.directory.name) >= needed:
            return judged(tried, drop=0.0)
        # Too many answers are wrong, or all logits are of another size.
        return judged(tried, drop=0.02) if is_lost else judged(tried, drop=0.0, mean_error=1.0)

    found = keep_within_drop(
        attempt, judge, lambda: [BlockCost(block=name, logit_error=1.0) for name in names]
    )
    assert int(found.directory.name) == needed
    assert found.manifest.gate is not None and found.manifest.gate.drop == 0.0
    assert len(built) <= 5 and tuple(names[:needed]) in built
    assert found.manifest.quantization is not None
    assert len(found.manifest.quantization.ranking) == (8 if needed else 0)


def test_a_program_that_loses_too_much_with_all_blocks_kept_is_refused(
    tiny_artifact: Path, tmp_path: Path
):
    manifest = read_artifact(tiny_artifact)
    with raises_naming(AccuracyDropError, "all 1 blocks"):
        keep_within_drop(
            lambda kept: Attempt(tmp_path, manifest),
            lambda built: judged(built, drop=0.02),
            lambda: [BlockCost(block="features.0", logit_error=1.0)],
        )
    with raises_naming(AccuracyDropError, "too much"):
        keep_within_drop(
            lambda kept: Attempt(tmp_path, manifest),
            lambda built: judged(built, drop=0.02),
            lambda: pytest.fail("ranked"),
            keeps_blocks=False,
        )


@pytest.mark.parametrize(
    ("num_right", "labels", "is_judged"),
    [
        # Ten classes of 36 images: chance has 36 right.
        (35, [i % 10 for i in range(360)], False),
        (40, [i % 10 for i in range(360)], False),
        (60, [i % 10 for i in range(360)], True),
        # Two of three images are of one class, and that is what it always says.
        (240, [max(0, i % 3 - 1) for i in range(360)], False),
        (300, [max(0, i % 3 - 1) for i in range(360)], True),
    ],
)
def test_a_network_that_knows_no_more_than_chance_cannot_be_judged(
    num_right: int, labels: list[int], is_judged: bool
):
    eager_is_right = np.arange(360) < num_right
    if is_judged:
        require_better_than_chance(eager_is_right, labels)
        return
    with raises_naming(GateError, f"{num_right / 360:.2%} of 360"):
        require_better_than_chance(eager_is_right, labels)


def test_an_int8_export_of_a_network_at_chance_is_refused(tiny_checkpoint: Path, tmp_path: Path):
    with raises_naming(GateError, "held-out images", "--size", "--data"):
        ort.main(OrtConfig(tiny_checkpoint, tmp_path / "artifact", "int8", num_parity_images=64))
    assert list(tmp_path.iterdir()) == []


def test_a_network_at_chance_is_exported_for_time_only(tiny_checkpoint: Path, tmp_path: Path):
    config = OrtConfig(tiny_checkpoint, tmp_path / "artifact", "int8", num_parity_images=64)
    manifest = read_artifact(ort.main(replace(config, max_drop=100)))
    assert manifest.is_for_time_only
    # What it loses is measured all the same.
    assert manifest.gate is not None and manifest.gate.max_drop == 1
    assert manifest.gate.drop == pytest.approx(manifest.gate.reference_top1 - manifest.gate.top1)
    assert manifest.parity is not None and manifest.parity.tolerances.min_top1_agreement == 0


def test_images_without_labels_are_judged_by_the_eager_models_own_sure_answers(
    reference: Reference,
):
    photos = load_dataset("sample-photos", is_split=False)
    dataset = Dataset(photos.source, reference.record.class_names, (), photos.val)
    gate = Gate(replace(reference, dataset=dataset), None, 0.005)

    def asked(change: float) -> AccuracyGate:
        def infer(images: np.ndarray) -> np.ndarray:
            logits = reference.answer(images)
            logits[0] += change * (logits[0] == logits[0].min())
            return logits

        info = SimpleNamespace(runtime="x", precision="int8", max_batch_size=None)
        return gate.measure(SimpleNamespace(infer=infer, info=info))  # type: ignore

    same, other = asked(0.0), asked(1e3)
    assert not same.is_labelled
    assert (same.drop, same.reference_top1) == (0.0, 1.0)
    # The eager model is not sure of some; of 16 images, one answers otherwise.
    assert 0 < same.num_images < len(photos.val)
    assert round(other.drop * other.num_images) == -(-other.num_images // 16)


def test_weights_without_training_images_are_calibrated_on_other_crops_than_they_are_checked_on(
    reference: Reference, config: ExportConfig
):
    photos = load_dataset("sample-photos", is_split=False)
    dataset = Dataset(photos.source, reference.record.class_names, (), photos.val)
    record = reference.record.model_copy(update={"data": "sample-photos"})
    samples = choose_samples(replace(reference, dataset=dataset, record=record), config)
    assert len(samples) == config.num_calibration_images
    assert not {s.read() for s in samples} & {s.read() for s in photos.val}
    with raises_naming(CalibrationError, "0 training images", "--data"):
        choose_samples(replace(reference, dataset=dataset), config)


def test_a_clip_is_quantized_in_place_of_the_convolution_before_it():
    spec = replace(VARIANTS["tiny"], activation="relu6")
    torch.manual_seed(0)
    model = random_network(spec, 5, torch.randn(8, 3, 32, 32), "same")
    graph = export_onnx(model, 32)
    clips = [node for node in graph.graph.node if node.op_type == "Clip"]
    assert len(clips) == sum(isinstance(module, ReLU6) for module in model.modules()) == 13
    tensors = tensors_to_quantize(graph, (), SCHEMES["onnxruntime"])
    assert {node.output[0] for node in clips} <= set(tensors)
    assert not {node.input[0] for node in clips} & set(tensors)
    names = {name for layers in layers_by_block(model).values() for name in layers}
    assert {node.output[0] for node in clips} <= names


def test_two_photographs_choose_one_range_for_each_map_of_openvino(
    reference: Reference, tmp_path: Path
):
    photos = load_dataset("sample-photos", is_split=False)
    dataset = Dataset(photos.source, reference.record.class_names, (), photos.val)
    record = reference.record.model_copy(update={"data": "sample-photos"})
    config = OpenVinoConfig(precision="int8", num_calibration_images=64)

    def range_shapes(chosen: Reference) -> set[tuple[int, ...]]:
        fused = read_fused(graph_of(chosen, "fp32"))
        model, _ = quantize(fused, chosen, config, (), tmp_path)
        return {
            tuple(op.input_value(1).get_shape())
            for op in model.get_ops()
            if op.get_type_name() == "FakeQuantize"
            and op.input_value(0).get_node().get_type_name() != "Constant"
        }

    assert max(len(shape) for shape in range_shapes(reference)) == 4
    without_training = replace(reference, dataset=dataset, record=record)
    assert range_shapes(without_training) == {()}
