"""Checkpoint -> every artifact that this machine can make, one table of them, and the default.

python export/all.py
python export/all.py --checkpoint runs/v2-s-20261122T101500Z/checkpoint --only ort ov
"""

import logging
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import tyro

from efficientnet import PROJECT_ROOT
from efficientnet.command import parse_flags, run_command
from efficientnet.errors import PipelineError
from efficientnet.formats.artifact import AccuracyGate, read_artifact
from efficientnet.machine.atomic import point_link
from efficientnet.machine.children import stop_command
from efficientnet.machine.environment import current_environment
from efficientnet.precision import Precision
from efficientnet.reporting.publishing import find_section
from efficientnet.runtimes import open_runtime
from export.builders.measuring import measure
from export.checks.gate import Gate, GateError
from export.inputs.config import ExportConfig
from export.inputs.reference import Source, load_source
from export.studies.summary import (
    DEFAULT_LINK,
    SECTION,
    Line,
    Summary,
    choose_default,
    line_of,
    publish,
    table_of,
)

NUM_TURNS = 6

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """One export command with its flags."""

    command: str
    name: str
    """First part of the artifact's directory."""
    precision: Precision
    flags: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """As people write it."""
        return f"{self.name} {self.precision}"


# Command, name, flags, and all precisions that the runtime has on some device.
PROGRAMS: tuple[tuple[str, str, tuple[str, ...], tuple[Precision, ...]], ...] = (
    ("ort", "onnxruntime", (), ("fp32", "fp16", "int8")),
    ("ov", "openvino", (), ("fp32", "bf16", "fp16", "int8")),
    ("native", "native", (), ("bf16", "int8")),
    ("aoti", "aoti", ("--device", "cpu"), ("fp32", "bf16", "fp16")),
    ("aoti", "aoti-cuda", ("--device", "cuda"), ("fp32", "bf16", "fp16")),
    ("ort", "onnxruntime-cuda", ("--provider", "cuda"), ("fp32", "fp16")),
    (
        "ort",
        "onnxruntime-tensorrt",
        ("--provider", "tensorrt"),
        ("fp16", "bf16", "int8", "fp8"),
    ),
    ("torch_trt", "torch-tensorrt", (), ("fp32", "bf16", "fp16")),
    ("trt", "tensorrt", (), get_args(Precision)),
    ("trt", "tensorrt-rtx", ("--flavor", "rtx"), get_args(Precision)),
)
CANDIDATES = tuple(
    Candidate(command, name, precision, flags)
    for command, name, flags, precisions in PROGRAMS
    for precision in precisions
)

RUNTIMES = tuple(dict.fromkeys(candidate.command for candidate in CANDIDATES))


@dataclass(frozen=True)
class AllConfig(ExportConfig):
    """Settings of all exports."""

    # Of one artifact: what is shared by all of them is what --help lists.
    precision: tyro.conf.Suppress[Precision] = "fp32"
    output: tyro.conf.Suppress[Path | None] = None

    only: tuple[str, ...] = ()
    """Commands to run, of ort ov native aoti torch_trt trt; none = all."""

    seconds: float = 4.0
    """Measured time of each artifact, in calls of the images that --batch is tuned for."""

    publish: bool = False
    """Write to reports/published/<date>-<device>/, and all tables there into the README."""

    readme: Path = Path("README.md")

    def __post_init__(self) -> None:
        """Check the limits."""
        super().__post_init__()
        unknown = sorted(set(self.only) - set(RUNTIMES))
        if unknown:
            raise ValueError(f"--only is {' '.join(unknown)}, expected of {', '.join(RUNTIMES)}")
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"--seconds is {self.seconds:g}, expected more than 0")
        if self.precision != "fp32":
            raise ValueError(
                f"--precision is {self.precision}, but all of them are made; "
                "'python export/ort.py --precision ...' and its sisters make one"
            )
        if self.output is not None:
            raise ValueError("--output is one artifact's; all of them go to artifacts/<variant>")


