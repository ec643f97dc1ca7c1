import json
from pathlib import Path

import pytest
from commands import ROOT, Done, run
from facts import raises_naming

from efficientnet.formats.artifact import ArtifactError, read_artifact, write_manifest
from efficientnet.network.cost import layer_costs, network_cost
from efficientnet.network.variants import VARIANTS
from perf.layer_times import layers
from perf.layer_times.layer_profile import (
    HALF_MICROSECOND,
    LayerTime,
    Node,
    later_mean_us,
    layer_times,
)
from perf.layer_times.layer_tables import (
    ProgramLayers,
    kind_times,
    kinds_table,
    limits_table,
    side_by_side_table,
    slowest_table,
)
from perf.layer_times.layers import LayersConfig, LayerTimes
from perf.layer_times.native_limits import LIMITS

TINY_COSTS = layer_costs(VARIANTS["tiny"], 32, num_classes=10)
TINY_FLOPS = network_cost(VARIANTS["tiny"], 32, num_classes=10).flops

CONVOLUTIONS = {"convolution 1x1": 11, "convolution 3x3": 4, "depthwise": 4}


def rows_of(*nodes: Node, operations_per_s: float | None = None) -> tuple[LayerTime, ...]:
    return layer_times(nodes, TINY_COSTS, "logits", operations_per_s)


def kind_of(name: str, operator: str, *covered: str) -> str:
    (row,) = rows_of(Node(name, operator, "kernel", 1.0, covered))
    return row.kind


def require_operations(rows: tuple[LayerTime, ...]) -> None:
    by_module = {row.module: row for row in rows if row.kind in CONVOLUTIONS}
    for layer in TINY_COSTS:
        if layer.operator.startswith(("conv", "depthwise")):
            assert by_module[layer.name].operations == layer.cost.flops


def flops_of(*names: str) -> int:
    return sum(layer.cost.flops for layer in TINY_COSTS if layer.name in names)


@pytest.fixture(scope="module")
def done(tiny_artifact: Path, openvino_artifact: Path) -> Done:
    """One real run of the command on an artifact of each runtime."""
    flags = ("--calls", 6, "--threads", 1, "--json")
    found = run("perf/layers.py", tiny_artifact, openvino_artifact, *flags)
    assert found.returncode == 0, found.stderr
    return found


@pytest.fixture(scope="module")
def measured(done: Done) -> LayerTimes:
    return LayerTimes.model_validate_json(done.stdout)


@pytest.fixture(params=["onnxruntime", "openvino"])
def program(request: pytest.FixtureRequest, measured: LayerTimes) -> ProgramLayers:
    (found,) = (own for own in measured.programs if own.runtime == request.param)
    return found


def test_the_kinds_add_up_to_all_layers_and_operations(program: ProgramLayers):
    for parts in (program.kinds, program.layers):
        assert sum(part.ms for part in parts) == pytest.approx(program.layers_ms)
        assert sum(part.operations for part in parts) == TINY_FLOPS
    assert sum(kind.share for kind in program.kinds) == pytest.approx(1)
    assert sum(kind.num_layers for kind in program.kinds) == len(program.layers)
    assert min(layer.ms for layer in program.layers) > 0
    assert min(program.call_ms, program.profiled_call_ms) > 0


def test_each_convolution_is_found_with_the_operations_of_its_module(program: ProgramLayers):
    kinds = {kind.kind: kind for kind in program.kinds}
    assert {name: kinds[name].num_layers for name in CONVOLUTIONS} == CONVOLUTIONS
    assert kinds["classifier"].num_layers == kinds["pooling"].num_layers == 1
    assert "squeeze-excite" in kinds and "other" not in kinds
    require_operations(program.layers)


# What OpenVINO 2026 executes of `tiny` under ONEDNN_MAX_CPU_ISA = AVX512_CORE, AVX512_CORE_VNNI,
# AVX512_CORE_BF16 and AVX512_CORE_AMX: [name, operator, kernel, names of the nodes it does]; int8
# keeps blocks in bf16. Kernels and what is joined differ from one processor to the next.
PROFILES = json.loads((ROOT / "tests/files/openvino-profiles.json").read_text())


@pytest.mark.parametrize("kind", PROFILES)
def test_profiles_of_other_processors_are_read_alike(kind: str):
    nodes = [Node(*told[:3], 1.0, tuple(told[3])) for told in PROFILES[kind]]
    rows = rows_of(*nodes)
    assert sum(row.operations for row in rows) == TINY_FLOPS
    require_operations(rows)
    kinds = [row.kind for row in rows]
    assert kinds.count("classifier") == 1 and "squeeze-excite" in kinds and "other" not in kinds


