import pytest

from training.config import ProgressiveConfig
from training.progressive import plan_stages, stage_index
from training.recipes import PAPER_PROGRESSIVE

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


def test_a_single_stage_has_the_last_values():
    (stage,) = plan_stages(ProgressiveConfig((32, 64), (5, 9), (0, 0.2), (0.1, 0.3), num_stages=1))
    assert stage.image_size == 64
    assert stage.randaugment_magnitude == 9
    assert stage.mixup_alpha == 0.2
    assert stage.dropout_rate == 0.3


def test_two_stages_are_the_first_and_the_last_values():
    first, last = plan_stages(ProgressiveConfig((32, 64), (5, 9), (0, 0.2), (0.1, 0.3), 2))
    assert (first.image_size, last.image_size) == (32, 64)
    assert (first.dropout_rate, last.dropout_rate) == (0.1, 0.3)


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
        ({"randaugment_magnitude": (1, 5)}, "expected 0 or >= 2.5"),
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