def main(config: AllConfig) -> Summary:
    """Run every export in a process of its own, measure what came out, and point to the fastest.

    Raises:
        CheckpointError: no whole checkpoint.
        PipelineError: not one artifact could be made.
    """
    started_at = datetime.now(UTC)
    if config.publish:
        find_section(config.readme, SECTION)
    source = load_source(config)
    folder = Path("artifacts") / source.variant
    lines: list[Line] = []
    chosen = [c for c in CANDIDATES if not config.only or c.command in config.only]
    for number, candidate in enumerate(chosen, start=1):
        log.info("[%d of %d] %s", number, len(chosen), candidate.title)
        lines.append(_export(candidate, source, config, folder))
    if not any(line.artifact for line in lines):
        raise PipelineError("not one artifact could be made: see the reasons above")
    lines = _with_top1(lines, source, config)
    lines = _with_latency(lines, config)
    default, notes = choose_default(lines)
    if default is not None:
        point_link(folder / DEFAULT_LINK, Path(Path(default).name))
    table = table_of(lines, default)
    log.info("%s", table.aligned_text())
    for note in (*table.notes, *notes):
        log.info("%s", note)
    summary = Summary(
        variant=source.variant,
        image_size=source.image_size,
        batch_size=config.tuned_batch_size,
        environment=current_environment(),
        started_at=started_at,
        lines=tuple(lines),
        default=default,
        notes=tuple(notes),
    )
    if config.publish:
        publish(summary, config.readme)
    return summary


def _export(candidate: Candidate, source: Source, config: AllConfig, folder: Path) -> Line:
    output = folder / f"{candidate.name}-{candidate.precision}"
    command = [
        *(sys.executable, str(PROJECT_ROOT / "export" / f"{candidate.command}.py")),
        *("--checkpoint", str(source.checkpoint), "--output", str(output)),
        *("--precision", candidate.precision, *candidate.flags, *_shared_flags(config)),
    ]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stderr is not None and run.stdout is not None
        text = ""
        try:
            for text_line in run.stderr:
                text += text_line
                sys.stderr.write(f"    {text_line}")
            run.stdout.read()
        except BaseException:
            stop_command(run)
            raise
    if run.returncode != 0:
        reason = reason_of(text) or f"it ended with exit code {run.returncode}, see its log above"
        return Line(
            name=candidate.name, precision=candidate.precision, artifact=None, left_out=reason
        )
    manifest = read_artifact(output, allow_unchecked=True)
    return line_of(candidate.name, output, manifest)


def reason_of(text: str) -> str:
    """Return the message of a command that failed, in one line."""
    found = re.search(r"^error: (.*)", text, re.M)
    if found:
        return found.group(1).replace(f"{PROJECT_ROOT}/", "")
    # A wrong flag's box: its words without the frame.
    inner = re.findall(r"^│ (.*?)\s*│$", text, re.M)
    return re.sub(r"^Error parsing \w+: ", "", " ".join(inner).partition(" ───")[0])


def _with_top1(lines: list[Line], source: Source, config: AllConfig) -> list[Line]:
    try:
        gate = Gate(source, config.num_gate_images, config.max_drop / 100)
    except GateError as error:
        log.info("no top-1: %s", error)
        return lines
    measured: list[Line] = []
    for line in lines:
        if line.artifact is not None and line.left_out is None:
            path = Path(line.artifact)
            found: AccuracyGate = read_artifact(path).gate or gate.measure(open_runtime(path))
            line = line.model_copy(update={"top1": found.top1, "drop": found.drop})
        measured.append(line)
    return measured


def _with_latency(lines: list[Line], config: AllConfig) -> list[Line]:
    paths = [Path(line.artifact) for line in lines if line.artifact and not line.left_out]
    if not paths:
        return lines
    records = measure(paths, config.seconds, NUM_TURNS, config.tuned_batch_size, config.data)
    # Too few calls for a percentile of all are enough for one of each turn.
    found = iter(statistics.median(record.turn_p50_ms) for record in records)
    return [
        line.model_copy(update={"p50_ms": next(found)})
        if line.artifact and not line.left_out
        else line
        for line in lines
    ]


def _shared_flags(config: AllConfig) -> list[str]:
    flags = [
        *("--num-parity-images", str(config.num_parity_images)),
        *("--num-calibration-images", str(config.num_calibration_images)),
        *("--num-gate-images", str(config.num_gate_images)),
        *("--max-drop", str(config.max_drop), "--seed", str(config.seed)),
        *("--batch", *map(str, config.batch)),
    ]
    if config.batches is not None:
        flags += ["--batches", *map(str, config.batches)]
    if config.size is not None:
        flags += ["--size", str(config.size)]
    if config.data is not None:
        flags += ["--data", config.data]
    return flags


if __name__ == "__main__":
    run_command(lambda: parse_flags(AllConfig, __doc__), main)
