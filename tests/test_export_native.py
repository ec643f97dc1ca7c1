"""Checkpoints as programs of the native engine: numbers, gate, refusals, the whole family."""

import json
import tempfile
from pathlib import Path
from typing import Any

import native_reference
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from common_fixtures import TINY_PREPROCESS
from facts import raises_naming
from networks import random_network
from onnx import numpy_helper
from onnx.utils import Extractor

from efficientnet.formats.artifact import ArtifactError, read_artifact
from efficientnet.formats.checkpoint import CheckpointError
from efficientnet.network.model import EfficientNet
from efficientnet.network.variants import VARIANTS, Padding
from efficientnet.runtimes import native_runtime, open_runtime
from efficientnet.runtimes.native.build import LIBRARY
from efficientnet.runtimes.native.engine import Engine, levels
from efficientnet.runtimes.native.program_file import DType, Kind, read_program_file, real_values
from export import native
from export.builders import native_builder
from export.checks.layers import show_model
from export.graphs.calibration import Ranges
from export.graphs.folding import INPUT_NAME, export_onnx, fold_batch_norm
from export.graphs.quantization import ONNXRUNTIME, insert_quantization
from export.inputs.config import ExportConfig, NativeConfig
from export.inputs.reference import load_reference
from export.native_format.native_program import Made, activation_names, make_program
from export.native_format.native_quantization import MapScale, curve_to, relu6, silu
from perf import layers
from perf.measurements.config import LayersConfig

pytestmark = pytest.mark.skipif(not LIBRARY.is_file(), reason="the native engine is not built")

SMALL = {"num_parity_images": 64, "num_calibration_images": 64, "batch": (1, 1, 16)}

# 360 held-out digits: one of them is 0.28 points.
MAX_DROP = 1.2

# Of small networks of each kind; the rest of the family are larger ones of the same layers.
MEMBERS = ["tiny", "b0", "b1", "lite0", "v2-b0", "v2-b1", "v2-s"]


def config(checkpoint: Path, output: Path, precision: str, **changes: Any) -> NativeConfig:
    # Processors without VNNI take part, too.
    settings: dict[str, Any] = {**SMALL, "max_drop": MAX_DROP, "reference": True, **changes}
    return NativeConfig(checkpoint, output, precision, **settings)  # type: ignore[arg-type]


def network(variant: str, size: int, padding: Padding = "same") -> tuple[EfficientNet, np.ndarray]:
    torch.manual_seed(0)
    # Whole pixels, as preprocessing gives them.
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, size, size))
    images = ((pixels / 255 - 0.5) / 0.5).astype(np.float32)
    return random_network(VARIANTS[variant], 10, torch.from_numpy(images), padding), images


def program_of(
    model: EfficientNet, images: np.ndarray, is_int8: bool, in_float: tuple[str, ...] = ()
) -> tuple[Made, Ranges | None]:
    size = images.shape[-1]
    spec = TINY_PREPROCESS.model_copy(update={"image_size": size})
    folded = fold_batch_norm(model)
    ranges: Ranges | None = None
    if is_int8:
        activations = show_model(folded, activation_names(model), images)
        ranges = {
            name: (min(0.0, float(values.min())), max(0.0, float(values.max())))
            for name, values in activations.items()
        }
    return make_program(folded, spec, ranges, in_float), ranges


@pytest.mark.parametrize("precision", ["int8", "bf16"])
@pytest.mark.parametrize("padding", ["same", "symmetric"])
def test_an_artifact_answers_like_the_network(
    fitted_checkpoints: dict[Padding, Path], tmp_path: Path, padding: Padding, precision: str
):
    checkpoint = fitted_checkpoints[padding]
    artifact = native.main(config(checkpoint, tmp_path / "a", precision))
    manifest = read_artifact(artifact)
    assert (manifest.runtime, manifest.precision, manifest.binding) == ("native", precision, None)
    reference = load_reference(ExportConfig(checkpoint=checkpoint, num_parity_images=64))
    runtime = open_runtime(artifact)
    logits = runtime.infer(reference.parity_images[:16])
    expected = reference.parity_logits[:16]
    mean_error = np.abs(logits - expected).mean() / expected.std()
    assert mean_error < (0.05 if precision == "bf16" else 0.3)
    if precision == "int8":
        assert manifest.gate is not None and manifest.gate.num_images == 360
        assert manifest.gate.drop <= MAX_DROP / 100
        assert json.loads((artifact / "calibration.json").read_text())["num_images"] == 64
    else:
        assert manifest.gate is None
    for size in (1, 3):
        few = open_runtime(artifact, 3).infer(reference.parity_images[:size])
        np.testing.assert_allclose(few, logits[:size], atol=1e-5)
    with raises_naming(ValueError, 17, "1 to 16"):
        runtime.infer(reference.parity_images[:17])


