"""Checkpoint -> TensorRT or TensorRT-RTX engine, checked against the eager model.

python export/trt.py
python export/trt.py --precision int8 --batches 1 8 16
python export/trt.py --flavor rtx --batch 1 16 64 --checkpoint runs/v2-s-20261122T101500Z/checkpoint

An engine runs on the GPU model and the version that built it, so this command is run there.
TensorRT-RTX builds without a GPU, too; such an artifact is refused until export/parity.py has
checked it on one.
"""

import importlib.util
import json
import logging
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import onnx
import torch

from efficientnet.artifact import Binding, StaticProgram
from efficientnet.atomic import write_text
from efficientnet.command import parse_flags, run_command
from efficientnet.precision import Precision
from efficientnet.runtimes.tensorrt_runtime import (
    PACKAGES,
    Gpu,
    current_gpu,
    deserialize,
    import_package,
    why_no_gpu,
)
from export.config import ExportConfig
from export.graph import count_weight_bytes
from export.precision import typed_graph
from export.source import load_source
from export.trt_build import (
    BuildSettings,
    TensorRTError,
    build_engine,
    fix_batch,
    layers_of,
    profiles_for,
    read_layers,
)
from export.writing import Built, default_output, write_checked_artifact

PROGRAM_FILE = "model.engine"
LAYERS_FILE = "layers.json"

# Compute capability from which on a GPU computes in a format; below it is refused or emulated.
LEAST_CAPABILITY: dict[Precision, tuple[int, int]] = {"int8": (7, 5), "bf16": (8, 0), "fp8": (8, 9)}

TURING = (7, 5)
VOLTA = (7, 0)

# The last version with kernels for Volta, and what pip calls it.
LAST_FOR_VOLTA = (10, 4)
VOLTA_PACKAGE = "tensorrt-cu12==10.4.0"

OLDEST_VERSION = (10, 0)

# What TensorRT-RTX builds for when it is told nothing.
PORTABLE = "portable"
LEAST_PORTABLE = (8, 0)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrtConfig(ExportConfig):
    """Settings of an engine; --batches makes one for each size, --batch one for the range."""

    precision: Precision = "fp16"
    """Number format that the convolutions compute in."""

    flavor: Literal["tensorrt", "rtx"] = "tensorrt"
    """rtx: TensorRT-RTX, which builds without a GPU, and for several at once."""

    compute_capability: tuple[str, ...] | None = None
    """Of rtx: GPUs to build for, e.g. 8.6 8.9, or 'portable' for all from 8.0 on; None = the one
    here, without one portable."""

    optimization_level: int = 3
    """0 to 5: how long the builder looks for fast kernels."""

    workspace_mib: int | None = None
    """Scratch memory that a kernel may use; None = as much as the GPU has."""

    def __post_init__(self) -> None:
        """Check the limits."""
        super().__post_init__()
        if self.compute_capability is not None and self.flavor != "rtx":
            raise ValueError(
                "--compute-capability is for --flavor rtx; TensorRT builds for the GPU that is here"
            )
        if not 0 <= self.optimization_level <= 5:
            raise ValueError(f"--optimization-level is {self.optimization_level}, expected 0 to 5")
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise ValueError(f"--workspace-mib is {self.workspace_mib}, expected at least 1")


@dataclass(frozen=True)
class Target:
    """What is built with, and for."""

    trt: Any
    """The Python package."""
    runtime: str
    """tensorrt or tensorrt-rtx."""
    gpu: Gpu | None
    """That is here; None where there is none."""
    compute_capabilities: tuple[str, ...]
    """Of the GPUs that the engine runs on; () = all from LEAST_PORTABLE on."""

    @property
    def can_run_here(self) -> bool:
        """Whether the engine can be checked on this machine."""
        if self.gpu is None:
            return False
        built_for = self.compute_capabilities
        return not built_for or self.gpu.compute_capability in built_for

    @property
    def device(self) -> str:
        """In words."""
        built_for = self.compute_capabilities
        if self.gpu is not None and built_for == (self.gpu.compute_capability,):
            return self.gpu.name
        capabilities = " or ".join(built_for) or f"{_dotted(LEAST_PORTABLE)} and later"
        return f"GPUs of compute capability {capabilities}"


