"""A model and held-out images -> loss and accuracy."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from efficientnet.formats.class_accuracy import ClassAccuracy
from efficientnet.network.model import EfficientNet
from training.learning.distributed import all_reduce_sum

# A larger matrix says nothing to the eye.
MAX_CONFUSION_CLASSES = 100


@dataclass(frozen=True)
class Evaluation:
    """Result on the held-out images."""

    loss: float
    top1: float
    top5: float
    num_images: int
    classes: ClassAccuracy
    confusion: tuple[tuple[int, ...], ...] | None = None
    """Images by true class (row) and predicted class; None with too many classes."""


@torch.no_grad()
def evaluate(
    model: EfficientNet, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> Evaluation:
    """Measure loss and accuracy of a model in evaluation mode, float32.

    Each process gives its part of the images; the result is that of all of them.
    """
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    count = 0
    num_classes = model.num_classes
    class_counts = torch.zeros(2, num_classes, dtype=torch.int64, device=device)  # images, hits
    num_cells = num_classes**2 if num_classes <= MAX_CONFUSION_CLASSES else 0
    confusion = torch.zeros(num_cells, dtype=torch.int64, device=device)
    for images, labels in batches:
        images = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        logits = model(images)
        loss = cross_entropy(logits, labels, reduction="sum")
        best = logits.topk(min(5, num_classes), dim=1).indices  # [N, 5]
        hits = best == labels[:, None]
        sums += torch.stack([loss.double(), hits[:, 0].sum(), hits.any(dim=1).sum()])
        count += len(labels)
        ones = torch.ones_like(labels)
        class_counts[0].index_add_(0, labels, ones)
        class_counts[1].index_add_(0, labels, hits[:, 0].long())
        if num_classes <= MAX_CONFUSION_CLASSES:
            confusion.index_add_(0, labels * num_classes + best[:, 0], ones)
    loss_sum, num_top1, num_top5, num_images = all_reduce_sum([*sums.tolist(), count])
    class_sums = [int(number) for number in all_reduce_sum(class_counts.flatten().tolist())]
    matrix = None
    if num_classes <= MAX_CONFUSION_CLASSES:
        counts = iter(all_reduce_sum(confusion.tolist()))
        matrix = tuple(
            tuple(int(next(counts)) for _ in range(num_classes)) for _ in range(num_classes)
        )
    return Evaluation(
        loss_sum / num_images,
        num_top1 / num_images,
        num_top5 / num_images,
        int(num_images),
        ClassAccuracy(tuple(class_sums[:num_classes]), tuple(class_sums[num_classes:])),
        matrix,
    )
