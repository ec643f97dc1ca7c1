"""Checkpoint -> programs compiled by AOTInductor for this CPU or GPU, checked against the model."""

import errno
import importlib
import logging
import os
import shlex
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
from torch._inductor.utils import fresh_cache

from efficientnet.errors import PipelineError
from efficientnet.formats.artifact import Binding
from efficientnet.machine import gpu as gpus
from efficientnet.precision import Precision
from efficientnet.runtimes.aoti_runtime import missing_extensions
from export.builders import writing
from export.graphs.folding import TORCH_TYPES, fold_batch_norm, weight_bytes_of
from export.inputs.config import AotiConfig, Device, rebuild_command
from export.inputs.reference import load_reference

PROGRAM_FILE = "model.pt2"

TRITON_SQUEEZE_EXCITE = "efficientnet.network.squeeze_excite_kernel"

# Below, Triton has no kernels.
LEAST_CAPABILITY = "7.0"
LEAST_CAPABILITY_FOR_BF16 = "8.0"

# What get_cpu_capability says -> the compiler's name for it. Left to itself, inductor asks for all
# that this very processor has, and the program would end with an illegal instruction on another
# one of the same capability.
ARCHITECTURES = {"AVX2": "x86-64-v3", "AVX512": "x86-64-v4"}

SIGNS_OF_A_FULL_DISK = ("No space left on device", "PytorchStreamWriter failed")

log = logging.getLogger(__name__)


class AotiError(PipelineError):
    """A program that cannot be compiled here."""


@dataclass(frozen=True)
class Target:
    """What is compiled for."""

    device: Device
    name: str
    """Of the GPU, or of the processor's instruction set."""
    compute_capability: str | None
    """None for a CPU."""

    def binding(self, rebuild: str) -> Binding:
        """Bind a program to this torch and device."""
        return Binding(
            library="torch",
            version=torch.__version__,
            compute_capability=self.compute_capability,
            device=self.name,
            rebuild=rebuild,
        )


class Program(nn.Module):
    """What is compiled: float32 images of any layout -> float32 logits, channels_last inside."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network.to(dtype).to(memory_format=torch.channels_last)
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to logits [N, num_classes]."""
        x = images.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return self.network(x).float()


def main(config: AotiConfig) -> Path:
    """Compile, check and write the artifact; return its directory."""
    target = find_target(config.device, config.precision)
    compiler = require_compiler()
    log.info("torch %s and %s for %s (%s)", torch.__version__, compiler, target.device, target.name)
    reference = load_reference(config)
    on_gpu = target.device == "cuda"
    output = writing.default_output(config, reference, "aoti-cuda" if on_gpu else "aoti")
    dtype = TORCH_TYPES[config.precision]
    files = writing.program_files(PROGRAM_FILE, config)
    rebuild = rebuild_command("export/aoti.py", config, reference.checkpoint)

    def build(directory: Path, _: tuple[str, ...]) -> writing.Built:
        network = fold_batch_norm(reference.model)
        if on_gpu and config.fused_squeeze_excite:
            importlib.import_module(TRITON_SQUEEZE_EXCITE).use_triton_squeeze_excite(network)
        programs = {directory / file: batch for file, batch in files.items()}
        lines = compile_programs(
            network, dtype, reference.image_size, programs, config.batch[1], target.device
        )
        return writing.Built(
            next(iter(files)),
            weight_bytes_of(reference.model, dtype),
            static_programs=writing.static_programs(files),
            log=(f"compiled by torch {torch.__version__} and {compiler} for {target.name}", *lines),
            target_device=target.name if on_gpu else "cpu",
            binding=target.binding(rebuild),
        )

    return writing.write_checked_artifact(reference, config, output, "aoti", build)


def find_target(device: Device | None, precision: Precision) -> Target:
    """Check that the device (None = the GPU where there is one) computes in the precision."""
    gpu = gpus.current_gpu()
    if device == "cpu" or (device is None and gpu is None):
        missing = missing_extensions(precision)
        if missing is not None:
            raise AotiError(
                f"this processor has no instructions for {precision} ({missing}): it would "
                "compute in float32 and round; take --precision fp32, or int8 by "
                "'python export/ov.py --precision int8'"
            )
        return Target("cpu", torch.backends.cpu.get_cpu_capability(), None)
    if gpu is None:
        raise AotiError(
            f"no NVIDIA GPU answers here ({gpus.why_no_gpu()}), and a program is compiled on the "
            "GPU it runs on: run this command on that machine, or take --device cpu"
        )
    least = LEAST_CAPABILITY_FOR_BF16 if precision == "bf16" else LEAST_CAPABILITY
    if gpus.numbers(gpu.compute_capability) < gpus.numbers(least):
        instead = "take --precision fp16" if precision == "bf16" else "take --device cpu"
        raise AotiError(
            f"{gpu.name} has compute capability {gpu.compute_capability}, and {precision} "
            f"by AOTInductor needs {least}: {instead}"
        )
    return Target("cuda", gpu.name, gpu.compute_capability)


