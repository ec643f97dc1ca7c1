"""Settings -> jobs, the important first; each a process with a time limit, that ends no other."""

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from efficientnet import PROJECT_ROOT
from perf.device_parts.config import DeviceConfig, Part
from perf.device_parts.order import Order
from perf.device_parts.records import FINAL, JobEnd, Status, append, ends_by_job, read

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

# A process that ends itself because its time is over, as timeout(1) does.
OUT_OF_TIME = 124

# With less, a job would not get beyond importing torch.
LEAST_S = 8.0

# What the process is told is less than what it gets: to write down what it has.
RESERVE_S = 2.0

NUM_STDERR_LINES = 20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A process that is started, and may take some time."""

    part: Part
    name: str
    command: tuple[str, ...]
    """Its last argument, the seconds that it has, is added when it is begun."""
    seconds: float
    """Its share; see SHARES."""
    missing: str | None = None
    """Why it is not begun at all."""

    def end(
        self, status: Status, reason: str = "", seconds: float = 0.0, stderr: Sequence[str] = ()
    ) -> JobEnd:
        """Describe how it ended."""
        return JobEnd(
            part=self.part,
            job=self.name,
            status=status,
            reason=reason,
            seconds=round(seconds, 1),
            stderr=tuple(stderr),
        )


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
            command = (sys.executable, "-m", "perf.device_parts.job_process")
            command += (json.dumps(asdict(order)),)
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


def pending(jobs: Sequence[Job], ends: dict[str, JobEnd]) -> list[Job]:
    """Return the jobs that are not done yet, those last that were tried before."""
    left = [job for job in jobs if job.name not in ends or ends[job.name].status not in FINAL]
    tried = {name for name, end in ends.items() if end.status != "not begun"}
    return sorted(left, key=lambda job: job.name in tried)


def run_jobs(
    jobs: Sequence[Job],
    folder: Path,
    minutes: float,
    is_dry_run: bool,
    after_each: Callable[[], object],
) -> None:
    """Run what is not done yet in the folder, and append to its records how each ended."""
    started = time.monotonic()
    end_of_all = started + 60 * minutes
    to_do = pending(jobs, ends_by_job(read(folder)))
    for job in to_do:
        if job.missing is not None:
            append(folder, job.end("skipped", job.missing))
    after_each()
    to_do = [job for job in to_do if job.missing is None]
    total = sum(job.seconds for job in to_do)
    scale = max(minutes / SHARES_OF_MINUTES, 60 * minutes / total) if to_do else 1.0
    due = started
    for number, job in enumerate(to_do, start=1):
        due += scale * job.seconds
        limit_s = min(due, end_of_all) - time.monotonic()
        if limit_s < min(LEAST_S, scale * job.seconds / 2):
            end = job.end("not begun", f"the {minutes:g} minutes were over")
        else:
            log.info("%d of %d: %s, at most %.0f s", number, len(to_do), job.name, limit_s)
            end = run_job(job, limit_s, is_dry_run)
        append(folder, end)
        log.info("%s: %s after %.0f s %s", job.name, end.status, end.seconds, end.reason)
        after_each()


def run_job(job: Job, limit_s: float, is_dry_run: bool) -> JobEnd:
    """Run one job; end all of its processes when its time is over."""
    paths = [str(PROJECT_ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if is_dry_run:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    begun = time.monotonic()
    # Into a file: a pipe would be waited for until all that inherited it have ended.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        process = subprocess.Popen(
            [*job.command, str(max(1.0, limit_s - RESERVE_S))],
            cwd=PROJECT_ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            start_new_session=True,
        )
        code: int | None = None
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(limit_s)
        finally:
            # Also after an orderly end: nothing that it started may still use the GPU.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds = time.monotonic() - begun
        stderr.seek(0)
        tail = [line for line in stderr.read().splitlines() if line.strip()][-NUM_STDERR_LINES:]
    if code == 0:
        return job.end("done", seconds=seconds)
    if code is None or code == OUT_OF_TIME:
        return job.end("out of time", f"ended after its {limit_s:.0f} s", seconds, tail)
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; the machine may be out of memory" if name == "SIGKILL" else ""
        return job.end("failed", f"ended by {name}{hint}", seconds, tail)
    last = tail[-1] if tail else "it said nothing"
    return job.end("failed", f"exit code {code}: {last.strip()[:300]}", seconds, tail)
