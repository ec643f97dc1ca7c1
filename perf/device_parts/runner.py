"""Jobs, minutes -> one process after the other, and of each how it ended; none ends the others."""

import logging
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from efficientnet import PROJECT_ROOT
from perf.device_parts.plan import SHARES_OF_MINUTES, Job
from perf.device_parts.records import FINAL, JobEnd, Status, append, ends_by_job, read

# A process that ends itself because its time is over, as timeout(1) does.
OUT_OF_TIME = 124

# With less, a job would not get beyond importing torch.
LEAST_S = 8.0

# What the process is told is less than what it gets: to write down what it has.
RESERVE_S = 2.0

NUM_STDERR_LINES = 20

SECONDS_VARIABLE = "DEVICE_JOB_SECONDS"

log = logging.getLogger(__name__)


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
            append(folder, _end(job, "skipped", job.missing, 0.0))
    after_each()
    to_do = [job for job in to_do if job.missing is None]
    total = sum(job.seconds for job in to_do)
    scale = max(minutes / SHARES_OF_MINUTES, 60 * minutes / total) if to_do else 1.0
    due = started
    for number, job in enumerate(to_do, start=1):
        due += scale * job.seconds
        begun = time.monotonic()
        limit_s = min(due, end_of_all) - begun
        if limit_s < min(LEAST_S, scale * job.seconds / 2):
            reason = f"the {minutes:g} minutes were over"
            append(folder, _end(job, "not begun", reason, 0.0))
            log.info("%s: not begun, %s", job.name, reason)
            continue
        log.info("%d of %d: %s, at most %.0f s", number, len(to_do), job.name, limit_s)
        end = run_job(job, limit_s, is_dry_run)
        append(folder, end)
        reason = f", {end.reason}" if end.reason else ""
        log.info("%s: %s after %.0f s%s", job.name, end.status, end.seconds, reason)
        after_each()
    after_each()


def run_job(job: Job, limit_s: float, is_dry_run: bool) -> JobEnd:
    """Run one job; end all of its processes when its time is over."""
    environment = os.environ | {SECONDS_VARIABLE: str(max(1.0, limit_s - RESERVE_S))}
    paths = [str(PROJECT_ROOT), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if is_dry_run:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    begun = time.monotonic()
    # Into a file: a pipe would be waited for until all that inherited it have ended.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        process = subprocess.Popen(
            job.command,
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
        lines = [line for line in stderr.read().splitlines() if line.strip()]
    tail = tuple(lines[-NUM_STDERR_LINES:])
    if code == 0:
        return _end(job, "done", "", seconds)
    if code is None or code == OUT_OF_TIME:
        return _end(job, "out of time", f"ended after its {limit_s:.0f} s", seconds, tail)
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; the machine may be out of memory" if name == "SIGKILL" else ""
        return _end(job, "failed", f"ended by {name}{hint}", seconds, tail)
    last = tail[-1] if tail else "it said nothing"
    return _end(job, "failed", f"exit code {code}: {last.strip()[:300]}", seconds, tail)


def _end(
    job: Job, status: Status, reason: str, seconds: float, stderr: tuple[str, ...] = ()
) -> JobEnd:
    return JobEnd(
        part=job.part,
        job=job.name,
        status=status,
        reason=reason,
        seconds=round(seconds, 1),
        stderr=stderr,
    )
