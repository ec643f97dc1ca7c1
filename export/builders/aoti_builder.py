"""Model -> programs compiled ahead of time by AOTInductor, in a cache that is removed with it."""

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
from efficientnet.network.model import EfficientNet
from export.graphs.folding import fold_batch_norm
from export.inputs.config import Device, ExportConfig

# A program's batch size, or the fewest and the most images of a call.
Batch = int | tuple[int, int]

TRITON_SQUEEZE_EXCITE = "efficientnet.network.squeeze_excite_kernel"

# What get_cpu_capability says -> the compiler's name for it. Left to itself, inductor asks for all
# that this very processor has, and the program would end with an illegal instruction on another
# one of the same capability.
ARCHITECTURES = {"AVX2": "x86-64-v3", "AVX512": "x86-64-v4"}

SIGNS_OF_A_FULL_DISK = ("No space left on device", "PytorchStreamWriter failed")

log = logging.getLogger(__name__)


class AotiError(PipelineError):
    """A program that cannot be compiled here."""


@dataclass(frozen=True)
class CompileSettings:
    """What the compiler is told."""

    device: Device
    dtype: torch.dtype
    uses_triton_squeeze_excite: bool
    """Of CUDA."""

    def inductor(self, is_static: bool) -> dict[str, Any]:
        """Return options of torch._inductor.config."""
        if self.device == "cuda":
            return {}
        return {
            # Freezing joins SiLU to the convolutions. It also stores weights in the order that
            # oneDNN asks for, which for a fixed batch is not the one that the joined kernel then
            # wants: v2-s took 738 ms in place of 335; docs/export.md has the others.
            "freezing": not is_static,
            # By default the number of threads of this machine is compiled in.
            "cpp.dynamic_threads": True,
            "cpp.march": ARCHITECTURES.get(torch.backends.cpu.get_cpu_capability()),
        }


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


def batches_for(config: ExportConfig) -> tuple[Batch, ...]:
    """Return one batch size a program, or the range of the only one."""
    low, _, high = config.batch
    if config.batches is not None:
        return config.static_batches
    return (high,) if low == high else ((low, high),)


def compile_programs(
    model: EfficientNet,
    image_size: int,
    programs: Mapping[Path, Batch],
    opt: int,
    settings: CompileSettings,
) -> list[str]:
    """Compile a model for each batch and write the packages; return lines for the build's log.

    Args:
        model: in float32, on the CPU; not changed.
        image_size: pixels.
        programs: file to write, ending in .pt2 -> its batch.
        opt: batch size that a program for a range is tuned for.
        settings: see CompileSettings.

    Raises:
        AotiError: the compiler fails.
        OSError: the disk is full.
    """
    network = fold_batch_norm(model)
    if settings.uses_triton_squeeze_excite:
        importlib.import_module(TRITON_SQUEEZE_EXCITE).use_triton_squeeze_excite(network)
    program = Program(network, settings.dtype).eval().to(settings.device)
    lines: list[str] = []
    # The one tells everyone without a GPU that the CUDA toolkit is not used, the other after an
    # error that its cache is kept, which is removed with the artifact's unfinished directory.
    for name in ("torch.utils.cpp_extension", "torch._inductor.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    folder = next(iter(programs)).parent
    try:
        with unquoted_path(folder) as path, fresh_cache(dir=path), torch.no_grad():
            for file, batch in programs.items():
                log.info("compile %s: %s images a call, about a minute", file.name, _words(batch))
                started = time.perf_counter()
                _compile(program, image_size, file, batch, opt, settings)
                seconds = time.perf_counter() - started
                line = f"{file.name}: {file.stat().st_size / 1e6:.1f} MB in {seconds:.0f} s"
                log.info("%s", line)
                lines.append(f"{line}, {settings.inductor(isinstance(batch, int))}")
    except RuntimeError as error:
        if any(sign in str(error) for sign in SIGNS_OF_A_FULL_DISK):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        if isinstance(error, CppCompileError):
            raise AotiError(
                f"the C++ compiler fails for {settings.device}: {_first_error(error.output)}; "
                "g++ 11 or clang 14 and newer are known to work, for cuda with the CUDA toolkit "
                f"that torch was built with ({torch.version.cuda})"
            ) from error
        raise
    return lines


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


def weight_bytes_of(model: EfficientNet, dtype: torch.dtype) -> int:
    """Count the bytes of a model's weights in a format, batch norm folded."""
    return sum(p.numel() for p in fold_batch_norm(model).parameters()) * dtype.itemsize


def _compile(
    program: Program,
    image_size: int,
    file: Path,
    batch: Batch,
    opt: int,
    settings: CompileSettings,
) -> None:
    if isinstance(batch, int):
        num_images, shapes = batch, None
    else:
        # torch.export takes a batch of one for a constant, and a range from 1 for one from 2.
        # The code takes one image nevertheless, as the parity check shows for each program.
        num_images, shapes = max(2, opt), ({0: torch.export.Dim("batch", min=1, max=batch[1])},)
    example = torch.zeros(num_images, 3, image_size, image_size, device=settings.device)
    exported = torch.export.export(program, (example,), dynamic_shapes=shapes)
    torch._inductor.aoti_compile_and_package(
        exported, package_path=str(file), inductor_configs=settings.inductor(shapes is None)
    )


def _words(batch: Batch) -> str:
    return str(batch) if isinstance(batch, int) else f"{batch[0]} to {batch[1]}"


def _first_error(output: str) -> str:
    lines = output.splitlines()
    return next((line for line in lines if "error" in line), lines[-1] if lines else "no reason")
