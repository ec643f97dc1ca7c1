"""A TensorRT artifact -> TensorRT or TensorRT-RTX on the GPU, replayed as CUDA graphs.

See tensorrt_library.py for what `Any` stands for.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from efficientnet.formats.artifact import ArtifactError, ArtifactManifest, Binding, read_program
from efficientnet.machine.gpu import Gpu, current_gpu, no_room
from efficientnet.runtimes.binding import (
    import_bound,
    require_binding,
    require_gpu,
    require_version,
)
from efficientnet.runtimes.device_buffers import DeviceBuffers
from efficientnet.runtimes.protocol import ProgramInfo, check_images, info_of_artifact
from efficientnet.runtimes.tensorrt_library import (
    PACKAGES,
    deserialize,
    import_package,
    messages_of,
)

log = logging.getLogger(__name__)


class Profile(NamedTuple):
    """A range of batch sizes that an engine has kernels for."""

    engine: Any
    number: int
    low: int
    high: int


@dataclass(frozen=True)
class _Prepared:
    """A batch size whose calls are one graph launch."""

    context: Any
    graph: torch.cuda.CUDAGraph


class TensorRTRuntime:
    """Runs one engine with its profiles, or several with fixed shapes; for one thread at a time.

    For each batch size there is an execution context of its own with its CUDA graph, since a graph
    holds a context's state, and all share one scratch memory and the buffers of images and logits.
    A batch size is prepared when it is first seen, the smallest and largest ones when it is opened.
    """

    def __init__(
        self, trt: Any, engines: Sequence[Any], manifest: ArtifactManifest, info: ProgramInfo
    ) -> None:
        self.info = info
        self.use_graphs = True
        """Whether calls replay graphs; else they enqueue kernel by kernel, for comparison."""
        self._trt = trt
        self._names = manifest.input.name, manifest.output.name
        self._profiles = [p for engine in engines for p in _profiles_of(engine, self._names[0])]
        self._prepared: dict[int, _Prepared] = {}
        self._stream = torch.cuda.Stream()
        batch = manifest.input.batch
        try:
            self._buffers = DeviceBuffers(manifest)
            self._scratch = _new_scratch(self._profiles)
        except torch.OutOfMemoryError as error:
            raise ArtifactError(no_room(batch.max, error)) from error
        sizes = {p.low for p in self._profiles} | {p.high for p in self._profiles}
        for size in sorted(sizes | {batch.min, batch.opt, batch.max}):
            self._prepare(size)

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """See Runtime.infer. A batch is filled up to one that there are kernels for."""
        check_images(images, self.info)
        prepared = self._prepare(len(images))
        enqueue = (
            prepared.graph.replay if self.use_graphs else partial(self._enqueue, prepared.context)
        )
        return self._buffers.run(images, self._stream, enqueue)

    def _prepare(self, num_images: int) -> _Prepared:
        profile, size = choose_profile(num_images, self._profiles)
        if size not in self._prepared:
            with torch.cuda.stream(self._stream):
                context = self._new_context(profile, size)
                # Kernels are loaded and shapes told in the first call, neither of which can be
                # captured.
                self._enqueue(context)
                self._stream.synchronize()
            self._prepared[size] = _Prepared(context, self._capture(context, size))
        return self._prepared[size]

    def _new_context(self, profile: Profile, size: int) -> Any:
        engine: Any = profile.engine
        context: Any = _create_context(self._trt, engine)
        if context is None:
            raise ArtifactError(no_room(size, messages_of(self._trt).take_problems()))
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        stream = self._stream.cuda_stream
        images, logits = self._names
        is_ready = (
            context.set_optimization_profile_async(profile.number, stream)
            and context.set_input_shape(images, (size, *self._buffers.images.shape[1:]))
            and context.set_tensor_address(images, self._buffers.images.data_ptr())
            and context.set_tensor_address(logits, self._buffers.logits.data_ptr())
        )
        if not is_ready:
            self._refuse(f"cannot be prepared for batches of {size}")
        return context

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream.cuda_stream):
            self._refuse("failed")

    def _capture(self, context: Any, size: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the GPU meanwhile, e.g. a service that opens a second program.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._enqueue(context)
        except RuntimeError as error:
            said = messages_of(self._trt).take_problems()
            raise ArtifactError(
                f"the engine's calls with {size} images cannot be captured as a CUDA graph: "
                f"{error} ({said})"
            ) from error
        return graph

    def _refuse(self, what: str) -> NoReturn:
        said = messages_of(self._trt).take_problems()
        raise ArtifactError(f"the engine of {self.info.variant} {what}: {said}")


def open_program(directory: Path, manifest: ArtifactManifest, num_threads: int) -> TensorRTRuntime:
    """Open a TensorRT artifact on the machine that it was built for.

    Raises:
        ArtifactError: another machine or version, no GPU, the library is not installed, or it
            refuses the engine.
    """
    package = PACKAGES[manifest.runtime]
    trt = import_bound(
        directory, package, manifest.binding, lambda: import_package(manifest.runtime)
    )
    require_same_machine(directory, manifest.binding, trt.__version__, current_gpu())
    files = [program.file for program in manifest.static_programs] or [manifest.program_file]
    engines: list[Any] = [
        deserialize(trt, read_program(directory, manifest, file), manifest.binding)
        for file in files
    ]
    return TensorRTRuntime(trt, engines, manifest, info_of_artifact(manifest))


def require_same_machine(
    directory: Path, binding: Binding | None, version: str, gpu: Gpu | None
) -> None:
    """Check that an engine was built for this version and GPU; it is never rebuilt silently."""
    binding = require_binding(directory, binding, "export/trt.py")
    require_version(directory, binding, version)
    gpu = require_gpu(directory, binding, gpu)
    built_for = binding.compute_capability
    if built_for is not None and len(built_for.split()) == 1 and gpu.name != binding.device:
        log.warning(
            "%s was tuned on %s, this is %s: it runs, perhaps slower than one that is built here",
            directory,
            binding.device,
            gpu.name,
        )


def choose_profile(num_images: int, profiles: Sequence[Profile]) -> tuple[Profile, int]:
    """Choose the profile for a batch, and the batch size that it is given.

    The one that needs the least filling up; of several the one that is made for the fewest sizes,
    because its kernels know most.
    """
    taking = [p for p in profiles if num_images <= p.high]
    best = min(taking, key=lambda p: (max(num_images, p.low), p.high - p.low))
    return best, max(num_images, best.low)


def _profiles_of(engine: Any, input_name: str) -> list[Profile]:
    batch_size = engine.get_tensor_shape(input_name)[0]
    if batch_size > 0:
        return [Profile(engine, 0, batch_size, batch_size)]
    profiles: list[Profile] = []
    for index in range(engine.num_optimization_profiles):
        low, _, high = engine.get_tensor_profile_shape(input_name, index)
        profiles.append(Profile(engine, index, low[0], high[0]))
    return profiles


def _new_scratch(profiles: Sequence[Profile]) -> torch.Tensor:
    sizes = [_scratch_bytes(profile.engine, profile.number) for profile in profiles]
    return torch.empty(max([1, *sizes]), dtype=torch.uint8, device="cuda")


def _scratch_bytes(engine: Any, index: int) -> int:
    return engine.get_device_memory_size_for_profile_v2(index)


def _create_context(trt: Any, engine: Any) -> Any:
    strategy: Any = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if trt.__name__ != PACKAGES["tensorrt-rtx"]:
        return engine.create_execution_context(strategy)
    # TensorRT-RTX compiles kernels for a shape when it first sees it, and by default in the
    # background: a graph would capture those that fill in meanwhile.
    settings: Any = engine.create_runtime_config()
    settings.set_execution_context_allocation_strategy(strategy)
    eager: Any = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    settings.dynamic_shapes_kernel_specialization_strategy = eager
    return engine.create_execution_context(settings)
