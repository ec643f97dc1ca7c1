"""A TensorRT artifact -> TensorRT or TensorRT-RTX on the GPU, replayed as CUDA graphs.

See tensorrt_library.py for what `Any` stands for.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from efficientnet.formats.artifact import ArtifactError, ArtifactManifest, Binding, read_program
from efficientnet.machine.gpu import Gpu, current_gpu, no_room
from efficientnet.runtimes import binding as bindings
from efficientnet.runtimes import tensorrt_library as library
from efficientnet.runtimes.cuda_graphs import CudaGraphRuntime

log = logging.getLogger(__name__)


class Profile(NamedTuple):
    """A range of batch sizes that an engine has kernels for."""

    engine: Any
    number: int
    low: int
    high: int


class TensorRTProgram:
    """Calls of one batch size, in an execution context of their own, whose state a graph holds."""

    def __init__(
        self, trt: Any, profiles: Sequence[Profile], scratch: Tensor, manifest: ArtifactManifest
    ) -> None:
        self._trt = trt
        self._profiles = profiles
        # All contexts share it: calls run one after the other.
        self._scratch = scratch
        self._names = manifest.input.name, manifest.output.name
        self._num_classes = manifest.output.shape[0]
        self._context: Any = None

    def __call__(self, images: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to logits [N, num_classes], both float32 on the GPU."""
        stream = torch.cuda.current_stream().cuda_stream
        if self._context is None:
            self._context = self._new_context(images, stream)
        context: Any = self._context
        logits = torch.empty(len(images), self._num_classes, device="cuda")
        is_done = (
            context.set_tensor_address(self._names[0], images.data_ptr())
            and context.set_tensor_address(self._names[1], logits.data_ptr())
            and context.execute_async_v3(stream)
        )
        if not is_done:
            raise RuntimeError(library.messages_of(self._trt).take_problems())
        return logits

    def _new_context(self, images: Tensor, stream: int) -> Any:
        profile = choose_profile(len(images), self._profiles)
        context: Any = _create_context(self._trt, profile.engine)
        messages = library.messages_of(self._trt)
        if context is None:
            raise ArtifactError(no_room(len(images), messages.take_problems()))
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        is_ready = context.set_optimization_profile_async(
            profile.number, stream
        ) and context.set_input_shape(self._names[0], tuple(images.shape))
        if not is_ready:
            raise RuntimeError(messages.take_problems())
        return context


def open_program(directory: Path, manifest: ArtifactManifest, num_threads: int) -> CudaGraphRuntime:
    """Open a TensorRT artifact on the machine that it was built for."""
    trt = bindings.import_bound(
        directory,
        library.PACKAGES[manifest.runtime],
        manifest.binding,
        lambda: library.import_package(manifest.runtime),
    )
    require_same_machine(directory, manifest.binding, trt.__version__, current_gpu())
    sizes = {program.file: program.batch_size for program in manifest.static_programs}
    engines = {
        file: library.deserialize(trt, read_program(directory, manifest, file), manifest.binding)
        for file in sizes or [manifest.program_file]
    }
    batch, name = manifest.input.batch, manifest.input.name
    profiles = {file: _profiles_of(engine, name) for file, engine in engines.items()}
    try:
        every = [profile for own in profiles.values() for profile in own]
        scratch = torch.empty(_scratch_bytes(every), dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError as error:
        raise ArtifactError(no_room(batch.max, error)) from error
    if sizes:
        static = {
            size: TensorRTProgram(trt, profiles[file], scratch, manifest)
            for file, size in sizes.items()
        }
        return CudaGraphRuntime(static, None, manifest)
    return CudaGraphRuntime(
        {},
        lambda: TensorRTProgram(trt, profiles[manifest.program_file], scratch, manifest),
        manifest,
        tuple(range(batch.min, batch.max + 1)),
    )


def require_same_machine(
    directory: Path, binding: Binding | None, version: str, gpu: Gpu | None
) -> None:
    """Check that an engine was built for this version and GPU; it is never rebuilt silently."""
    binding = bindings.require_binding(directory, binding, "export/trt.py")
    bindings.require_version(directory, binding, version)
    gpu = bindings.require_gpu(directory, binding, gpu)
    built_for = binding.compute_capability
    if built_for is not None and len(built_for.split()) == 1 and gpu.name != binding.device:
        log.warning(
            "%s was tuned on %s, this is %s: it runs, perhaps slower than one that is built here",
            *(directory, binding.device, gpu.name),
        )


def choose_profile(num_images: int, profiles: Sequence[Profile]) -> Profile:
    """Choose of those that take a batch the one for the fewest sizes: its kernels know most."""
    taking = [p for p in profiles if p.low <= num_images <= p.high]
    return min(taking, key=lambda p: p.high - p.low)


def _profiles_of(engine: Any, input_name: str) -> list[Profile]:
    batch_size = engine.get_tensor_shape(input_name)[0]
    if batch_size > 0:
        return [Profile(engine, 0, batch_size, batch_size)]
    profiles: list[Profile] = []
    for index in range(engine.num_optimization_profiles):
        low, _, high = engine.get_tensor_profile_shape(input_name, index)
        profiles.append(Profile(engine, index, low[0], high[0]))
    return profiles


def _scratch_bytes(profiles: Sequence[Profile]) -> int:
    most = 1
    for profile in profiles:
        engine: Any = profile.engine
        most = max(most, engine.get_device_memory_size_for_profile_v2(profile.number))
    return most


def _create_context(trt: Any, engine: Any) -> Any:
    strategy: Any = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if trt.__name__ != library.PACKAGES["tensorrt-rtx"]:
        return engine.create_execution_context(strategy)
    # TensorRT-RTX compiles kernels for a shape when it first sees it, and by default in the
    # background: a graph would capture those that fill in meanwhile.
    settings: Any = engine.create_runtime_config()
    settings.set_execution_context_allocation_strategy(strategy)
    eager: Any = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    settings.dynamic_shapes_kernel_specialization_strategy = eager
    return engine.create_execution_context(settings)
