"""Artifacts and checkpoints -> latency and throughput of each, measured in turns: LatencyRecords.

Without a path: the checkpoint of the newest complete run and every artifact made of it. Each path
is measured in a process of its own, image by image (single_stream) and at the batch size of the
most images/s (offline).

    python perf/latency.py
    python perf/latency.py runs/latest/checkpoint artifacts/v2-s/onnxruntime-fp32 --seconds 60
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import tyro

from efficientnet.command import parse_flags, run_command
from efficientnet.formats.records import Scenario, append_record
from efficientnet.machine.environment import current_environment, num_usable_cores
from efficientnet.measuring.peaks import CPU_PRECISION, cpu_peak, describe_peak
from efficientnet.measuring.programs import (
    Program,
    read_programs,
    require_different_paths,
    require_writable,
)
from efficientnet.measuring.progress import Progress
from efficientnet.measuring.stability import instabilities
from efficientnet.measuring.turns import Measured, Pace
from perf.measurements.measured_programs import choose_best_sizes, measure, open_subjects, planned_s
from perf.measurements.recording import make_record, results_table

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LatencyConfig:
    """Settings of a measurement."""

    paths: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Artifact and checkpoint directories; none = the newest complete run's checkpoint and the
    artifacts made of it."""

    seconds: float = 10.0
    """Measured time of each path in each scenario, without warm-up, above 0."""

    turns: int = 6
    """Turns that this time is split into, at least 1."""

    threads: int | None = None
    """CPU threads of a call; None = one per usable core."""

    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Batch sizes that are tried for offline; those an artifact does not take are left out."""

    scenarios: tuple[Scenario, ...] = get_args(Scenario)
    """What is measured of each path."""

    output: Path = Path("reports/latency.jsonl")
    """File that the records are appended to."""

    seed: int = 0
    """Draws the held-out images that are the input."""

    data: str | None = None
    """Held-out images, where the training data has moved: a folder or tar shards, as in
    training/run.py; None = what each program was trained on."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"--seconds is {self.seconds:g}, expected more than 0")
        for flag, value in (("--turns", self.turns), ("--threads", self.threads)):
            if value is not None and value < 1:
                raise ValueError(f"{flag} is {value}, expected at least 1")
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"--batches is {list(self.batches)}, expected sizes of at least 1")
        if not self.scenarios or len(set(self.scenarios)) < len(self.scenarios):
            raise ValueError(
                f"--scenarios is {list(self.scenarios)}, expected one or both of "
                f"{', '.join(get_args(Scenario))}"
            )
        require_different_paths(self.paths)


def main(config: LatencyConfig) -> Path:
    """Measure all paths and append the records; nothing is written when one of them fails.

    Raises:
        FileNotFoundError: a path or the data is not there.
        ArtifactError, CheckpointError: a path is not what it should be, found before any work.
        WorkerError: a process failed; the others are stopped.
    """
    started_at = datetime.now(UTC)
    programs = read_programs(config.paths)
    batch_sizes = [choose_batch_sizes(program, config.batches) for program in programs]
    require_writable(config.output, "--output")
    num_threads = config.threads or num_usable_cores()
    pace = Pace(config.seconds, config.turns)
    log.info(
        "programs: %d; threads: %d; measured time: %g s each and scenario, in %d turns; "
        "machine: %s, %d cores",
        len(programs),
        num_threads,
        config.seconds,
        config.turns,
        current_environment().cpu,
        num_usable_cores(),
    )
    # Before the programs are opened: nothing else computes now.
    peak = cpu_peak(num_threads)
    log.info("the CPU's peak in float32: %s", describe_peak(peak))
    results: dict[Scenario, list[tuple[Measured, float]]] = {}
    with (
        open_subjects(programs, batch_sizes, num_threads, config.data, config.seed) as subjects,
        Progress(planned_s(subjects, config.scenarios, pace)) as progress,
    ):
        if "single_stream" in config.scenarios:
            ones = [1] * len(subjects)
            results["single_stream"] = measure(subjects, ones, "single_stream", pace, progress)
        if "offline" in config.scenarios:
            best = choose_best_sizes(subjects, pace, progress)
            results["offline"] = measure(subjects, best, "offline", pace, progress)
    folder = config.output.parent
    records = [
        make_record(
            subject,
            scenario,
            measured,
            overhead_ms,
            num_threads,
            started_at,
            config.seed,
            folder,
            peak if subject.program.precision == CPU_PRECISION else None,
        )
        for scenario, measurements in results.items()
        for subject, (measured, overhead_ms) in zip(subjects, measurements, strict=True)
    ]
    for record in records:
        append_record(config.output, record)
    names = [subject.worker.name for subject in subjects] * len(results)
    log.info("%s", results_table(names, records).aligned_text())
    for name, record in zip(names, records, strict=True):
        for reason in instabilities(record):
            log.info("unstable: %s, %s: %s", name, record.scenario, reason)
    log.info("a speed is reported with its accuracy only: 'python perf/accuracy.py' measures it")
    return config.output


def choose_batch_sizes(program: Program, asked: Sequence[int]) -> tuple[int, ...]:
    """Keep the sizes that the program takes, ascending; those it does not take are logged.

    Raises:
        ValueError: none is left.
    """
    most = program.max_batch_size
    sizes = sorted(set(asked))
    taken = tuple(size for size in sizes if most is None or size <= most)
    if not taken:
        raise ValueError(
            f"{program.path} takes at most {most} images in a call, --batches are "
            f"{', '.join(map(str, sizes))}; add a smaller one, or export with a larger --batch"
        )
    if len(taken) < len(sizes):
        left_out = ", ".join(str(size) for size in sizes if size not in taken)
        log.info("%s takes at most %d images in a call: without %s", program.path, most, left_out)
    return taken


if __name__ == "__main__":
    run_command(lambda: parse_flags(LatencyConfig, __doc__), main)
