import multiprocessing
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from facts import raises_naming
from PIL import Image
from torch.utils.data import dataloader as torch_loader

from efficientnet.images.datasets import Sample, load_dataset
from efficientnet.images.preprocess import ImageError, PreprocessSpec
from training.batches import loader
from training.batches.augmentation import Augmentation
from training.batches.loader import Batch, LoaderError, eval_batches, train_batches
from training.batches.sampler import StepPlan, StepSampler
from training.recipe.recipes import digits_recipe, imagenet_recipe
from training.recipe.stages import plan_stages

CONFIG = replace(digits_recipe("tiny"), epochs=2, batch_size=16, micro_batch_size=8)
PLAN = StepPlan(100, CONFIG, [8] * 4)


def test_every_image_is_used_once_before_any_is_used_again():
    sampler = StepSampler(PLAN)
    passes = list(sampler)
    assert PLAN.steps_per_epoch == 6 and len(passes) == len(sampler) == 24
    uses = [key.image for keys in passes for key in keys]
    # 12 steps of 16: what does not fill the first epoch's last batch begins the second.
    assert sorted(uses[:100]) == list(range(100))
    assert len(set(uses[100:])) == 92
    assert uses[:92] != uses[100:]


def test_every_use_of_an_image_has_random_numbers_of_its_own():
    seeds = [key.seed for keys in StepSampler(PLAN) for key in keys]
    assert len(set(seeds)) == len(seeds) == 192
    assert min(seeds) >= 0 and max(seeds) < 2**63


@pytest.mark.parametrize("first_step", [1, 5, 6, 7, 11])
def test_a_sampler_that_starts_later_goes_on_with_the_same_images(first_step: int):
    passes = list(StepSampler(PLAN))
    assert list(StepSampler(PLAN, first_step=first_step)) == passes[2 * first_step :]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("first_step", [0, 7])