def require_compiler() -> str:
    """Return the C++ compiler that torch would take."""
    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler as error:
        wanted = os.environ.get("CXX", "g++")
        raise AotiError(
            f"there is no C++ compiler here ({wanted} is not found), and AOTInductor compiles with "
            "one: 'apt-get install g++', or name yours with CXX=...; the program runs without; "
            "'python export/ort.py' needs none"
        ) from error


def compile_programs(
    network: nn.Module,
    dtype: torch.dtype,
    image_size: int,
    programs: Mapping[Path, writing.Batch],
    opt: int,
    device: Device,
) -> list[str]:
    """Compile a network for each batch and write the packages; return lines for the build's log.

    `programs` maps the file to write (.pt2) to its batch; one for a range is tuned for `opt`
    images. The network is moved.
    """
    program = Program(network, dtype).eval().to(device)
    lines: list[str] = []
    # The one tells everyone without a GPU that the CUDA toolkit is not used, the other after an
    # error that its cache is kept, which is removed with the artifact's unfinished directory.
    for name in ("torch.utils.cpp_extension", "torch._inductor.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    folder = next(iter(programs)).parent
    try:
        with unquoted_path(folder) as path, fresh_cache(dir=path), torch.no_grad():
            for file, batch in programs.items():
                log.info("compile %s: about a minute", file.name)
                started = time.perf_counter()
                settings = inductor_settings(device, is_static=isinstance(batch, int))
                example, shapes = example_batch(batch, opt, image_size, device)
                torch._inductor.aoti_compile_and_package(
                    torch.export.export(program, (example,), dynamic_shapes=shapes),
                    package_path=str(file),
                    inductor_configs=settings,
                )
                seconds = time.perf_counter() - started
                line = f"{file.name}: {file.stat().st_size / 1e6:.1f} MB in {seconds:.0f} s"
                log.info("%s", line)
                lines.append(f"{line}, {settings}")
    except RuntimeError as error:
        if any(sign in str(error) for sign in SIGNS_OF_A_FULL_DISK):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        if isinstance(error, CppCompileError):
            said = error.output.splitlines() or ["no reason"]
            raise AotiError(
                f"the C++ compiler fails for {device}: "
                f"{next((line for line in said if 'error' in line), said[-1])}; "
                "g++ 11 or clang 14 and newer are known to work, for cuda with the CUDA toolkit "
                f"that torch was built with ({torch.version.cuda})"
            ) from error
        raise
    return lines


def inductor_settings(device: Device, is_static: bool) -> dict[str, Any]:
    """Return options of torch._inductor.config."""
    if device == "cuda":
        return {}
    return {
        # Freezing joins SiLU to the convolutions, but stores weights in an order that the joined
        # kernel of a fixed batch does not want: docs/export.md has the times.
        "freezing": not is_static,
        # By default the number of threads of this machine is compiled in.
        "cpp.dynamic_threads": True,
        "cpp.march": ARCHITECTURES.get(torch.backends.cpu.get_cpu_capability()),
    }


def example_batch(
    batch: writing.Batch, opt: int, image_size: int, device: Device
) -> tuple[Tensor, Any]:
    """Return images and dynamic shapes for torch.export, of one batch size or of a range."""
    if isinstance(batch, int):
        return torch.zeros(batch, 3, image_size, image_size, device=device), None
    # torch.export takes a batch of one for a constant, and a range from 1 for one from 2.
    # The code takes one image nevertheless, as the parity check shows for each program.
    images = torch.zeros(max(2, opt), 3, image_size, image_size, device=device)
    return images, ({0: torch.export.Dim("batch", min=1, max=batch[1])},)


@contextmanager
def unquoted_path(folder: Path) -> Generator[str]:
    """Give a folder's path in a form that a command line may hold without quotes.

    inductor joins the paths of its cache to the compiler's command line and splits that at spaces
    (torch 2.14, torch/_inductor/cpp_builder.py).
    """
    path = str(folder.absolute())
    if shlex.quote(path) == path:
        yield path
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        # Not `self`: the compiler is another process.
        yield f"/proc/{os.getpid()}/fd/{opened}"
    finally:
        os.close(opened)