def test_each_layer_is_within_one_step_of_the_onnx_graph_with_the_same_ranges():
    model, images = network("tiny", 33)
    made, ranges = program_of(model, images, is_int8=True)
    assert ranges is not None
    activations, _ = native_reference.run(_view(made), images[0])
    found = dict(zip(made.tensor_names, activations, strict=True))
    written = {name: ranges[name] for name in made.tensor_names if name != INPUT_NAME}
    scales = {n: t for n, t in zip(made.tensor_names, made.program.tensors, strict=True)}
    graph = export_onnx(model, 33)
    # One scale for all pixels, which are whole numbers of it but for the graph's own rounding.
    insert_quantization(graph, written | {INPUT_NAME: (-1.0, 1.0)}, (), ONNXRUNTIME)
    _use_scales(graph, scales)
    extractor = Extractor(onnx.shape_inference.infer_shapes(graph))
    for layer in made.program.layers[2:-1]:
        # A block of one layer adds what it reads.
        read = [made.tensor_names[i] for i in (layer["input"], layer["residual"]) if i >= 0]
        names = list(dict.fromkeys(read))
        output = made.tensor_names[layer["output"]]
        part = extractor.extract_model(
            [f"{name}/quantized" for name in names], [f"{output}/quantized"]
        )
        session = ort.InferenceSession(part.SerializeToString(), _plain(), ["CPUExecutionProvider"])
        given = {f"{name}/quantized": found[name].transpose(2, 0, 1)[None] for name in names}
        (expected,) = session.run(None, given)
        steps = np.abs(found[output].transpose(2, 0, 1)[None].astype(int) - np.asarray(expected))
        assert steps.max() <= 1, output
        assert steps.mean() < 0.2, output


@pytest.mark.parametrize("in_float", [("features.0", "features.3"), ("features.2.0", "features.5")])
def test_blocks_that_the_gate_keeps_compute_in_bfloat16(tmp_path: Path, in_float: tuple[str, ...]):
    model, images = network("tiny", 32)
    made, _ = program_of(model, images, is_int8=True, in_float=in_float)
    types = {
        name: DType(made.program.tensors[layer["output"]]["dtype"])
        for name, layer in zip(made.layer_names, made.program.layers, strict=True)
        if Kind(layer["kind"]) in (Kind.CONV, Kind.DEPTHWISE, Kind.SQUEEZE_EXCITE)
    }
    for name, dtype in types.items():
        is_kept = name.startswith(tuple(f"{block}." for block in in_float))
        assert dtype == (DType.BF16 if is_kept else DType.U8), name
    made.program.write(tmp_path / "p.native")
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).numpy()
    found = Engine(tmp_path / "p.native", max_batch_size=4).infer(images)
    assert np.abs(found - expected).max() < 0.5 * expected.std()


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("variant", MEMBERS)
def test_each_layer_of_the_family_does_what_its_module_does(
    tmp_path: Path, variant: str, is_int8: bool
):
    # An odd size, so that activations of stride 2 have a row that only padding completes.
    model, images = network(variant, 37, "symmetric" if variant in ("b1", "v2-s") else "same")
    made, _ = program_of(model, images, is_int8)
    folded, tensors = fold_batch_norm(model), made.program.tensors
    made.program.write(tmp_path / "p.native")
    engine = Engine(tmp_path / "p.native", 2, keeps_tensors=True)
    logits = engine.infer(images[:1])
    activations = [
        torch.from_numpy(
            real_values(engine.read_tensor(i, tensor), tensor).transpose(2, 0, 1)[None]
        )
        for i, tensor in enumerate(tensors)
    ]
    activations[0] = torch.from_numpy(images[:1])
    for name, layer in zip(made.layer_names[1:-1], made.program.layers[1:-1], strict=True):
        # Each gets what the one before it made of it: whole random networks enlarge any rounding.
        module = folded.get_submodule(name.partition("/")[0].removesuffix(".0" * ("Conv" in name)))
        with torch.inference_mode():
            expected = module(activations[layer["input"]].clone())
            expected = (
                expected + activations[layer["residual"]] if layer["residual"] >= 0 else expected
            )
        tensor = tensors[layer["output"]]
        if is_int8:
            low, high = ((q - tensor["zero_point"]) * tensor["scale"] for q in (0.0, 255.0))
            expected = expected.clamp(float(low), float(high))
        error = (activations[layer["output"]] - expected).square().mean() / expected.square().mean()
        # Of weights and of what comes out.
        assert float(error.sqrt()) < (0.04 if is_int8 else 0.006), name
    with torch.inference_mode():
        expected = folded.classifier(activations[-1].mean((2, 3)))
    assert float((torch.from_numpy(logits) - expected).abs().max()) < 0.01 * float(expected.std())