def main(config: TrtConfig) -> Path:
    """Build, check and write the artifact; return its directory."""
    target = find_target(config)
    version = target.trt.__version__
    log.info("%s %s for %s", target.runtime, version, target.device)
    if target.runtime == "tensorrt-rtx" and config.is_quantized:
        log.info(
            "TensorRT-RTX promises %s for weights of matrix products only: the engine is built, "
            "but nothing says that it is faster than fp16",
            config.precision,
        )
    source = load_source(config)
    output = default_output(config, source, target.runtime)
    settings = settings_for(config, target, output)
    binding = Binding(
        library=PACKAGES[target.runtime],
        version=version,
        compute_capability=" ".join(target.compute_capabilities) or None,
        device=target.device,
        rebuild=rebuild_command(config),
    )
    scheme = "tensorrt-fp8" if config.precision == "fp8" else "tensorrt"

    def build(directory: Path, kept: tuple[str, ...]) -> Built:
        log.info("export %s at %d px to ONNX", source.variant, source.image_size)
        typed = typed_graph(source, config, kept, scheme, directory)
        lines = [
            f"exported by torch {torch.__version__}, onnx {onnx.__version__}, opset {typed.opset}",
            f"built by {target.runtime} {version} for {target.device}",
        ]
        statics = static_programs(config)
        graphs = {p.file: fix_batch(typed.model, p.batch_size) for p in statics}
        profiles = () if statics else profiles_for(config.batch)
        for file, graph in (graphs or {PROGRAM_FILE: typed.model}).items():
            log.info("build %s", file)
            made = build_engine(target.trt, graph, profiles, settings, file)
            (directory / file).write_bytes(made.data)
            log.info("%s: %.1f MB in %.1f s", file, len(made.data) / 1e6, made.seconds)
            lines += made.log
        files = list(graphs) or [PROGRAM_FILE]
        if target.can_run_here:
            write_layers(target.trt, directory, files, binding)
        return Built(
            program_file=files[0],
            weight_bytes=count_weight_bytes(typed.model),
            other_files=tuple(files[1:]),
            static_programs=statics,
            log=tuple(lines),
            opset=typed.opset,
            target_device=target.device,
            binding=binding,
            quantization=typed.quantization,
        )

    return write_checked_artifact(
        source, config, output, target.runtime, build, target.can_run_here
    )


def find_target(config: TrtConfig) -> Target:
    """Check all that a build needs before any work starts.

    Raises:
        TensorRTError: something is missing, too old, or not offered; the message says what to do.
    """
    gpu = current_gpu()
    if config.flavor == "tensorrt":
        if gpu is None:
            raise TensorRTError(
                f"no NVIDIA GPU answers here ({why_no_gpu()}), and an engine is built for the GPU "
                "it runs on: run this command on that machine, with NVIDIA's driver (580 or newer "
                f"for CUDA 13) and 'pip install tensorrt-cu13', or '{VOLTA_PACKAGE}' for a V100; "
                "here '--flavor rtx' builds for later ('pip install tensorrt-rtx'), and "
                "'python export/ort.py' makes an artifact for the CPU"
            )
        trt: Any = load_package("tensorrt")
        require_supported(trt.__version__, gpu)
        capabilities = (gpu.compute_capability,)
    else:
        trt = load_package("tensorrt-rtx")
        capabilities = choose_capabilities(trt, config, gpu)
    require_precision(config.precision, capabilities, gpu)
    runtime = "tensorrt" if config.flavor == "tensorrt" else "tensorrt-rtx"
    return Target(trt, runtime, gpu, capabilities)


def load_package(runtime: str) -> Any:
    """Import the library.

    Raises:
        TensorRTError: it is not installed, or not wholly.
    """
    package = PACKAGES[runtime]
    wheel = "tensorrt-cu13" if runtime == "tensorrt" else "tensorrt-rtx"
    how = f"'pip install {wheel}' (driver 580 or newer; pip fetches its libraries from NVIDIA)"
    if runtime == "tensorrt":
        how += f", or '{VOLTA_PACKAGE}' for a V100, which later versions have dropped"
    if importlib.util.find_spec(package) is None:
        raise TensorRTError(f"{package} is not installed: {how}")
    try:
        return import_package(runtime)
    # Its Python part without its libraries fails with an OSError.
    except (ImportError, OSError) as error:
        raise TensorRTError(f"{package} cannot be imported ({error}): {how}") from error


