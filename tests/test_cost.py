import math
from itertools import groupby

import pytest
import torch
from facts import raises_naming
from torch.utils.flop_counter import FlopCounterMode

from efficientnet.network.cost import (
    DevicePeak,
    latency_floor_ms,
    layer_costs,
    network_cost,
    total_cost,
)
from efficientnet.network.model import SqueezeExcite, build_model
from efficientnet.network.variants import VARIANTS

# 1000 classes. Parameters and batch norm statistics of the official test files and torchvision's
# metadata; multiply-adds in units of 1e-4 G recounted from the papers' tables.
# Variant: trained, statistics, total, (size, multiply-adds / 1e9) ...
PUBLISHED = {
    "b0": (5_288_548, 42_016, 5_330_564, (224, 0.3858)),
    "b1": (7_794_184, 62_048, 7_856_232, (240, 0.6868)),
    "b2": (9_109_994, 67_568, 9_177_562, (260, 0.9936)),
    "b3": (12_233_232, 87_296, 12_320_528, (300, 1.8271)),
    "b4": (19_341_616, 125_200, 19_466_816, (380, 4.3938)),
    "b5": (30_389_784, 172_736, 30_562_520, (456, 10.2664)),
    "b6": (43_040_704, 224_432, 43_265_136, (528, 19.0676)),
    "b7": (66_347_960, 310_720, 66_658_680, (600, 37.7459)),
    "lite0": (4_652_008, 42_016, 4_694_024, (224, 0.3852)),
    "v2-s": (21_458_488, 153_872, 21_612_360, (300, 5.3076), (384, 8.3656)),
    "v2-m": (54_139_356, 292_032, 54_431_388, (384, 15.7368), (480, 24.5825)),
    "v2-l": (118_515_272, 512_576, 119_027_848, (384, 35.8994), (480, 56.0797)),
    "v2-xl": (208_119_808, 777_024, 208_896_832, (384, 52.5293), (512, 93.3535)),
    "v2-b0": (7_139_704, 60_608, 7_200_312, (192, 0.5282), (224, 0.7181)),
    "v2-b1": (8_141_052, 71_072, 8_212_124, (192, 0.7470), (240, 1.1968)),
    "v2-b2": (10_096_086, 82_288, 10_178_374, (208, 1.0435), (260, 1.6975)),
    "v2-b3": (14_358_406, 109_216, 14_467_622, (240, 1.9080), (300, 3.0115)),
}

# Stem, stages, head with classifier: trained, statistics, multiply-adds.
V2_S_AT_384 = [
    (696, 48, 23_887_872),
    (10_464, 96, 382_205_952),
    (303_552, 1_728, 2_781_609_984),
    (589_184, 2_432, 1_351_876_608),
    (917_680, 12_800, 448_880_640),
    (3_463_840, 36_672, 1_587_437_568),
    (14_561_832, 97_536, 1_741_252_608),
    (1_611_240, 2_560, 48_465_920),
]
B0_AT_224 = [
    (928, 64, 10_838_016),
    (1_448, 96, 10_035_712),
    (16_714, 1_056, 54_945_216),
    (46_640, 1_696, 37_939_584),
    (242_930, 5_280, 43_555_200),
    (543_148, 7_968, 86_102_400),
    (2_026_348, 18_048, 91_528_224),
    (717_232, 5_248, 29_520_000),
    (1_693_160, 2_560, 21_350_400),
]

# V2, table 3 (B4, which stages are fused): parameters in M, multiply-adds in G.
TABLE_3 = {"b4-fused-1-3": (20.0, 7.5), "b4-fused-1-5": (43.4, 21.3), "b4-fused-1-7": (132.0, 34.4)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name: str):
    num_parameters, num_statistics, num_total, *sizes = PUBLISHED[name]
    for size, multiply_adds in sizes:
        cost = network_cost(VARIANTS[name], size)
        assert cost.num_parameters == num_parameters
        assert cost.num_statistics == num_statistics
        assert cost.num_parameters + cost.num_statistics == num_total
        assert round(cost.multiply_adds / 1e9, 4) == multiply_adds


@pytest.mark.parametrize(
    ("name", "size", "rows"), [("v2-s", 384, V2_S_AT_384), ("b0", 224, B0_AT_224)]
)
def test_counts_of_each_stage_are_the_published_ones(name, size, rows):
    layers = layer_costs(VARIANTS[name], size)
    stages = [total_cost(list(group)) for _, group in groupby(layers, key=lambda x: x.stage)]
    assert [(c.num_parameters, c.num_statistics, c.multiply_adds) for c in stages] == rows


