import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch
from facts import require_named
from PIL import Image
from small_trainings import epoch_metrics

from efficientnet.formats.class_accuracy import ClassAccuracy, count_classes, is_at_chance
from efficientnet.images.datasets import Dataset, Sample
from efficientnet.network.variants import NetworkOptions
from training.batches.sampler import StepPlan
from training.learning.distributed import Ranks
from training.learning.evaluation import Evaluation
from training.learning.state import StageTotals, new_state
from training.recipe.recipes import digits_recipe
from training.recipe.stages import plan_stages
from training.running.report import FinalEvaluation, confused_pairs, draw_confusion, write_report
from training.running.run_folder import Run

CONFUSION = ((30, 5, 1), (2, 33, 1), (0, 0, 12))


def report_of(
    directory: Path,
    class_names: tuple[str, ...] = ("cat", "dog", "a|b"),
    confusion: tuple[tuple[int, ...], ...] | None = CONFUSION,
    top1s: tuple[float, ...] = (0.5, 0.9),
    seconds: float = 20.0,
    world_size: int = 1,
    top1: float = 0.85,
    counts: tuple[list[int], list[int]] | None = None,
) -> str:
    config = replace(digits_recipe("tiny"), eval_image_size=40, data="/somewhere/pets", steps=44)
    images, hits = [0] * len(class_names), [0] * len(class_names)
    for index, row in enumerate(confusion or CONFUSION):
        images[index], hits[index] = sum(row), row[index]
    images, hits = counts or (images, hits)
    classes = ClassAccuracy(tuple(images), tuple(hits))
    evaluations = [
        FinalEvaluation(
            weights, size, Evaluation(0.25, top1 + size / 1000, 1.0, 84, classes, confusion)
        )
        for weights, top1 in (("averaged", top1), ("raw", 0.8))
        for size in (32, 40)
    ]
    image = Sample("one", 0, b"")
    dataset = Dataset("pets", class_names, (image,) * 1437, (image,) * 84)
    ranks = Ranks(0, world_size, torch.device("cpu"))
    state = new_state(config, NetworkOptions(), len(class_names), ranks.device)
    stages = plan_stages(config.progressive)
    state.stages = {stage.index: StageTotals(1408, seconds, 250_000_000) for stage in stages}
    state.history = [epoch_metrics(i + 1, top1=top1).model_dump() for i, top1 in enumerate(top1s)]
    plan = StepPlan(1437, config, (64 // world_size // 2,) * 4, world_size)
    spec, network = config.preprocess_spec(None), NetworkOptions()
    run = Run(directory, config, dataset, spec, network, ranks, stages, plan, state)
    path = write_report(run, evaluations)
    assert path == directory / "report.md"
    return path.read_text()


def test_the_report_tells_verdict_evaluations_classes_stages_mistakes_and_recipe(tmp_path: Path):
    text = report_of(tmp_path)
    assert text.startswith("# tiny on pets: 89.0 % top-1 in 1:20\n")
    for part in (
        "The averaged weights at 40 px on 84 held-out images, after 2 epochs",
        "| averaged | 32 px | last stage | 88.20 % | 91.67 % | 0.2500 |",
        "| averaged | 40 px | evaluation | 89.00 % |",
        "| raw | 40 px | evaluation | 84.00 % |",
        "| cat | 36 | 42.9 % | 83.3 % |",
        "| a/b | 12 | 14.3 % | 100.0 % |",
        "| 1 | 16 px | 3 | - | - | - | 2 x 32 | 11 | 0:20 | 70.4 | 250 MB |",
        "| 4 | 32 px | 6 | 0.1 | - | 0.1 | 2 x 32 |",
        "](curves.png)",
        "](confusion.png)",
        "| cat | dog | 5 | 13.9 % |\n| dog | cat | 2 | 5.6 % |",
        "| cat | a/b | 1 | 2.8 % |",
        "| progressive.image_size | 16 32 |",
        "| optimizer.learning_rate | 0.008 |",
        "| device | the CPU |",
        "| libraries | torch ",
    ):
        assert part in text, part
    # The largest class stands beside top-1.
    require_named(text.split("\n\n")[1], "cat", "42.9 %", "91.7 %")
    assert "not clearly above" not in text
    assert (tmp_path / "confusion.png").exists()


@pytest.mark.parametrize(("num_classes", "is_shown"), [(3, False), (5, False), (6, True)])
def test_top5_stands_only_where_it_can_be_wrong(tmp_path: Path, num_classes: int, is_shown: bool):
    text = report_of(tmp_path, tuple(f"class {i}" for i in range(num_classes)), confusion=None)
    assert ("top-5" in text) == is_shown and ("100.00 %" in text) == is_shown


def test_a_class_for_every_picture_is_no_success_in_the_headline(tmp_path: Path):
    confusion = ((56, 0, 0), (16, 0, 0), (12, 0, 0))
    text = report_of(tmp_path, ("thing", "dog", "fox"), confusion, top1=56 / 84 - 0.04)
    assert text.startswith("# tiny on pets: 66.7 % top-1 (not clearly above always naming the")
    assert is_at_chance(0.7, 56 / 84, 84) and not is_at_chance(0.7, 56 / 84, 84_000)
    assert "| thing | 56 | 66.7 % | 100.0 % |" in text and "| dog | 16 | 19.0 % | 0.0 % |" in text


def test_recall_balance_and_largest_share_follow_from_the_counts():
    classes = count_classes([0, 0, 0, 0, 1, 1, 3], [0, 0, 1, 0, 1, 0, 0], 4)
    assert classes.images == (4, 2, 0, 1) and classes.hits == (3, 1, 0, 0)
    assert classes.recalls == (0.75, 0.5, None, 0.0)
    assert classes.balanced == pytest.approx((0.75 + 0.5 + 0.0) / 3)
    assert (classes.largest, classes.largest_share) == (0, pytest.approx(4 / 7))


def test_a_hundred_and_one_classes_list_the_worst_only(tmp_path: Path):
    images = [10] * 150
    hits = [10] * 150
    hits[77] = 1
    text = report_of(tmp_path, tuple(f"c{i}" for i in range(150)), None, counts=(images, hits))
    assert "| c77 | 10 | 0.7 % | 10.0 % |" in text
    assert len(re.findall(r"^\| c\d+ \|", text, re.MULTILINE)) == 20


def test_several_processes_are_told_of_and_a_stage_without_steps_has_no_speed(tmp_path: Path):
    text = report_of(tmp_path, world_size=4, seconds=0.0)
    assert "4 processes, each on the CPU" in text and "| 0:00 | - | 250 MB |" in text


def test_a_better_epoch_than_the_last_is_named(tmp_path: Path):
    assert "Epoch 1 was better: 95.0 %." in report_of(tmp_path, top1s=(0.95, 0.9))
    assert "No epoch was better" in report_of(tmp_path, top1s=(0.9, 0.9))


def test_a_thousand_classes_have_no_picture_and_the_report_says_so(tmp_path: Path):
    text = report_of(tmp_path, tuple(map(str, range(1000))), confusion=None)
    assert "No picture and no pairs: 1,000 classes" in text
    assert not (tmp_path / "confusion.png").exists()


def test_no_mistakes_are_said_to_be_none(tmp_path: Path):
    text = report_of(tmp_path, confusion=((3, 0, 0), (0, 3, 0), (0, 0, 3)))
    assert "Not one held-out image is mistaken" in text


def test_of_equally_frequent_mistakes_the_one_of_the_smaller_class_comes_first():
    matrix = ((10, 2, 0), (0, 4, 2), (3, 0, 9))
    assert confused_pairs(matrix) == [(2, 0, 3), (1, 2, 2), (0, 1, 2)]
    assert confused_pairs(matrix, 1) == [(2, 0, 3)]


@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_the_picture_grows_with_the_classes_and_takes_any_name(num_classes: int):
    names = ["$x_$", "a class of a very long name indeed", *map(str, range(98))][:num_classes]
    matrix = [[3 * (i == j) + (i + 1 == j) for j in range(num_classes)] for i in range(num_classes)]
    matrix[-1] = [0] * num_classes  # a class without held-out images
    with Image.open(BytesIO(draw_confusion(matrix, names, "a title"))) as picture:
        assert 800 < picture.width < 2500 and 800 < picture.height < 2500
