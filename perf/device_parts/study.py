"""Settings -> a folder with the records of all jobs and report.md."""

import logging
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from efficientnet.errors import PipelineError
from efficientnet.machine.atomic import write_text
from efficientnet.machine.environment import current_environment
from efficientnet.machine.gpu import current_gpu, why_no_gpu
from efficientnet.reporting.publishing import device_slug
from perf.device_parts.config import DeviceConfig
from perf.device_parts.jobs import plan_jobs, run_jobs
from perf.device_parts.records import CallStart, Line, append, read
from perf.device_parts.report import document

REPORT_FILE = "report.md"

log = logging.getLogger(__name__)


class DeviceError(PipelineError):
    """A machine, or a folder, that this cannot be measured on."""


def main(config: DeviceConfig) -> Path:
    """Run all jobs that are not done yet; return the report's file."""
    start = describe(config)
    output = config.output
    if output is None:
        name = f"{start.started_at:%Y-%m-%d}-{device_slug([start.environment])}"
        output = Path("reports/device") / (f"{name}-dry-run" if config.dry_run else name)
    output = output.absolute()
    require_same_device(output, read(output), start)
    append(output, start)
    report = output / REPORT_FILE

    def write_report() -> None:
        write_text(report, document(read(output)))

    with tempfile.TemporaryDirectory(prefix="device-") as scratch:
        jobs = plan_jobs(config, output, Path(scratch))
        log.info("%d jobs on %s, records in %s", len(jobs), start.device, output)
        run_jobs(jobs, output, config.minutes, config.dry_run, write_report)
    return report


def describe(config: DeviceConfig) -> CallStart:
    """Describe the device and this call."""
    gpu = None if config.dry_run else current_gpu()
    if gpu is None and not config.dry_run:
        raise DeviceError(
            f"no NVIDIA GPU answers here ({why_no_gpu()}), and this measures one: run it on that "
            "machine, or walk through all parts on the CPU with --dry-run"
        )
    environment = current_environment()
    return CallStart(
        started_at=datetime.now(UTC),
        minutes=config.minutes,
        is_dry_run=config.dry_run,
        device=gpu.name if gpu else environment.processor,
        compute_capability=gpu.compute_capability if gpu else None,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version() if gpu else None,
        environment=environment,
    )


def require_same_device(output: Path, lines: Sequence[Line], start: CallStart) -> None:
    """Check that what is in a folder may stand in one report with this call."""
    earlier = [line for line in lines if isinstance(line, CallStart)]
    for call in earlier[-1:]:
        if (call.device, call.is_dry_run) != (start.device, start.is_dry_run):
            kind = " (a dry run)" if call.is_dry_run else ""
            raise DeviceError(
                f"{output} has records of {call.device}{kind}, this is {start.device}"
                f"{' (a dry run)' if start.is_dry_run else ''}: choose another folder with --output"
            )
