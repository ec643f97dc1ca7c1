"""Images and logits on the GPU, with the pinned memory that they are copied through."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from efficientnet.formats.artifact import ArtifactManifest


class DeviceBuffers:
    """Fixed memory for an artifact's largest batch, as CUDA graphs need it; for one call at a time.

    Raises:
        torch.OutOfMemoryError: of the GPU.
    """

    def __init__(self, manifest: ArtifactManifest) -> None:
        images = manifest.input.batch.max, *manifest.input.shape
        logits = manifest.input.batch.max, manifest.output.shape[0]
        self.images = torch.zeros(images, device="cuda")
        """Float32 [batch.max, 3, H, W]."""
        self.logits = torch.zeros(logits, device="cuda")
        """Float32 [batch.max, num_classes]."""
        self._host_images = torch.zeros(images, pin_memory=True)
        self._host_logits = torch.zeros(logits, pin_memory=True)
        torch.cuda.synchronize()

    def run(
        self, images: NDArray[np.float32], stream: torch.cuda.Stream, enqueue: Callable[[], None]
    ) -> NDArray[np.float32]:
        """Copy images [N, 3, H, W] in, do the work, wait for it, and return a copy of their logits.

        `enqueue` launches what reads `images` and writes `logits`, on the current stream.
        """
        num_images = len(images)
        np.copyto(self._host_images.numpy()[:num_images], images)
        with torch.cuda.stream(stream):
            self.images[:num_images].copy_(self._host_images[:num_images], non_blocking=True)
            enqueue()
            self._host_logits[:num_images].copy_(self.logits[:num_images], non_blocking=True)
        stream.synchronize()
        return self._host_logits[:num_images].numpy().copy()
