"""What only a GPU can show of training; skipped without one."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_trainings import step_of
from test_training_compile import batches, config, take_steps
from test_training_resume import die_at_call
from training_processes import end, start

from efficientnet.network.variants import NetworkOptions
from training.batches.prefetch import on_device
from training.learning.memory import MemoryModel, peak_memory_bytes, reset_peak_memory
from training.recipe.recipes import digits_recipe, imagenet_recipe
from training.recipe.stages import plan_stages
from training.running.metrics import read_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# cuDNN's sums differ from run to run by their order; a few steps of it stay below this.
RESUME_TOLERANCE = 1e-3


def test_a_step_does_not_wait_for_the_device():
    recipe = replace(config(), compile=False, precision="bf16", label_smoothing=0.1)
    recipe = replace(recipe, progressive=replace(recipe.progressive, cutmix_alpha=(0.2, 0.2)))
    device = torch.device("cuda")
    _, step = step_of(recipe, "cuda")
    stage = plan_stages(recipe.progressive)[-1]
    step.begin_stage(stage, 8)
    source = on_device(batches(stage, 8), device)
    stop = torch.zeros((), device=device)
    step(source, 1, 1e-3, stop)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(source, 1, 1e-3, stop)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_compiled_network_runs_every_stage():
    recipe = config()
    _, step = step_of(recipe, "cuda")
    for stage in plan_stages(recipe.progressive):
        step.begin_stage(stage, 8)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        take_steps(step, stage, 8, 1)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_predicted_memory_is_near_what_is_taken(precision):
    recipe = replace(imagenet_recipe("v2-s"), precision=precision, batch_size=32)
    device = torch.device("cuda")
    _, step = step_of(recipe, "cuda", num_classes=1000)
    stage = plan_stages(recipe.progressive)[-1]
    step.begin_stage(stage, 32)
    source = on_device(batches(stage, 32), device)
    reset_peak_memory(device)
    for _ in range(2):
        step(source, 1, 1e-3, torch.zeros((), device=device))
    predicted = MemoryModel(recipe, NetworkOptions(), 1000).bytes_for(stage.image_size, 32)
    assert peak_memory_bytes(device) == pytest.approx(predicted, rel=0.25)


def test_a_killed_and_resumed_run_is_close_to_one_that_was_not(tmp_path: Path):
    recipe = replace(digits_recipe("tiny"), epochs=4, batch_size=128, name="run")
    whole, cut = (replace(recipe, output=tmp_path / name) for name in ("whole", "cut"))
    assert end(start(whole)) == [0]
    assert end(start(cut, die_at_call, "save_checkpoint", 3)) == [-signal.SIGKILL]
    assert end(start(cut)) == [0]
    losses = [
        [epoch.train_loss for epoch in read_metrics(part.output / "run")] for part in (whole, cut)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=RESUME_TOLERANCE)
