"""Flags and this machine -> what an engine is built with and for, or why that cannot be."""

import importlib.util
from dataclasses import dataclass
from typing import Any

from efficientnet.formats.artifact import Binding
from efficientnet.machine.gpu import Gpu, current_gpu, numbers, why_no_gpu
from efficientnet.precision import Precision
from efficientnet.runtimes.tensorrt_library import PACKAGES, import_package
from export.builders.tensorrt_builder import TensorRTError

# Compute capability whose tensor cores are the first for a format; below it is refused or slower
# than fp16.
LEAST_CAPABILITY: dict[Precision, str] = {"int8": "7.5", "bf16": "8.0", "fp8": "8.9"}

TURING = (7, 5)
VOLTA = (7, 0)

# The last version with kernels for Volta, and what pip calls it.
LAST_FOR_VOLTA = (10, 4)
VOLTA_PACKAGE = "tensorrt-cu12==10.4.0"

# The first whose contexts are given their scratch memory with its size.
OLDEST_VERSION = (10, 1)

# What TensorRT-RTX builds for when it is told nothing.
PORTABLE = "portable"
LEAST_PORTABLE = "8.0"


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
        capabilities = " or ".join(built_for) or f"{LEAST_PORTABLE} and later"
        return f"GPUs of compute capability {capabilities}"

    def binding(self, rebuild: str) -> Binding:
        """Bind an engine to this version and these GPUs."""
        return Binding(
            library=PACKAGES[self.runtime],
            version=self.trt.__version__,
            compute_capability=" ".join(self.compute_capabilities) or None,
            device=self.device,
            rebuild=rebuild,
        )


def find_target(runtime: str, precision: Precision, wanted: tuple[str, ...] | None) -> Target:
    """Check all that a build needs before any work starts.

    `wanted`: compute capabilities that TensorRT-RTX builds for, or 'portable'; None = the GPU's
    that is here, without one portable.
    """
    gpu = current_gpu()
    if runtime == "tensorrt":
        if gpu is None:
            raise TensorRTError(
                f"no NVIDIA GPU answers here ({why_no_gpu()}), and an engine is built for the GPU "
                "it runs on: run this command on that machine, with NVIDIA's driver (580 or newer "
                f"for CUDA 13) and 'pip install tensorrt-cu13', or '{VOLTA_PACKAGE}' for a V100; "
                "here '--flavor rtx' builds for later ('pip install tensorrt-rtx'), and "
                "'python export/ort.py' makes an artifact for the CPU"
            )
        trt: Any = load_package(runtime)
        require_supported(trt.__version__, gpu)
        capabilities = (gpu.compute_capability,)
    else:
        trt = load_package(runtime)
        capabilities = choose_capabilities(trt, wanted, gpu)
    require_precision(precision, capabilities, gpu)
    return Target(trt, runtime, gpu, capabilities)


def load_package(runtime: str) -> Any:
    """Import the library."""
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
    """Check that a version of TensorRT has kernels for a GPU."""
    found, capability = numbers(version), numbers(gpu.compute_capability)
    if found < OLDEST_VERSION:
        raise TensorRTError(
            f"TensorRT {version} is installed, expected 10.1 or newer: 'pip install tensorrt-cu13'"
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
    """Check that the GPUs that are built for have tensor cores for a format."""
    least = LEAST_CAPABILITY.get(precision, "0.0")
    for capability in capabilities or (LEAST_PORTABLE,):
        if numbers(capability) < numbers(least):
            is_here = gpu is not None and gpu.compute_capability == capability
            name = f"{gpu.name} with compute" if gpu is not None and is_here else "Compute"
            hint = "" if is_here else "; name newer GPUs with --compute-capability"
            raise TensorRTError(
                f"{name} capability {capability} has no tensor cores for {precision}, "
                f"{least} is the first that has: take --precision fp16{hint}"
            )


def choose_capabilities(
    trt: Any, wanted: tuple[str, ...] | None, gpu: Gpu | None
) -> tuple[str, ...]:
    """Return the compute capabilities that TensorRT-RTX builds for; () = portable."""
    if wanted is None:
        return (gpu.compute_capability,) if gpu is not None else ()
    if wanted == (PORTABLE,):
        return ()
    members: Any = trt.ComputeCapability.__members__
    offered = [name for name in members if name.startswith("SM")]
    unknown = [capability for capability in wanted if member_for(capability) not in offered]
    if unknown:
        raise TensorRTError(
            f"TensorRT-RTX {trt.__version__} builds for no compute capability "
            f"{' '.join(unknown)}; it offers {' '.join(f'{n[2:-1]}.{n[-1]}' for n in offered)} "
            f"and {PORTABLE}"
        )
    return wanted


def member_for(capability: str) -> str:
    """Return the name of a compute capability in TensorRT-RTX's enumeration."""
    return f"SM{capability.replace('.', '')}"
