"""How much a pass holds, and the batch plan made of it."""

import os
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from facts import raises_naming
from processes import fork
from small_trainings import small_run, step_of, with_stages

from efficientnet.formats.checkpoint import read_checkpoint
from efficientnet.network.model import build_model
from efficientnet.network.variants import VARIANTS, NetworkOptions
from training.learning import memory
from training.learning.memory import BatchTooLargeError, MemoryModel, require_batch_norm_fits
from training.recipe.config import TrainConfig
from training.recipe.recipes import digits_recipe, imagenet_recipe
from training.recipe.stages import plan_stages
from training.running import begin_run as command

OPTIONS = NetworkOptions()
GIGABYTE = 1e9


def plan(config: TrainConfig, limit_bytes: float, world_size: int = 1) -> tuple[int, ...]:
    stages = plan_stages(config.progressive)
    return memory.plan_micro_batches(config, OPTIONS, 1000, stages, world_size, limit_bytes)


@pytest.mark.parametrize(("variant", "size"), [("tiny", 32), ("b0", 64)])
def test_what_is_counted_without_computing_is_what_autograd_keeps(variant: str, size: int):
    real = build_model(VARIANTS[variant], 10, 0.2, OPTIONS).train()
    real = real.to(memory_format=torch.channels_last)
    kept: dict[int, int] = {}
    weights = {p.data_ptr() for p in real.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = real(torch.randn(4, 3, size, size))
    with torch.device("meta"):
        empty = build_model(VARIANTS[variant], 10, 0.2, OPTIONS).train()
    assert logits.shape == (4, 10)
    counted = memory.saved_bytes(empty, size, 4, torch.float32)
    assert counted == pytest.approx(sum(kept.values()), rel=0.05)


def test_memory_plan_takes_the_largest_part_of_the_batch_that_fits_each_stage():
    config = replace(imagenet_recipe("tiny"), batch_size=512, batch_plan="memory")
    limit = 0.1 * GIGABYTE
    sizes = plan(config, limit)
    assert sizes == tuple(sorted(sizes, reverse=True)) and sizes[0] > sizes[-1]
    model = MemoryModel(config, OPTIONS, 1000)
    for stage, size in zip(plan_stages(config.progressive), sizes, strict=True):
        assert 512 % size == 0
        assert model.bytes_for(stage.image_size, size) <= limit
        assert model.bytes_for(stage.image_size, 2 * size) > limit or size == 512
    # The share of one of four processes is what is divided.
    assert all(128 % size == 0 for size in plan(config, limit, world_size=4))


def require_own_peaks() -> None:
    cpu = torch.device("cpu")
    memory.keep_freed_memory()

    def peak_of(num_bytes: int) -> int:
        memory.give_back_freed_memory(cpu)
        assert memory.reset_peak_memory(cpu)
        parts = [torch.ones(num_bytes // 40) for _ in range(10)]
        assert len(parts) == 10
        return memory.peak_memory_bytes(cpu)

    large, small = peak_of(400_000_000), peak_of(40_000_000)
    assert large - small > 300_000_000, (large, small)


def test_a_stage_after_a_larger_one_has_a_peak_of_its_own():
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this container does not let a process start a new count of its peak")
    # In a process of its own: how the C library frees memory is set for all of it.
    process = fork(require_own_peaks)
    process.join()
    assert process.exitcode == 0


def test_a_peak_that_cannot_be_counted_anew_is_not_a_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "reset_peak_memory", lambda _: False)
    command.main(replace(small_run(tmp_path), epochs=3))
    rows = re.findall(r"^\| [123] \| \d+ px .*", (tmp_path / "run/report.md").read_text(), re.M)
    assert len(rows) == 3 and all(row.endswith("| - |") for row in rows)


def test_half_precision_fits_about_twice_as_many():
    config = replace(imagenet_recipe("tiny"), batch_size=512, batch_plan="memory")
    full, half = (plan(replace(config, precision=p), 0.1 * GIGABYTE) for p in ("fp32", "bf16"))
    assert all(b >= 2 * a or b == 512 for a, b in zip(full, half, strict=True)) and half != full


def test_a_fixed_plan_is_the_recipes():
    assert plan(imagenet_recipe("v2-s"), 20 * GIGABYTE) == (32,) * 4
    config = replace(digits_recipe("tiny"), batch_size=64)
    assert plan(config, 20 * GIGABYTE, world_size=2) == (32,) * 4


def test_a_fixed_batch_that_a_stage_cannot_hold_is_refused_and_says_what_fits():
    config = replace(imagenet_recipe("v2-s"), micro_batch_size=None)
    with raises_naming(
        BatchTooLargeError, "stage 4", "300 px", "4096 images", "--micro-batch-size 64"
    ):
        plan(config, 20 * GIGABYTE)


@pytest.mark.parametrize("batch_plan", ["fixed", "memory"])
def test_a_batch_that_no_stage_can_hold_is_refused(batch_plan):
    config = replace(imagenet_recipe("v2-l"), batch_plan=batch_plan)
    with raises_naming(BatchTooLargeError, "2 images", "2.5 GB"):
        plan(config, 2.5 * GIGABYTE)


def test_a_share_without_small_divisors_is_refused_by_the_pass_it_would_take():
    config = replace(digits_recipe("tiny"), batch_size=521, batch_plan="memory")
    with raises_naming(BatchTooLargeError, "521 images"):
        plan(config, 0.02 * GIGABYTE)


@pytest.mark.parametrize(("image_size", "fits"), [(32, False), (33, True)])
def test_a_pass_of_one_image_is_refused_where_batch_norm_cannot_take_it(
    image_size: int, fits: bool
):
    recipe = digits_recipe("b0")
    one_size = replace(recipe.progressive, image_size=(image_size, image_size))
    recipe = replace(recipe, progressive=one_size, batch_size=4, micro_batch_size=1)
    stages = plan_stages(recipe.progressive)
    model = build_model(VARIANTS["b0"], 10, 0.0, OPTIONS).train()

    def refused() -> AbstractContextManager[object]:
        return nullcontext() if fits else raises_naming(ValueError, f"{image_size} px")

    torchs = nullcontext() if fits else pytest.raises(ValueError, match="more than 1 value")
    with refused():
        require_batch_norm_fits(recipe, stages, 1)
    with torchs:
        model(torch.zeros(1, 3, image_size, image_size))
    require_batch_norm_fits(replace(recipe, micro_batch_size=2), stages, 2)
    shared = replace(recipe, micro_batch_size=None)
    require_batch_norm_fits(shared, stages, 2)
    with refused():
        require_batch_norm_fits(shared, stages, 4)
    with refused():
        require_batch_norm_fits(replace(shared, batch_plan="memory"), stages, 4)


def test_a_batch_that_batch_norm_cannot_take_starts_no_run(tmp_path: Path):
    recipe = with_stages(replace(digits_recipe("b0"), batch_size=1, output=tmp_path), 1)
    one_size = replace(recipe.progressive, image_size=(32, 32))
    with pytest.raises(ValueError):
        command.main(replace(recipe, progressive=one_size))
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_a_memory_plan_keeps_batch_and_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # As on a machine of 20 MB.
    monkeypatch.setattr(memory, "device_memory_bytes", lambda device: 20e6)
    config = replace(digits_recipe("tiny"), epochs=4, steps=4, batch_size=128, output=tmp_path)
    config = replace(config, batch_plan="memory")
    checkpoint = command.main(config)
    assert checkpoint is not None and read_checkpoint(checkpoint).step == 4
    state = torch.load(checkpoint / "train_state.pt", weights_only=True)["state"]
    sizes = state["micro_batch_sizes"]
    assert sizes[0] > sizes[-1] and all(128 % size == 0 for size in sizes)


def test_memory_is_reserved_by_a_pass_that_leaves_everything_as_it_was():
    config = digits_recipe("tiny")
    state, step = step_of(config)
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    step.reserve_memory(32, 8)
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in state.model.parameters())
    assert state.step == 0
