from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from efficientnet.datasets import load_dataset
from training.augment import Augmentation, mix
from training.loader import StepSampler, train_batches
from training.progressive import plan_stages
from training.recipes import digits_recipe, paper_recipe

CONFIG = replace(digits_recipe("tiny"), epochs=2, batch_size=16, micro_batch_size=8)


def test_every_image_is_used_at_most_once_per_epoch_and_all_but_a_last_batch():
    sampler = StepSampler(100, CONFIG)
    passes = list(sampler)
    assert sampler.steps_per_epoch == 6 and len(passes) == len(sampler) == 24
    for epoch in (passes[:12], passes[12:]):
        uses = Counter(key.image for keys in epoch for key in keys)
        assert len(uses) == 96 and set(uses.values()) == {1}
    assert [k.image for k in passes[0]] != [k.image for k in passes[12]]


@pytest.mark.parametrize("first_step", [1, 5, 6, 7, 11])
def test_a_sampler_that_starts_later_goes_on_with_the_same_images(first_step: int):
    passes = list(StepSampler(100, CONFIG))
    assert list(StepSampler(100, CONFIG, first_step)) == passes[2 * first_step :]


def test_too_few_images_for_one_batch_say_which_flag_to_change():
    with pytest.raises(ValueError, match="do not fill one batch of 4096; give --batch-size"):
        StepSampler(1437, paper_recipe("v2-s"))


def test_batches_have_the_size_of_their_stage_whatever_the_number_of_workers():
    samples = load_dataset("digits").train[:64]
    stages = plan_stages(CONFIG.progressive)

    def batches(num_workers: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        sampler = StepSampler(len(samples), CONFIG)
        return list(
            train_batches(
                samples, CONFIG, CONFIG.preprocess_spec(None), stages, sampler, num_workers
            )
        )

    alone, with_workers = batches(0), batches(2)
    assert [images.shape[-1] for images, _ in alone] == [16] * 4 + [21] * 4 + [26] * 4 + [32] * 4
    for (images, labels), (other_images, other_labels) in zip(alone, with_workers, strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


@pytest.mark.parametrize("variant", ["v2-s", "v2-l"])
def test_every_stage_of_the_papers_augmentation_works_on_real_colors(variant: str):
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    config = paper_recipe(variant)
    for stage in plan_stages(config.progressive):
        augmentation = Augmentation(config, stage)
        for seed in range(60):
            image = augmentation(Image.fromarray(noise), seed)
            assert image.size == (stage.image_size, stage.image_size) and image.mode == "RGB"


def test_augmentation_depends_on_the_seed_alone():
    config = digits_recipe("v2-s")
    augmentation = Augmentation(config, plan_stages(config.progressive)[-1])
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8))
    first, again, other = (np.asarray(augmentation(noise, seed)) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_magnitude_zero_only_crops():
    config = digits_recipe("v2-s")
    config = replace(
        config,
        min_crop_area=1.0,
        progressive=replace(config.progressive, randaugment_magnitude=(0, 0)),
    )
    augmentation = Augmentation(config, plan_stages(config.progressive)[-1])
    gray = Image.new("RGB", (64, 64), (90, 90, 90))
    assert np.unique(np.asarray(augmentation(gray, 3))).tolist() == [90]


def test_mixup_mixes_images_and_labels_in_the_same_ratio():
    torch.manual_seed(0)
    labels = torch.arange(4)
    images = torch.eye(4)[:, :, None, None].expand(4, 4, 2, 2).contiguous()
    mixed, soft = mix(images, labels, mixup_alpha=0.4, num_classes=4)
    torch.testing.assert_close(mixed[:, :, 0, 0], soft)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(4))
    assert soft.max() < 1


def test_mixup_alpha_zero_changes_nothing():
    images, labels = torch.randn(4, 3, 2, 2), torch.arange(4)
    assert mix(images, labels, 0.0, 4) == (images, labels)