def test_a_float32_program_has_a_share_of_the_peak(program: ProgramLayers):
    assert program.operations_per_s
    for layer in program.layers:
        if layer.operations:
            rate = layer.operations / layer.ms / 1e6
            assert layer.gop_per_s == pytest.approx(rate)
            assert layer.share_of_peak == pytest.approx(rate * 1e9 / program.operations_per_s)
        else:
            assert layer.gop_per_s is None and layer.share_of_peak is None


def test_with_json_stdout_is_one_document_and_the_tables_are_on_stderr(
    done: Done, tiny_artifact: Path, openvino_artifact: Path
):
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["num_calls"] == 6
    for title in ("convolution 1x1", "slowest layers", "without a profile", "side by side"):
        assert title in done.stderr
    assert str(tiny_artifact) in done.stderr and str(openvino_artifact) in done.stderr


def test_a_batch_without_a_fixed_shape_is_profiled_too_into_a_file(
    openvino_artifact: Path, tmp_path: Path
):
    flags = ("--calls", 1, "--threads", 1, "--batch-size", 3)
    done = run("perf/layers.py", openvino_artifact, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "reports/layers.json\n"
    text = (tmp_path / "reports" / "layers.json").read_text()
    (program,) = LayerTimes.model_validate_json(text).programs
    assert sum(layer.operations for layer in program.layers) == 3 * TINY_FLOPS
    assert "side by side" not in done.stderr


@pytest.mark.parametrize(
    ("first_us", "mean_us", "num_later", "expected"),
    # 100, then 10 each: 140 / 5 = 28. A mean of 0 tells of less than a microsecond a call.
    [(100, 28, 4, 10.5), (3, 0, 4, 0.0), (1000, 205, 5, 46.5)],
)
def test_the_first_call_is_taken_out_of_a_mean(
    first_us: int, mean_us: int, num_later: int, expected: float
):
    found = later_mean_us(first_us, mean_us, num_later)
    assert found == pytest.approx(expected + HALF_MICROSECOND)


@pytest.mark.parametrize(
    ("name", "operator", "kind"),
    [
        ("features.0.0/Conv_nchwc", "Conv", "convolution 3x3"),
        ("features.2.0.block.1.0/Conv_token_49", "QLinearConv", "convolution 1x1"),
        ("features.3.0.block.1.0/Conv/WithoutBiases", "GroupConvolution", "depthwise"),
        ("features.3.0.block.2.gate.3/Sigmoid_nchwc", "Conv", "squeeze-excite"),
        ("features.3.0.block.2/Mul/fq_output_0", "QLinearMul", "quantize, dequantize"),
        ("features.3.0.block.2/Mul", "Subgraph", "squeeze-excite"),
        ("features.0.2/Mul/QuickGeluFusion/", "QuickGelu", "SiLU"),
        ("features.3.0.block.1.2/Sigmoid", "QLinearSigmoid", "SiLU"),
        ("features.2.1/Add", "Add", "addition"),
        ("images/QuantizeLinear", "QuantizeLinear", "quantize, dequantize"),
        ("features.0.2/Mul/DequantizeLinear", "DequantizeLinear", "quantize, dequantize"),
        ("images_abcd_acdb_features.0.0/Conv", "Reorder", "reorder, transpose, cast"),
        ("avgpool/GlobalAveragePool", "ReduceMean", "pooling"),
        ("logits_original", "FullyConnected", "classifier"),
        ("classifier.1/Gemm", "Gemm", "classifier"),
        ("network/Strange", "Strange", "other"),
    ],
)
def test_kinds_follow_from_names_and_operators(name: str, operator: str, kind: str):
    assert kind_of(name, operator) == kind


def test_an_operation_that_also_rounds_is_not_called_rounding():
    covered = ("features.3.0.block.2/Mul", "features.3.0.block.2/Mul/fq_output_0")
    assert kind_of(covered[1], "Subgraph", *covered) == "squeeze-excite"
    assert kind_of(covered[1], "Subgraph", covered[1]) == "quantize, dequantize"


def test_the_operations_of_squeeze_excite_are_shared_by_its_two_layers():
    gate = "features.3.0.block.2"
    rows = rows_of(
        Node(f"{gate}.pool/GlobalAveragePool", "ReduceMean", "", 1.0),
        Node(f"{gate}.gate.0/Conv", "Convolution", "", 1.0),
        Node(f"{gate}.gate.2/Conv", "Convolution", "", 1.0),
        Node(f"{gate}/Mul", "Multiply", "", 1.0),
    )
    assert [row.operations for row in rows] == [0, *[flops_of(gate) // 2] * 2, 0]


def test_a_node_that_does_two_convolutions_has_the_operations_of_both():
    names = ("features.3.0.block.0.0", "features.3.0.block.1.0")
    covered = tuple(f"{name}/Conv" for name in names)
    rows = rows_of(Node(covered[0], "Convolution", "jit", 2.0, covered), operations_per_s=1e9)
    assert rows[0].operations == flops_of(*names)
    assert rows[0].share_of_peak == pytest.approx(flops_of(*names) / 2e6)


def test_a_reorder_without_a_module_is_placed_after_the_node_before_it():
    reorder = Node("ReorderOutput_token_89", "ReorderOutput", "ReorderOutput", 2.0)
    rows = rows_of(Node("features.0.0/Conv", "Conv", "Conv", 1.0), reorder)
    assert rows[1].module == "features.0.0"
    text = slowest_table(make_program(rows)).aligned_text()
    assert "ReorderOutput_token_89 after features.0.0" in text


def make_program(rows: tuple[LayerTime, ...], path: str = "artifact") -> ProgramLayers:
    return ProgramLayers(
        path=path,
        program_sha256="",
        variant="tiny",
        runtime="openvino",
        precision="int8",
        image_size=32,
        kinds=kind_times(rows, None),
        layers=rows,
        layers_ms=sum(row.ms for row in rows),
        call_ms=5.0,
        median_call_ms=6.0,
        profiled_call_ms=7.0,
        operations_per_s=None,
    )


def test_the_tables_show_the_slowest_first_and_no_share_of_an_unknown_peak():
    convolution = Node("features.0.0/Conv", "Convolution", "jit_avx2_I8", 1.0)
    silu = Node("features.0.2/Mul", "SwishCPU", "jit", 3.0)
    program = make_program(rows_of(convolution, silu))
    shown = kinds_table(program)
    assert [row[0] for row in shown.rows] == ["SiLU", "convolution 3x3", "all"]
    assert [row[2] for row in shown.rows] == ["75.0 %", "25.0 %", "100.0 %"]
    assert {row[-1] for row in shown.rows} == {"-"}
    other = make_program(rows_of(convolution), "other")
    beside = {row[0]: row[1:] for row in side_by_side_table([program, other]).rows}
    assert beside["SiLU"] == ("3.00", "-") and beside["all layers"] == ("4.00", "1.00")


def limited_layer(module: str, ms: float, *limits_ms: float) -> LayerTime:
    return LayerTime(
        name=f"{module}/Conv",
        module=module,
        kind="depthwise",
        kernel="amx",
        ms=ms,
        operations=0,
        gop_per_s=None,
        share_of_peak=None,
        limits_ms=dict(zip(LIMITS, limits_ms, strict=True)),
    )


def test_like_blocks_share_a_row_with_the_nearest_limit_and_how_near_it_is():
    layers = (
        limited_layer("features.3.0.block.1.0", 1.0, 0.1, 0.5, 0.2),
        limited_layer("features.3.1.block.1.0", 2.0, 0.2, 0.4, 0.3),
        limited_layer("features.3.2.block.1.0", 2.0, 0.2, 0.4, 0.7),
    )
    program = make_program(layers)
    first, later, total = limits_table(program).rows
    assert (first[0], first[2]) == ("features.3.0.block.1.0", "1")
    assert first[-2:] == ("instructions", "50.0 %")
    assert (later[2], later[3], *later[-2:]) == ("2", "4.000", "bytes", "25.0 %")
    assert total[-1] == "30.0 %"


def test_an_eager_checkpoint_is_refused_with_the_runtimes_that_tell(tiny_checkpoint: Path):
    with raises_naming(ArtifactError, tiny_checkpoint, "onnxruntime", "ov.py"):
        layers.main(LayersConfig((tiny_checkpoint,)))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"runtime": "aoti"}, "aoti"),
        ({"provider": "CUDAExecutionProvider"}, "CUDAExecutionProvider"),
    ],
)
def test_other_runtimes_are_refused_before_any_work(
    change: dict[str, str], found: str, tiny_artifact: Path, tmp_path: Path
):
    manifest = read_artifact(tiny_artifact)
    (tmp_path / manifest.program_file).symlink_to(tiny_artifact / manifest.program_file)
    write_manifest(tmp_path, manifest.model_copy(update=change))
    with raises_naming(ArtifactError, found, "onnxruntime", "openvino", "native"):
        layers.main(LayersConfig((tmp_path,)))


def test_a_batch_that_is_too_large_is_refused(tiny_artifact: Path):
    with raises_naming(ValueError, "--batch-size", 65, 64):
        layers.main(LayersConfig((tiny_artifact,), batch_size=65))
