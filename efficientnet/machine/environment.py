"""This machine -> EnvironmentRecord: device, driver, library versions, git commit."""

import math
import os
import platform
import shutil
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from efficientnet import PROJECT_ROOT
from efficientnet.machine.cgroup import cpu_quota
from efficientnet.machine.processor import instruction_sets

# Versions that change a speed or a result; those not installed are left out of the record.
LIBRARIES = (
    "torch",
    "torchvision",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "nncf",
    "tensorrt",
    "tensorrt_rtx",
    "torch_tensorrt",
    "triton",
    "tensorrt-cu12",
    "tensorrt-cu13",
    "tensorrt-rtx",
    "torch-tensorrt",
    "numpy",
    "pillow",
    "bentoml",
)


class EnvironmentRecord(BaseModel):
    """Where something was trained, built or measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpu: str
    """Model name as the operating system gives it, which in a virtual machine may say little."""
    instruction_sets: tuple[str, ...] = ()
    """Of avx2, avx512, vnni, bf16 and amx; empty in older records, too."""
    num_cores: int
    """Logical processors that this process may use."""
    memory_bytes: int
    gpus: tuple[str, ...]
    """Name, memory and driver of each GPU as nvidia-smi gives them; empty without one."""
    system: str
    python: str
    libraries: dict[str, str]
    """Package -> version."""
    git_commit: str | None
    """Commit of the project's checkout, with '+changes' when files differ from it; None outside
    git."""

    @property
    def processor(self) -> str:
        """The CPU's name with its instruction sets."""
        sets = ", ".join(self.instruction_sets)
        return f"{self.cpu} with {sets}" if sets else self.cpu


@cache
def current_environment() -> EnvironmentRecord:
    """Describe this machine and the installed libraries."""
    return EnvironmentRecord(
        cpu=_cpu_name(),
        instruction_sets=instruction_sets(),
        num_cores=num_usable_cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=_gpus(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        libraries=_library_versions(),
        git_commit=_git_commit(),
    )


def num_usable_cores() -> int:
    """Count the logical processors that this process may run on, all at the same time.

    A container's quota of processor time counts in whole processors: a thread more than those would
    use the time up early and leave all of them standing still until the next period.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, min(cores, math.floor(cpu_quota() or cores)))


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> tuple[str, ...]:
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return tuple(answer.stdout.strip().splitlines()) if answer.returncode == 0 else ()


def _library_versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _git_commit() -> str | None:
    if not (PROJECT_ROOT / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(PROJECT_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD")
    if not commit:
        return None
    return f"{commit}+changes" if git("status", "--porcelain", "--untracked-files=no") else commit
