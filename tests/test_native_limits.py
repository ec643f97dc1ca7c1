from pathlib import Path

import pytest
from commands import run
from facts import raises_naming

from efficientnet.measuring.native_peak import WORK, peak_per_s
from efficientnet.network.cost import layer_costs
from efficientnet.network.variants import VARIANTS
from efficientnet.runtimes.native.build import LIBRARY
from efficientnet.runtimes.native.engine import PORTABLE, levels
from export import native
from export.inputs.config import NativeConfig
from perf.layer_times.layer_profile import Node
from perf.layer_times.layers import LayerTimes
from perf.layer_times.native_limits import Rates, layer_limits, node_limits

pytestmark = pytest.mark.skipif(not LIBRARY.is_file(), reason="the native engine is not built")

# One of each a second: milliseconds are thousands of what is counted.
ONE = Rates({"int8": 1.0, "bf16": 1.0}, 1.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def artifact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("artifacts") / "native-bf16"
    # What is counted is the same where nothing runs it fast.
    config = NativeConfig(
        checkpoint=tiny_checkpoint,
        output=output,
        precision="bf16",
        reference=levels()[0] == PORTABLE,
    )
    return native.main(config)


def test_every_product_of_full_convolutions_goes_by_tiles_where_there_are_tiles(artifact: Path):
    limits = layer_limits(artifact / "model.native", "amx", ONE)
    costs = layer_costs(VARIANTS["tiny"], 32, num_classes=10)
    multiply_adds = sum(x.cost.flops for x in costs if x.operator.startswith("conv")) / 2
    assert sum(x["products"] for x in limits.values()) == pytest.approx(1e3 * multiply_adds)


def test_without_tiles_products_are_vector_instructions(artifact: Path):
    tiles = layer_limits(artifact / "model.native", "amx", ONE)
    wide = layer_limits(artifact / "model.native", "avx512_bf16", ONE)
    narrow = layer_limits(artifact / "model.native", "avx_vnni", ONE)
    for name, by_tiles in tiles.items():
        assert wide[name]["products"] == 0
        # A register of bf16 holds 32 products.
        instructions = by_tiles["instructions"] + by_tiles["products"] / 32
        assert wide[name]["instructions"] == pytest.approx(instructions)
        assert narrow[name]["instructions"] == pytest.approx(2 * instructions)
        assert wide[name]["bytes"] == by_tiles["bytes"]


def test_a_3x3_stem_has_the_limits_that_are_counted_by_hand(artifact: Path):
    limits = layer_limits(artifact / "model.native", "amx", ONE)
    channels = VARIANTS["tiny"].stem_channels
    values, taps = 16 * 16 * channels, 27
    found = limits["features.0.0/Conv"]
    assert found["products"] == pytest.approx(1e3 * values * taps)
    # 12 instructions of a bf16 epilogue and 64 of SiLU for 64 values.
    assert found["instructions"] == pytest.approx(1e3 * values / 64 * (12 + 64))
    read = 2 * 32 * 32 * 3 + 2 * values
    assert found["bytes"] == pytest.approx(1e3 * (2 * taps * channels + read))


def test_layers_computed_together_have_the_sum_of_their_limits(artifact: Path):
    limits = layer_limits(artifact / "model.native", "amx", ONE)
    names = tuple(limits)[1:3]
    together = node_limits(Node(names[1], "Conv", "amx", 1.0, names), limits)
    assert together["bytes"] == sum(limits[name]["bytes"] for name in names)


@pytest.mark.skipif(levels()[0] == PORTABLE, reason="this processor has no fast kernels")
def test_each_level_says_what_its_instructions_do_from_registers():
    for level in levels()[:-1]:
        for work in WORK:
            assert peak_per_s(work, 1, level) > 1e6
    with raises_naming(ValueError, "abacus"):
        peak_per_s("int8", 1, "abacus")


@pytest.mark.skipif(levels()[0] == PORTABLE, reason="this processor has no fast kernels")
def test_the_table_is_published_beside_what_others_measured(artifact: Path, tmp_path: Path):
    marks = "<!-- layers: written by a command -->\n<!-- /layers -->\n"
    (tmp_path / "results.md").write_text(marks)
    flags = ("--calls", 2, "--threads", 1, "--publish", "--readme", "results.md", "--json")
    done = run("perf/layers.py", artifact, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (program,) = LayerTimes.model_validate_json(done.stdout).programs
    assert all(x.limits_ms is not None for x in program.layers)
    shown = (tmp_path / "results.md").read_text()
    assert "**tiny, bf16, 32 px**" in shown and "features.0.0" in shown
    (file,) = (tmp_path / "reports/published").glob("*/layers-tiny-32px-bf16.json")
    assert LayerTimes.model_validate_json(file.read_text()).programs == (program,)


def test_publishing_without_a_native_artifact_is_refused_before_any_work(
    tiny_artifact: Path, tmp_path: Path
):
    (tmp_path / "r.md").write_text("<!-- layers: x -->\n<!-- /layers -->\n")
    done = run("perf/layers.py", tiny_artifact, "--publish", "--readme", "r.md", cwd=tmp_path)
    assert done.returncode == 1 and "--publish" in done.stderr and "native" in done.stderr
