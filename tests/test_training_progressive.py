from dataclasses import replace

import pytest

from training.recipe.config import ProgressiveConfig
from training.recipe.recipes import PAPER_PROGRESSIVE, RELEASED_PROGRESSIVE, imagenet_recipe
from training.recipe.stages import plan_stages, stage_index

# Algorithm 1 with M = 4 applied to Table 6, recounted by hand; sizes truncated.
EXPECTED = {
    "v2-s": [(128, 5, 0, 0.1), (185, 8.33, 0, 0.1667), (242, 11.67, 0, 0.2333), (300, 15, 0, 0.3)],
    "v2-m": [(128, 5, 0, 0.1), (212, 10, 0.0667, 0.2), (296, 15, 0.1333, 0.3), (380, 20, 0.2, 0.4)],
    "v2-l": [
        (128, 5, 0, 0.1),
        (212, 11.67, 0.1333, 0.2333),
        (296, 18.33, 0.2667, 0.3667),
        (380, 25, 0.4, 0.5),
    ],
}


@pytest.mark.parametrize("variant", EXPECTED)
def test_stages_of_the_paper_follow_algorithm_1(variant: str):
    stages = plan_stages(PAPER_PROGRESSIVE[variant])
    for stage, (size, magnitude, alpha, dropout) in zip(stages, EXPECTED[variant], strict=True):
        assert stage.image_size == size
        assert stage.randaugment_magnitude == pytest.approx(magnitude, abs=0.005)
        assert stage.mixup_alpha == pytest.approx(alpha, abs=5e-5)
        assert stage.dropout_rate == pytest.approx(dropout, abs=5e-5)


# Google's code: int(128 + (last - 128) * (stage + 1) / 4); the rest: Algorithm 1, no dropout ramp.
RELEASED = {
    "v2-s": ((171, 214, 257, 300), (5, 6.67, 8.33, 10), (0, 0, 0, 0), 0.2),
    "v2-m": ((192, 256, 320, 384), (5, 8.33, 11.67, 15), (0, 0.0667, 0.1333, 0.2), 0.3),
    "v2-l": ((192, 256, 320, 384), (5, 10, 15, 20), (0, 0.1667, 0.3333, 0.5), 0.4),
    "v2-xl": ((192, 256, 320, 384), (5, 10, 15, 20), (0, 0.1667, 0.3333, 0.5), 0.4),
}


@pytest.mark.parametrize("variant", RELEASED)
def test_stages_of_the_released_code(variant: str):
    stages = plan_stages(RELEASED_PROGRESSIVE[variant])
    sizes, magnitudes, alphas, dropout = RELEASED[variant]
    assert tuple(stage.image_size for stage in stages) == sizes
    for stage, magnitude, alpha in zip(stages, magnitudes, alphas, strict=True):
        assert stage.randaugment_magnitude == pytest.approx(magnitude, abs=0.005)
        assert stage.mixup_alpha == stage.cutmix_alpha == pytest.approx(alpha, abs=5e-5)
        assert stage.dropout_rate == dropout
    assert imagenet_recipe(variant, "released").progressive == RELEASED_PROGRESSIVE[variant]


def test_fixed_is_one_stage_of_the_last_values():
    (stage,) = plan_stages(imagenet_recipe("v2-m", "fixed").progressive)
    assert (stage.image_size, stage.randaugment_magnitude, stage.mixup_alpha) == (380, 20, 0.2)


def test_random_has_the_stages_of_paper_in_an_order_that_the_seed_decides():
    progressive = replace(PAPER_PROGRESSIVE["v2-l"], num_stages=8)
    in_order = plan_stages(progressive)
    shuffled = [plan_stages(replace(progressive, schedule="random"), seed) for seed in (0, 0, 1)]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    for stages in shuffled:
        assert [stage.index for stage in stages] == list(range(8))
        assert sorted(replace(stage, index=0).image_size for stage in stages) == [
            stage.image_size for stage in in_order
        ]


@pytest.mark.parametrize(
    ("num_steps", "num_stages"), [(100, 4), (616, 4), (7, 3), (5, 1), (350, 8)]
)
def test_each_stage_has_its_share_of_the_steps(num_steps: int, num_stages: int):
    stages = [stage_index(step, num_steps, num_stages) for step in range(num_steps)]
    assert stages == sorted(stages) and stages[0] == 0 and stages[-1] == num_stages - 1
    counts = [stages.count(stage) for stage in range(num_stages)]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_stages": 0}, "num_stages is 0"),
        ({"image_size": (8, 32)}, "at least 16"),
        ({"image_size": (128, 1030)}, "at most 1024 pixels"),
        ({"randaugment_magnitude": (5, 31)}, "at most 30"),
        ({"cutmix_alpha": (0, -1)}, "cannot be negative"),
        ({"mixup_alpha": (-0.1, 0.2)}, "cannot be negative"),
        ({"dropout_rate": (0.1, 1.0)}, "0 <= rate < 1"),
    ],
)
def test_values_outside_their_limits_are_named(changes: dict, reason: str):
    good = {
        "image_size": (32, 64),
        "randaugment_magnitude": (5, 9),
        "mixup_alpha": (0, 0.2),
        "dropout_rate": (0.1, 0.3),
    }
    with pytest.raises(ValueError, match=reason):
        ProgressiveConfig(**(good | changes))
