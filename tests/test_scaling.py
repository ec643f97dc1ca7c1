import math

import pytest
from facts import raises_naming

from efficientnet.network.cost import network_cost
from efficientnet.network.scaling import (
    CompoundScale,
    compound_scale,
    fit_compound_coefficients,
    scale_channels,
    scale_layers,
)
from efficientnet.network.variants import VARIANTS, scale_up, scale_variant


def test_phi_multiplies_depth_width_and_resolution_by_the_papers_coefficients():
    assert compound_scale(0) == (1, 1, 1)
    assert compound_scale(1) == (1.2, 1.1, 1.15)
    depth, width, resolution = compound_scale(2.5)
    assert (depth, width, resolution) == (1.2**2.5, 1.1**2.5, 1.15**2.5)


@pytest.mark.parametrize("phi", [math.nan, math.inf])
def test_a_phi_that_is_no_number_is_refused(phi: float):
    with raises_naming(ValueError, phi, "finite"):
        compound_scale(phi)


def test_fit_finds_the_papers_coefficients_when_they_score_best():
    def accuracy(scale) -> float:
        return -abs(scale.depth - 1.2) - abs(scale.width - 1.1) - abs(scale.resolution - 1.15)

    fit = fit_compound_coefficients(accuracy)
    assert fit.best == (1.2, 1.1, 1.15)
    assert fit.score == fit.tried[fit.best] == max(fit.tried.values())


def test_fit_tries_only_points_near_the_budget_and_can_minimize():
    fit = fit_compound_coefficients(lambda scale: scale.width, goal="min", tolerance=0.05)
    assert all(abs(a * b**2 * g**2 - 2) <= 0.05 for a, b, g in fit.tried)
    assert len(fit.tried) > 20
    # Of the many points with the smallest width the one nearest to the budget.
    assert fit.best.beta == 1.0
    ties = [point for point in fit.tried if point.beta == 1.0]
    assert abs(fit.best.cost - 2) == min(abs(point.cost - 2) for point in ties)


def test_fit_with_a_cost_function_of_real_networks():
    base = VARIANTS["b0"]

    def cost(scale) -> float:
        from efficientnet.network.cost import network_cost

        scaled = scale_variant(base, scale.width, scale.depth, 0.9)
        return network_cost(scaled, round(224 * scale.resolution)).multiply_adds

    fit = fit_compound_coefficients(cost, goal="min", step=0.1)
    assert all(cost(compound_scale(1, p)) >= fit.score for p in fit.tried)


def test_fit_refuses_a_grid_without_points_and_a_score_that_is_no_number():
    with raises_naming(ValueError, "step", "tolerance"):
        fit_compound_coefficients(lambda scale: 1.0, step=0.7, tolerance=0.01)
    with raises_naming(ValueError, "score", "not a number"):
        fit_compound_coefficients(lambda scale: math.nan)
    with raises_naming(ValueError, "step", 0):
        fit_compound_coefficients(lambda scale: 1.0, step=0)


@pytest.mark.parametrize(
    ("channels", "width", "min_kept", "expected"),
    [
        (16, 1.2, 0.9, 24),  # 19.2 would become 16, less than 0.9 of it
        (16, 1.2, 0.0, 16),  # V2-B3's first stage
        (32, 1.1, 0.9, 32),
        (40, 1.1, 0.9, 48),
        (3, 0.5, 0.9, 8),
        (20, 1.0, 0.9, 20),
    ],
)
def test_channels_are_rounded_to_eights(channels, width, min_kept, expected):
    assert scale_channels(channels, width, min_kept) == expected


def test_layers_are_rounded_up():
    assert [scale_layers(n, 1.1) for n in (1, 2, 4)] == [2, 3, 5]


# Stem, stages, head; layers: the printed tables, worked out for every member.
@pytest.mark.parametrize(
    ("name", "channels", "layers"),
    [
        ("b1", (32, 16, 24, 40, 80, 112, 192, 320, 1280), (2, 3, 3, 4, 4, 5, 2)),
        ("b3", (40, 24, 32, 48, 96, 136, 232, 384, 1536), (2, 3, 3, 5, 5, 6, 2)),
        ("b7", (64, 32, 48, 80, 160, 224, 384, 640, 2560), (4, 7, 7, 10, 10, 13, 4)),
        ("v2-b2", (32, 16, 32, 56, 104, 120, 208, 1408), (2, 3, 3, 4, 6, 10)),
        ("v2-b3", (40, 16, 40, 56, 112, 136, 232, 1536), (2, 3, 3, 5, 7, 12)),
    ],
)
def test_scaled_variants_have_the_printed_channels_and_layers(name, channels, layers):
    spec = VARIANTS[name]
    found = (spec.stem_channels, *(s.out_channels for s in spec.stages), spec.head_channels)
    assert found == channels
    assert tuple(stage.num_layers for stage in spec.stages) == layers


def test_train_sizes_of_v1_are_four_fifths_of_the_eval_size_in_sixteens():
    sizes = [VARIANTS[f"b{i}"].train_image_size for i in range(8)]
    assert sizes == [176, 192, 208, 240, 304, 352, 416, 480]


# The released code calls S the base at width 1.4 and depth 1.8, M at 1.6 and 2.2, L at 2.0 and 3.1:
# V1's B4, B5 and B7, whose images have 380, 456 and 600 pixels.
M_OVER_S = CompoundScale(2.2 / 1.8, 1.6 / 1.4, 456 / 380)
L_OVER_S = CompoundScale(3.1 / 1.8, 2.0 / 1.4, 600 / 380)


# Parameters and multiply-adds over those of the published network: the figures of docs/search.md.
@pytest.mark.parametrize(
    ("scale", "rule", "target", "size", "layers", "parameters", "multiply_adds"),
    [
        (M_OVER_S, "v1", "v2-m", 461, (3, 5, 5, 8, 11, 19), 0.65, 0.88),
        (M_OVER_S, "v2", "v2-m", 461, (3, 5, 5, 8, 11, 19), 0.65, 0.84),
        (L_OVER_S, "v1", "v2-l", 606, (4, 7, 7, 11, 16, 26), 0.63, 1.43),
        (L_OVER_S, "v2", "v2-l", 480, (4, 7, 7, 11, 25, 42), 0.97, 1.09),
    ],
)
def test_scaled_from_s_the_networks_come_near_m_and_l(
    scale, rule, target, size, layers, parameters, multiply_adds
):
    spec, goal = scale_up(VARIANTS["v2-s"], scale, rule, "scaled"), VARIANTS[target]
    assert spec.eval_image_size == size
    assert tuple(stage.num_layers for stage in spec.stages) == layers
    cost = network_cost(spec, spec.eval_image_size)
    other = network_cost(goal, goal.eval_image_size)
    assert cost.num_parameters / other.num_parameters == pytest.approx(parameters, abs=0.005)
    assert cost.multiply_adds / other.multiply_adds == pytest.approx(multiply_adds, abs=0.005)


def test_v2s_rule_keeps_the_head_and_v1s_scales_it():
    base = VARIANTS["v2-s"]
    v1, v2 = (scale_up(base, L_OVER_S, rule, "scaled") for rule in ("v1", "v2"))
    assert (v1.head_channels, v2.head_channels) == (1832, 1280)
    assert v2.train_image_size == 384
    # An image that is larger already stays so.
    assert scale_up(VARIANTS["v2-xl"], compound_scale(1), "v2", "x").eval_image_size == 512
