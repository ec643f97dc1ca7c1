"""Batch and labels -> images mixed with their neighbors' by Mixup and CutMix, labels as shares."""

import torch
from torch import Tensor
from torchvision.transforms import v2


def mix(
    images: Tensor, labels: Tensor, mixup_alpha: float, cutmix_alpha: float, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Mix each image and its label with its neighbor's.

    Mixup (Zhang et al. 2018) adds weighted images, CutMix (Yun et al. 2019) puts a rectangle of one
    into the other. With both, the first half of the batch gets Mixup and the second half CutMix
    (google/automl, efficientnetv2/datasets.py). Random numbers come from torch's CPU generator;
    nothing waits for the device.

    Images are float [N, 3, H, W], labels int64 [N], and probabilities [N, num_classes] if they were
    mixed. One ratio per batch is drawn from Beta(alpha, alpha); alpha 0 leaves the kind out.
    """
    if mixup_alpha == 0 and cutmix_alpha == 0:
        return images, labels
    if cutmix_alpha == 0:
        return v2.MixUp(alpha=mixup_alpha, num_classes=num_classes)(images, labels)
    if mixup_alpha == 0:
        return v2.CutMix(alpha=cutmix_alpha, num_classes=num_classes)(images, labels)
    half = len(images) // 2
    mixed = mix(images[:half], labels[:half], mixup_alpha, 0, num_classes)
    cut = mix(images[half:], labels[half:], 0, cutmix_alpha, num_classes)
    return torch.cat((mixed[0], cut[0])), torch.cat((mixed[1], cut[1]))
