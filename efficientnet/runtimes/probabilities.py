"""Logits -> probabilities and the best classes; the same arithmetic for accuracy and service."""

import numpy as np
from numpy.typing import NDArray


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Map logits [N, C] to probabilities [N, C] that add up to 1 in each row."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def top_classes(scores: NDArray[np.floating], k: int) -> NDArray[np.int64]:
    """Return the indices [N, k] of the highest scores, best first; ties go to the lower index."""
    negated = -scores
    if k >= scores.shape[1]:
        return np.argsort(negated, axis=1, kind="stable")
    # Sorting a thousand takes ten times as long as finding the few that are worth it.
    last = np.partition(negated, k - 1, axis=1)[:, k - 1]
    best = np.empty((len(scores), k), np.int64)
    for row, of_image, limit in zip(best, negated, last, strict=True):
        (candidates,) = np.nonzero(~(of_image > limit))  # those that are no numbers too, as last
        row[:] = candidates[np.argsort(of_image[candidates], kind="stable")[:k]]
    return best
