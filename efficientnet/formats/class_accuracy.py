"""Images and hits of each class -> what an accuracy hides: the largest class, recall, balance."""

from collections.abc import Sequence
from dataclasses import dataclass

# Up to so many classes the right one is always among the five best.
MAX_CLASSES_WITHOUT_TOP5 = 5

# Two standard errors: what is not further above the largest class's share may be luck.
STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class ClassAccuracy:
    """How many held-out images each class has, and how many of them were classified rightly."""

    images: tuple[int, ...]
    hits: tuple[int, ...]

    @property
    def largest(self) -> int:
        """The class with the most images, which a network that has learned nothing may name."""
        return max(range(len(self.images)), key=self.images.__getitem__)

    @property
    def largest_share(self) -> float:
        """The top-1 of naming the largest class for every image."""
        return max(self.images) / sum(self.images)

    @property
    def recalls(self) -> tuple[float | None, ...]:
        """Share of each class's images that were classified rightly; None without images."""
        return tuple(
            hits / images if images else None
            for images, hits in zip(self.images, self.hits, strict=True)
        )

    @property
    def balanced(self) -> float:
        """Mean recall of the classes that have images: the top-1 if all were equally large."""
        recalls = [recall for recall in self.recalls if recall is not None]
        return sum(recalls) / len(recalls)


def is_at_chance(top1: float, largest_share: float, num_images: int) -> bool:
    """Tell whether a top-1 is not clearly above that of always naming the largest class."""
    error = (largest_share * (1 - largest_share) / num_images) ** 0.5
    return top1 <= largest_share + STANDARD_ERRORS * error


def count_classes(labels: Sequence[int], predicted: Sequence[int], num: int) -> ClassAccuracy:
    """Count images and hits of each of `num` classes."""
    images, hits = [0] * num, [0] * num
    for label, guess in zip(labels, predicted, strict=True):
        images[label] += 1
        hits[label] += label == guess
    return ClassAccuracy(tuple(images), tuple(hits))
