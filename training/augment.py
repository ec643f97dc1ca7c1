"""Decoded image -> augmented image of a stage; Mixup of a batch.

The operations are timm's and torchvision's. timm draws from Python's and NumPy's global generators,
which are therefore seeded for each image: what happens to it depends on the seed, the epoch and the
image, not on the number of workers or on where a run was resumed.
"""

import random
from typing import cast

import numpy as np
from PIL import Image
from timm.data.auto_augment import (
    AutoAugment,
    RandAugment,
    auto_augment_policy,
    rand_augment_ops,
)
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import v2

from training.config import TrainConfig
from training.progressive import Stage

GRAY = (128, 128, 128)


class Augmentation:
    """Random crop to the stage's size, mirror, RandAugment or AutoAugment."""

    def __init__(self, config: TrainConfig, stage: Stage) -> None:
        self._crop = RandomResizedCropAndInterpolation(
            stage.image_size, (config.min_crop_area, 1.0), interpolation=config.interpolation
        )
        self._flips = config.horizontal_flip
        # timm clips magnitudes at 10 unless told otherwise, and skips half of the operations; the
        # paper's magnitudes go to 25 and every operation is applied.
        hparams = {"img_mean": GRAY, "magnitude_max": 100.0}
        if config.autoaugment:
            # The policy of EfficientNet's own TPU code.
            self._augment = AutoAugment(auto_augment_policy("v0", {"img_mean": GRAY}))
            return
        ops = rand_augment_ops(stage.randaugment_magnitude, prob=1.0, hparams=hparams)
        num_layers = config.num_randaugment_layers if stage.randaugment_magnitude else 0
        self._augment = RandAugment(ops, num_layers)

    def __call__(self, image: Image.Image, seed: int) -> Image.Image:
        """Augment an RGB image; the result has the stage's size."""
        random.seed(seed)
        np.random.seed(seed % 2**32)
        image = cast(Image.Image, self._crop(image))
        if self._flips and random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self._augment(image)


def mix(
    images: Tensor, labels: Tensor, mixup_alpha: float, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Mix each image and its label with its neighbour's (Mixup, Zhang et al. 2018).

    Args:
        images: float [N, 3, H, W].
        labels: int64 [N].
        mixup_alpha: one mixing ratio per batch is drawn from Beta(alpha, alpha);
            0 changes nothing.
        num_classes: width of the mixed labels.

    Returns:
        Images of the same shape, and labels as probabilities [N, num_classes] if they were mixed.
    """
    if mixup_alpha == 0:
        return images, labels
    return v2.MixUp(alpha=mixup_alpha, num_classes=num_classes)(images, labels)