@pytest.mark.slow
@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - set(MEMBERS)))
def test_the_larger_members_open_and_answer(tmp_path: Path, variant: str):
    model, images = network(variant, 32)
    made, _ = program_of(model, images, is_int8=True)
    made.program.write(tmp_path / "p.native")
    assert np.isfinite(Engine(tmp_path / "p.native").infer(images[:1])).all()


@pytest.mark.parametrize("function", [silu, relu6])
@pytest.mark.parametrize("highest", [0.5, 3.0, 8.0, 40.0])
def test_activations_are_within_half_a_step_and_what_the_pieces_leave(function, highest: float):
    reach = 8.0 if function is relu6 else max(8.0, highest)
    out = MapScale((highest + 0.28) / 255, 8)
    ending = curve_to(function, reach, out, None)
    assert ending.table is not None
    x = np.arange(-32768, 32768, dtype=np.int32)
    piece = (x >> 10) & 63
    y = native_reference.adds(
        native_reference.mulhrs(x, ending.table[0].astype(int)[piece]),
        ending.table[1].astype(int)[piece],
    )
    found = native_reference.sat8(y >> ending.fraction_bits).astype(float)
    exact = np.clip(function(x * reach / 32768) / out.scale + out.zero_point, 0, 255)
    # Half of the largest distance of a chord from SiLU, whose second derivative is 1/2 at most.
    of_pieces = 0.0 if function is relu6 else (reach / 32) ** 2 / 8 / 2 / 2 / out.scale
    assert np.abs(found - exact).max() <= 0.5 + of_pieces + 0.15
    assert np.abs(found - np.rint(exact)).max() <= 1


def test_without_fast_kernels_both_export_and_artifact_are_refused_but_for_reference(
    fitted_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if levels()[0] != "portable":
        bound = native.main(config(fitted_checkpoint, tmp_path / "b", "bf16", reference=False))
        monkeypatch.setattr(native_runtime, "levels", lambda: ("portable",))
        with raises_naming(ArtifactError, "--reference"):
            open_runtime(bound)
    with raises_naming(ArtifactError, "VNNI", "AMX"):
        native.main(config(fitted_checkpoint, tmp_path / "a", "bf16", reference=False))
    assert not (tmp_path / "a").exists()
    open_runtime(native.main(config(fitted_checkpoint, tmp_path / "r", "bf16")))


def test_the_times_of_layers_have_the_names_of_modules(fitted_checkpoint: Path, tmp_path: Path):
    artifact = native.main(config(fitted_checkpoint, tmp_path / "a", "bf16"))
    (program,) = layers.main(LayersConfig((artifact,), calls=2)).programs
    counted = sum(layer.operations for layer in program.layers)
    assert counted == read_artifact(artifact).flops_per_image
    assert {"squeeze-excite", "classifier"} <= {layer.kind for layer in program.layers}
    with raises_naming(ValueError, "--batch-size 1"):
        layers.main(LayersConfig((artifact,), calls=2, batch_size=2))


def _view(made: Made) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        made.program.write(Path(folder) / "p.native")
        return read_program_file(Path(folder) / "p.native")


def _use_scales(graph: onnx.ModelProto, scales: dict[str, Any]) -> None:
    # The engine's own are coarser where a residual or a gate wants it.
    for constant in graph.graph.initializer:
        name, _, kind = constant.name.rpartition("/")
        if name in scales and name != INPUT_NAME and kind in ("scale", "zero_point"):
            dtype = numpy_helper.to_array(constant).dtype
            value = np.array(scales[name][kind], dtype)
            constant.CopyFrom(numpy_helper.from_array(value, constant.name))


def _plain() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return options


def test_bf16_without_its_instructions_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(native_builder, "instruction_sets", lambda: ("avx512", "vnni"))
    with pytest.raises(CheckpointError):
        native.main(config(tmp_path, tmp_path / "artifact", "bf16"))
    assert "bf16" in caplog.text and "export/ov.py" in caplog.text
