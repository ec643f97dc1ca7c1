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
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]
