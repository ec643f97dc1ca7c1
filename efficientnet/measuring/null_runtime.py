"""A runtime that computes nothing: what it takes is the overhead of the harness around it."""

import numpy as np
from numpy.typing import NDArray

from efficientnet.runtimes.protocol import ProgramInfo, check_images


class NullRuntime:
    """Answers zeros for the program that `info` describes."""

    def __init__(self, info: ProgramInfo) -> None:
        self.info = info

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """See Runtime.infer."""
        check_images(images, self.info)
        return np.zeros((len(images), len(self.info.class_names)), dtype=np.float32)