def test_the_passes_of_all_processes_are_together_those_of_one(world_size: int, first_step: int):
    alone = list(StepSampler(StepPlan(100, CONFIG, [4] * 4), first_step=first_step))
    plan = StepPlan(100, CONFIG, [4] * 4, world_size)
    samplers = [StepSampler(plan, rank, first_step) for rank in range(world_size)]
    ranks = [list(sampler) for sampler in samplers]
    per_step = 4 // world_size
    together = [
        keys
        for step in range(12 - first_step)
        for passes in ranks
        for keys in passes[step * per_step : (step + 1) * per_step]
    ]
    assert together == alone
    assert {len(sampler) for sampler in samplers} == {len(alone) // world_size}


def test_processes_that_cannot_share_a_batch_evenly_are_refused():
    with raises_naming(ValueError, "batch_size 16", "3 processes"):
        StepPlan(100, CONFIG, [8] * 4, world_size=3)
    with raises_naming(ValueError, "--micro-batch-size", 4):
        StepPlan(100, CONFIG, [8] * 4, world_size=4)


def test_another_attempt_has_the_images_in_another_order():
    first, second = (list(StepSampler(PLAN, attempt=attempt)) for attempt in (0, 1))
    assert [k.image for k in first[0]] != [k.image for k in second[0]]
    assert (
        Counter(k.seed for keys in first for k in keys)
        .keys()
        .isdisjoint(k.seed for keys in second for k in keys)
    )


def test_too_few_images_for_one_batch_say_which_flag_to_change():
    with raises_naming(ValueError, 4096, "--batch-size"):
        StepPlan(1437, imagenet_recipe("v2-s"), [32] * 4)


# A test has one core.
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_have_the_size_of_their_stage_whatever_the_number_of_workers():
    samples = load_dataset("digits").train[:64]
    stages = plan_stages(CONFIG.progressive)

    def batches(num_workers: int) -> list[Batch]:
        sampler = StepSampler(StepPlan(len(samples), CONFIG, [8] * 4))
        return list(train_batches(samples, CONFIG, stages, sampler, num_workers))

    alone, with_workers = batches(0), batches(2)
    assert [b.images.shape[-1] for b in alone] == [16] * 4 + [21] * 4 + [26] * 4 + [32] * 4
    for batch, other in zip(alone, with_workers, strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(batch, other, strict=True))


def test_a_batch_holds_the_images_of_its_keys():
    samples = load_dataset("digits").train[:16]
    stages = plan_stages(CONFIG.progressive)
    sampler = StepSampler(StepPlan(16, CONFIG, [8] * 4))
    augmentation = Augmentation(CONFIG, stages[0])
    keys = next(iter(sampler))
    batch: Batch = next(iter(train_batches(samples, CONFIG, stages, sampler, 0)))
    assert batch.images.dtype == torch.uint8 and batch.labels.dtype == torch.int64
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.seeds.tolist() == [key.seed for key in keys]
    assert batch.labels.tolist() == [samples[key.image].label for key in keys]
    for image, key in zip(batch.images, keys, strict=True):
        expected = augmentation(samples[key.image].read(), key.seed)
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_image_is_told_by_its_name(tmp_path: Path, num_workers: int):
    good, bad = tmp_path / "good.jpg", tmp_path / "bad.jpg"
    Image.new("RGB", (20, 20)).save(good)
    bad.write_bytes(good.read_bytes()[:200])
    samples = [Sample(path.name, 0, path) for path in [good] * 15 + [bad]]
    stages = plan_stages(CONFIG.progressive)
    sampler = StepSampler(StepPlan(16, CONFIG, [8] * 4))
    running = set(multiprocessing.active_children())
    with raises_naming(ImageError, "bad.jpg"):
        list(train_batches(samples, CONFIG, stages, sampler, num_workers))
    assert set(multiprocessing.active_children()) <= running
    spec = PreprocessSpec(
        image_size=8, interpolation="bilinear", crop_fraction=None, mean=(0, 0, 0), std=(1, 1, 1)
    )
    with raises_naming(ImageError, "bad.jpg"):
        list(eval_batches(samples, spec, num_workers))


@pytest.fixture
def broken_connection(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """A loader's connection to its process breaks; where the list is not empty, that one dies."""
    others, kills = set(multiprocessing.active_children()), list[bool]()

    def is_broken(*_: object) -> None:
        (worker,) = set(multiprocessing.active_children()) - others
        if kills:
            worker.kill()
        raise ConnectionResetError

    monkeypatch.setattr(torch_loader._MultiProcessingDataLoaderIter, "_try_get_data", is_broken)
    # Torch's handler does not always come in time.
    monkeypatch.setattr("torch.utils.data._utils.signal_handling._SIGCHLD_handler_set", True)
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield kills
    signal.signal(signal.SIGCHLD, before)


def test_a_worker_that_dies_as_it_hands_over_a_batch_is_told(broken_connection: list[bool]):
    broken_connection.append(True)
    with raises_naming(LoaderError, "died as it sent a batch", "--num-workers"):
        next(digits_batches())
    # Torch's handler, should its signal come now, has nothing to say.
    torch._C._error_if_any_worker_fails()


def test_a_broken_connection_of_a_living_worker_is_told_as_it_is(
    broken_connection: list[bool], monkeypatch: pytest.MonkeyPatch
):
    assert not broken_connection
    monkeypatch.setattr(loader, "SEEN_S", 0.0)
    with pytest.raises(ConnectionResetError):
        next(digits_batches())


def digits_batches() -> Iterator[Batch]:
    samples = load_dataset("digits").train[:16]
    sampler = StepSampler(StepPlan(16, CONFIG, [8] * 4))
    return iter(train_batches(samples, CONFIG, plan_stages(CONFIG.progressive), sampler, 1))


def test_the_stages_of_a_plan_follow_each_other():
    stages = [keys[0].stage for keys in StepSampler(PLAN)]
    assert stages[0] == 0 and stages[-1] == 3
    assert all(later - earlier in (0, 1) for earlier, later in pairwise(stages))
