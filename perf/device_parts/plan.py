"""Settings -> jobs: each a command with its share of the time, the important ones first."""

import importlib
import json
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from perf.device_parts.config import DeviceConfig, Part

V2 = ("v2-s", "v2-m", "v2-l")
V1 = ("b0", "b4", "b7")
DRY_VARIANT = "tiny"

# Seconds of eight minutes. What a job leaves of its own is the next one's.
SHARES: tuple[tuple[Part, tuple[str, ...], float], ...] = (
    ("tests", ("",), 80),
    ("limits", ("",), 20),
    ("network", V2, 42),
    ("training", ("v2-s",), 45),
    ("compile", ("v2-s",), 95),
    ("aoti", ("v2-s",), 60),
    ("loader", ("v2-s",), 40),
    ("network", V1, 25),
    ("tensorrt", V2, 90),
    ("onnxruntime", V2, 40),
    ("tensorrt-rtx", V2, 90),
    ("aoti", V2[1:], 90),
    ("compile", V2[1:], 120),
    ("aoti", V1, 90),
    ("compile", V1, 120),
    ("tensorrt", V1, 90),
    ("onnxruntime", V1, 40),
    ("tensorrt-rtx", V1, 90),
)
SHARES_OF_MINUTES = 8

# Part -> the package without which it has nothing to measure.
LIBRARIES: dict[Part, str] = {
    "tests": "pytest",
    "training": "timm",
    "loader": "timm",
    "onnxruntime": "onnxruntime",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
}
NEEDS_GPU: frozenset[Part] = frozenset({"tensorrt", "tensorrt-rtx"})
CUDA_PROVIDER = "CUDAExecutionProvider"


@dataclass(frozen=True)
class Job:
    """A process that is started, and may take some time."""

    part: Part
    name: str
    command: tuple[str, ...]
    seconds: float
    """Its share; see SHARES."""
    missing: str | None = None
    """Why it is not begun at all."""


@dataclass(frozen=True)
class Order:
    """What a job's process is told."""

    part: Part
    job: str
    variant: str
    output: str
    """Folder of the records."""
    scratch: str
    """Folder for what is thrown away afterwards."""
    is_dry_run: bool
    seconds: float = 0.0
    """Until it is ended; filled in when it is begun."""


def plan_jobs(config: DeviceConfig, output: Path, scratch: Path) -> list[Job]:
    """List the jobs of the parts that are asked for, the important ones first."""
    missing = {part: why_missing(part, config.dry_run) for part in config.parts}
    jobs: dict[str, Job] = {}
    for part, variants, seconds in SHARES:
        if part not in config.parts:
            continue
        for variant in variants:
            if config.dry_run and variant:
                # timm has no tiny, and the step is beside its own.
                variant = "b0" if part in ("training", "loader") else DRY_VARIANT
            name = f"{part} {variant}".strip()
            order = Order(part, name, variant, str(output), str(scratch), config.dry_run)
            command = (
                sys.executable,
                "-m",
                "perf.device_parts.job_process",
                json.dumps(asdict(order)),
            )
            jobs.setdefault(name, Job(part, name, command, seconds, missing[part]))
    return list(jobs.values())


def why_missing(part: Part, is_dry_run: bool) -> str | None:
    """Say what a part lacks on this machine; None when it can be begun."""
    library = LIBRARIES.get(part)
    if library is not None and find_spec(library) is None:
        return f"{library} is not installed"
    if is_dry_run:
        return "needs a GPU, which --dry-run does without" if part in NEEDS_GPU else None
    if part == "onnxruntime":
        providers = importlib.import_module("onnxruntime").get_available_providers()
        if CUDA_PROVIDER not in providers:
            return (
                f"the onnxruntime that is installed has {', '.join(providers)} and no "
                f"{CUDA_PROVIDER}, which onnxruntime-gpu has"
            )
    return None
