"""--compile: how often torch's compiler is started."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_trainings import SMALLEST, small_run, step_of, with_stages
from torch._dynamo.testing import CompileCounterWithBackend

from efficientnet.network.model import EfficientNet
from training.batches.loader import Batch
from training.learning.step import TrainStep
from training.recipe.config import TrainConfig
from training.recipe.recipes import digits_recipe
from training.recipe.stages import Stage, plan_stages


def config(**changes: object) -> TrainConfig:
    return replace(digits_recipe(SMALLEST), batch_size=8, compile=True, **changes)


def batches(stage: Stage, num_images: int):
    torch.manual_seed(0)
    size = stage.image_size
    while True:
        images = torch.randint(0, 256, (num_images, 3, size, size), dtype=torch.uint8)
        yield Batch(images, torch.randint(0, 10, (num_images,)), torch.arange(num_images))


@pytest.fixture
def counter(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> CompileCounterWithBackend:
    # What is counted does not depend on the backend; inductor's needs a C++ compiler and a minute.
    counter = CompileCounterWithBackend(getattr(request, "param", "eager"))
    original = EfficientNet.compile
    monkeypatch.setattr(
        EfficientNet,
        "compile",
        lambda self, **options: original(self, backend=counter, fullgraph=True, **options),
    )
    return counter


def take_steps(step: TrainStep, stage: Stage, num_images: int, num_passes: int) -> None:
    stop = torch.zeros(())
    source = batches(stage, num_images)
    for index in range(4):
        step(source, num_passes, 1e-3 * (index + 1), stop)


def test_each_stage_compiles_once_in_one_graph(counter: CompileCounterWithBackend):
    num_passes = 2
    recipe = with_stages(config(), 2)
    _, step = step_of(recipe)
    stages = plan_stages(recipe.progressive)
    for stage in stages:
        step.begin_stage(stage, 8 // num_passes)
        take_steps(step, stage, 8 // num_passes, num_passes)
        # As after an epoch, or a resumption, in the middle of a stage.
        step.begin_stage(stage, 8 // num_passes)
        take_steps(step, stage, 8 // num_passes, num_passes)
        assert counter.frame_count == stage.index + 1


def test_another_dropout_rate_learning_rate_or_magnitude_compiles_nothing(
    counter: CompileCounterWithBackend,
):
    recipe = config()
    progressive = replace(recipe.progressive, image_size=(32, 32), dropout_rate=(0.0, 0.4))
    recipe = replace(recipe, progressive=progressive)
    _, step = step_of(recipe)
    for stage in plan_stages(recipe.progressive):
        step.begin_stage(stage, 8)
        take_steps(step, stage, 8, 1)
    assert counter.frame_count == 1


@pytest.mark.parametrize("counter", ["aot_eager"], indirect=True)
def test_a_compiled_run_ends_where_an_eager_one_does(
    counter: CompileCounterWithBackend, tmp_path: Path
):
    from training.run import main
    from training.running.metrics import read_metrics

    recipe = replace(
        small_run(tmp_path), architecture=SMALLEST, variant=SMALLEST.name, epochs=2, steps=4
    )
    still = replace(recipe.progressive, num_stages=1, dropout_rate=(0.0, 0.0))
    recipe = replace(recipe, progressive=still, batch_size=64, stochastic_depth_rate=0.0)
    losses = []
    for is_compiled in (False, True):
        run = main(replace(recipe, compile=is_compiled, output=tmp_path / str(is_compiled))).parent
        losses.append([epoch.train_loss for epoch in read_metrics(run)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
    assert counter.frame_count == 1