def require_supported(version: str, gpu: Gpu) -> None:
    """Check that a version of TensorRT has kernels for a GPU.

    Raises:
        TensorRTError: it has not, or is too old for this project.
    """
    found, capability = _numbers(version), _numbers(gpu.compute_capability)
    if found < OLDEST_VERSION:
        raise TensorRTError(
            f"TensorRT {version} is installed, expected 10.0 or newer: 'pip install tensorrt-cu13'"
        )
    if capability < VOLTA:
        raise TensorRTError(
            f"{gpu.name} has compute capability {gpu.compute_capability}, TensorRT 10 needs 7.0: "
            "'python export/ort.py' makes an artifact for the CPU"
        )
    if capability < TURING and found > LAST_FOR_VOLTA:
        raise TensorRTError(
            f"TensorRT {version} has no kernels for {gpu.name} (compute capability "
            f"{gpu.compute_capability}), 10.4 is the last that has: 'pip install {VOLTA_PACKAGE}', "
            "with a build of torch for CUDA 12.6"
        )


def require_precision(precision: Precision, capabilities: tuple[str, ...], gpu: Gpu | None) -> None:
    """Check that the GPUs that are built for compute in a format.

    Args:
        precision: the format.
        capabilities: of the GPUs; () = all from LEAST_PORTABLE on.
        gpu: that is here, to be named.

    Raises:
        TensorRTError: one of them does not.
    """
    least = LEAST_CAPABILITY.get(precision, (0, 0))
    for capability in capabilities or (_dotted(LEAST_PORTABLE),):
        if _numbers(capability) < least:
            is_here = gpu is not None and gpu.compute_capability == capability
            name = f"{gpu.name}: c" if gpu is not None and is_here else "C"
            hint = "; name newer GPUs with --compute-capability" if not is_here else ""
            raise TensorRTError(
                f"{name}ompute capability {capability} does not compute in {precision}, which "
                f"needs {_dotted(least)}: take --precision fp16{hint}"
            )


def choose_capabilities(trt: Any, config: TrtConfig, gpu: Gpu | None) -> tuple[str, ...]:
    """Return the compute capabilities that TensorRT-RTX builds for; () = portable.

    Raises:
        TensorRTError: it offers none of that number.
    """
    wanted = config.compute_capability
    if wanted is None:
        return (gpu.compute_capability,) if gpu is not None else ()
    if wanted == (PORTABLE,):
        return ()
    members: Any = trt.ComputeCapability.__members__
    offered = [name for name in members if name.startswith("SM")]
    unknown = [capability for capability in wanted if _member(capability) not in offered]
    if unknown:
        raise TensorRTError(
            f"TensorRT-RTX {trt.__version__} builds for no compute capability "
            f"{' '.join(unknown)}; it offers {' '.join(f'{n[2:-1]}.{n[-1]}' for n in offered)} "
            f"and {PORTABLE}"
        )
    return wanted


def settings_for(config: TrtConfig, target: Target, output: Path) -> BuildSettings:
    """Return what the builder is told; fp32 means float32, not TF32."""
    capabilities: tuple[str, ...] = ()
    cache: Path | None = None
    if target.runtime == "tensorrt":
        assert target.gpu is not None
        name = f"{target.trt.__version__}-{target.gpu.compute_capability}"
        cache = output.parent / f".timing-cache-tensorrt-{name}"
    elif config.compute_capability is None and target.gpu is not None:
        capabilities = ("CURRENT",)
    else:
        capabilities = tuple(map(_member, target.compute_capabilities))
    return BuildSettings(
        optimization_level=config.optimization_level,
        workspace_mib=config.workspace_mib,
        uses_tf32=config.precision != "fp32",
        timing_cache=cache,
        compute_capabilities=capabilities,
    )


def static_programs(config: TrtConfig) -> tuple[StaticProgram, ...]:
    """Return the engines of --batches, by size."""
    if config.batches is None:
        return ()
    stem, _, suffix = PROGRAM_FILE.rpartition(".")
    return tuple(
        StaticProgram(batch_size=size, file=f"{stem}-b{size}.{suffix}")
        for size in config.static_batches
    )


def write_layers(trt: Any, directory: Path, files: list[str], binding: Binding) -> None:
    """Write layers.json: what the engines consist of, for reports on single layers."""
    layers: dict[str, object] = {}
    for file in files:
        engine: Any = deserialize(trt, directory / file, binding)
        layers[file] = read_layers(layers_of(trt, engine))
    write_text(directory / LAYERS_FILE, json.dumps(layers, indent=1) + "\n")


def rebuild_command(config: TrtConfig) -> str:
    """Write the command line that makes an artifact with the same settings."""
    words = ["python", "export/trt.py"]
    for field in fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


def _numbers(version: str) -> tuple[int, int]:
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _member(capability: str) -> str:
    return f"SM{capability.replace('.', '')}"


if __name__ == "__main__":
    run_command(lambda: parse_flags(TrtConfig, __doc__), main)