@pytest.mark.parametrize("name", TABLE_3)
def test_fused_b4_is_within_three_percent_of_table_3(name: str):
    parameters, multiply_adds = TABLE_3[name]
    cost = network_cost(VARIANTS[name], 380)
    assert cost.num_parameters / 1e6 == pytest.approx(parameters, rel=0.03)
    assert cost.multiply_adds / 1e9 == pytest.approx(multiply_adds, rel=0.03)


@pytest.mark.parametrize("name", VARIANTS)
def test_each_layer_counts_what_the_network_itself_has(name: str):
    with torch.device("meta"):
        model = build_model(VARIANTS[name], num_classes=7)
    modules = dict(model.named_modules())
    cost = network_cost(VARIANTS[name], 64, num_classes=7)
    assert sum(p.numel() for p in model.parameters()) == cost.num_parameters
    statistics = [b for n, b in model.named_buffers() if ".running_" in n]
    assert sum(b.numel() for b in statistics) == cost.num_statistics
    for layer in layer_costs(VARIANTS[name], 64, num_classes=7):
        own = modules[layer.name]
        num_own = sum(p.numel() for p in own.parameters())
        if layer.operator == "squeeze-excite":
            assert isinstance(own, SqueezeExcite) and num_own == layer.cost.num_parameters
        elif layer.operator.startswith(("conv", "depthwise")):
            assert num_own == layer.cost.num_parameters - layer.cost.num_statistics
            assert own.weight.shape[0] == layer.out_channels
            assert own.groups == (layer.in_channels if "depthwise" in layer.operator else 1)


# One of each kind; the others are the same kinds, longer and wider.
OF_EACH_KIND = ("tiny", "b0", "b4-fused-1-3", "lite0", "v2-b0", "v2-s")
LONGER = [
    pytest.param(name, 3, marks=pytest.mark.slow) for name in VARIANTS if name not in OF_EACH_KIND
]


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [*((name, 3) for name in OF_EACH_KIND), ("b0", 1), *LONGER],
)
def test_multiply_adds_equal_those_of_torchs_own_counter(name: str, batch_size: int):
    spec, size = VARIANTS[name], VARIANTS[name].train_image_size + 1
    with torch.device("meta"):
        model = build_model(spec, num_classes=1000).eval()
        images = torch.empty(batch_size, 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    assert counter.get_total_flops() == network_cost(spec, size, batch_size).flops


def test_bytes_of_a_small_network_are_those_counted_by_hand():
    # tiny at 32 px, stem: 3 x 32 x 32 values in, 8 x 16 x 16 out; 216 weights and 8 biases.
    stem = layer_costs(VARIANTS["tiny"], 32, batch_size=2, precision="fp16")[0]
    assert stem.cost.activation_bytes == 2 * 2 * (3 * 32 * 32 + 8 * 16 * 16)
    assert stem.cost.weight_bytes == 2 * (216 + 8)
    # Its last residual addition reads 32 x 8 x 8 values that the convolution did not.
    addition = [x for x in layer_costs(VARIANTS["tiny"], 64) if x.operator == "add"][-1]
    assert addition.cost.activation_bytes == 4 * 32 * 8 * 8 and addition.cost.weight_bytes == 0


def test_precision_changes_bytes_only_and_batch_everything_but_weights():
    spec = VARIANTS["v2-s"]
    fp32, int8 = network_cost(spec, 224), network_cost(spec, 224, precision="int8")
    assert int8.activation_bytes * 4 == fp32.activation_bytes
    assert int8.weight_bytes * 4 == fp32.weight_bytes
    assert int8.multiply_adds == fp32.multiply_adds
    four = network_cost(spec, 224, batch_size=4)
    assert four.weight_bytes == fp32.weight_bytes
    assert four.activation_bytes == 4 * fp32.activation_bytes
    assert four.multiply_adds == 4 * fp32.multiply_adds


def test_floor_is_the_longer_of_computing_and_moving():
    cost = network_cost(VARIANTS["v2-s"], 384)
    computing = DevicePeak(operations_per_s=1e12, bytes_per_s=math.inf, source="")
    assert latency_floor_ms(cost, computing) == pytest.approx(2 * 8.3656, rel=1e-4)
    moving = DevicePeak(operations_per_s=math.inf, bytes_per_s=1e9, source="")
    assert latency_floor_ms(cost, moving) == pytest.approx(cost.weight_bytes / 1e6)
    both = DevicePeak(operations_per_s=1e12, bytes_per_s=1e9, source="")
    assert latency_floor_ms(cost, both) == latency_floor_ms(cost, moving)


@pytest.mark.parametrize(("image_size", "batch_size"), [(0, 1), (224, 0)])
def test_sizes_below_one_are_refused(image_size: int, batch_size: int):
    with raises_naming(ValueError, 0, 1):
        network_cost(VARIANTS["tiny"], image_size, batch_size)
