"""Programs on the GPU -> a runtime that replays a CUDA graph for each batch size."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from efficientnet.formats.artifact import ArtifactError, ArtifactManifest
from efficientnet.machine.gpu import no_room
from efficientnet.runtimes.protocol import check_images, info_of_artifact, smallest_that_takes

# Maps images [N, 3, H, W] to logits [N, num_classes], both float32 on the GPU.
Program = Callable[[Tensor], Tensor]

# The first calls choose kernels and load them, neither of which can be captured.
NUM_WARMUPS = 3


class CudaGraphRuntime:
    """Replays programs from fixed buffers; not for several threads at once.

    A batch size is captured when it is first seen, the smallest and the largest one when the
    program is opened. A batch is filled up to the next size that there is.

    Args:
        static: programs for one batch size each.
        open_any: opens the program for all batch sizes, where there are no static ones.
        manifest: of the artifact.
        sizes: that the program for all is opened and captured for, each anew; () = all that are
        seen.
    """

    def __init__(
        self,
        static: Mapping[int, Program],
        open_any: Callable[[], Program] | None,
        manifest: ArtifactManifest,
        sizes: tuple[int, ...] = (),
    ) -> None:
        self.info = info_of_artifact(manifest)
        self._programs = dict(static)
        self._open_any = open_any
        self._sizes = sizes or tuple(static)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._stream = torch.cuda.Stream()
        # Graphs run one after the other, and what they leave is copied out of their memory before
        # they end: so they may all use the same.
        self._memory = torch.cuda.graph_pool_handle()
        batch = manifest.input.batch
        with self._room_for(batch.max):
            self._buffers = DeviceBuffers(manifest)
        for size in sorted(static or {batch.min, batch.max}):
            self._graph_of(size)

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """See Runtime.infer."""
        check_images(images, self.info)
        num_images = len(images)
        graph = self._graph_of(smallest_that_takes(num_images, self._sizes) or num_images)
        return self._buffers.run(images, self._stream, graph.replay)

    def _graph_of(self, size: int) -> torch.cuda.CUDAGraph:
        if size not in self._graphs:
            self._graphs[size] = self._capture(size)
        return self._graphs[size]

    def _capture(self, size: int) -> torch.cuda.CUDAGraph:
        images, logits = self._buffers.images[:size], self._buffers.logits[:size]
        graph = torch.cuda.CUDAGraph()
        with self._room_for(size), torch.inference_mode(), cudnn_as_compiled(self.info.precision):
            if size not in self._programs:
                assert self._open_any is not None
                self._programs[size] = self._open_any()
            program = self._programs[size]
            with torch.cuda.stream(self._stream):
                for _ in range(NUM_WARMUPS):
                    logits.copy_(program(images))
            self._stream.synchronize()
            # Other threads may use the GPU meanwhile, e.g. a service that opens a second one.
            with torch.cuda.graph(
                graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"
            ):
                logits.copy_(program(images))
        return graph

    @contextmanager
    def _room_for(self, size: int) -> Generator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ArtifactError(no_room(size, error)) from error
        except RuntimeError as error:
            raise ArtifactError(
                f"calls of {self.info.variant} with {size} images fail, or cannot be captured as a "
                f"CUDA graph: {error}"
            ) from error


class DeviceBuffers:
    """Fixed memory for an artifact's largest batch, as CUDA graphs need it; one call at a time."""

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


@contextmanager
def cudnn_as_compiled(precision: str) -> Generator[None]:
    """Let cuDNN compute as it did when a program was compiled; in float32 without TF32."""
    # All of its flags are set, and `enabled` is False by default: torch's own convolutions would
    # give maps of another layout than the compiled code takes for given.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=precision != "fp32"):
        yield
