"""Checkpoint -> every artifact that this machine can make, one table of them, and the default."""

import logging
import re
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from efficientnet import PROJECT_ROOT
from efficientnet.errors import PipelineError
from efficientnet.formats.artifact import MANIFEST_FILE, AccuracyGate, read_artifact
from efficientnet.images.datasets import SAMPLE_PHOTOS
from efficientnet.machine.atomic import point_link
from efficientnet.machine.children import stop_command
from efficientnet.machine.environment import current_environment
from efficientnet.reporting.publishing import find_section
from efficientnet.runtimes import open_runtime
from export.builders.measuring import measure
from export.checks.gate import Gate, GateError, is_labelled
from export.inputs.candidates import CANDIDATES, Candidate
from export.inputs.reference import Reference, load_reference
from export.inputs.study_config import AllConfig
from export.studies.export_table import (
    DEFAULT_LINK,
    PUBLISHED_WEIGHTS_SECTION,
    SECTION,
    Line,
    Summary,
    choose_default,
    line_of,
    publish,
    table_of,
)

NUM_TURNS = 6

EAGER = "eager"

log = logging.getLogger(__name__)


def main(config: AllConfig) -> Summary:
    """Run every export in a process of its own, measure what came out, and point to the fastest."""
    started_at = datetime.now(UTC)
    reference = load_reference(config)
    is_published = reference.record.data == SAMPLE_PHOTOS
    section = PUBLISHED_WEIGHTS_SECTION if is_published else SECTION
    if config.publish:
        find_section(config.readme, section)
    folder = Path("artifacts") / reference.variant
    lines: list[Line] = []
    chosen = [c for c in CANDIDATES if not config.only or c.command in config.only]
    for number, candidate in enumerate(chosen, start=1):
        log.info("[%d of %d] %s", number, len(chosen), candidate.title)
        lines.append(_export(candidate, reference, config, folder))
    if not any(line.artifact for line in lines):
        raise PipelineError("not one artifact could be made: see the reasons above")
    eager = Line(name=EAGER, precision="fp32", artifact=str(reference.checkpoint))
    lines, num_images = _with_top1([eager, *lines], reference, config)
    eager, *lines = _with_latency(lines, config)
    default, notes = choose_default(lines)
    if num_images is not None and not is_labelled(reference):
        notes.append("images without labels: top-1 is the share that is answered as by eager")
    if default is not None:
        point_link(folder / DEFAULT_LINK, Path(Path(default).name))
    lines = [eager, *lines]
    table = table_of(lines, default)
    log.info("%s", table.aligned_text())
    for note in (*table.notes, *notes):
        log.info("%s", note)
    summary = Summary(
        variant=reference.variant,
        image_size=reference.image_size,
        batch_size=config.tuned_batch_size,
        environment=current_environment(),
        started_at=started_at,
        section=section,
        num_images=num_images,
        lines=tuple(lines),
        default=default,
        notes=tuple(notes),
    )
    if config.publish:
        publish(summary, config.readme)
    return summary


def _export(candidate: Candidate, reference: Reference, config: AllConfig, folder: Path) -> Line:
    output = folder / f"{candidate.name}-{candidate.precision}"
    command = [
        *(sys.executable, str(PROJECT_ROOT / "export" / f"{candidate.command}.py")),
        *("--checkpoint", str(reference.checkpoint), "--output", str(output)),
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


def _with_top1(
    lines: list[Line], reference: Reference, config: AllConfig
) -> tuple[list[Line], int | None]:
    try:
        gate = Gate(reference, config.num_gate_images, config.max_drop / 100)
    except GateError as error:
        log.info("no top-1: %s", error)
        return lines, None
    measured: list[Line] = []
    num_images = None
    for line in lines:
        if line.artifact is not None and line.left_out is None:
            found = _top1_of(Path(line.artifact), gate)
            num_images = found.num_images
            update: dict[str, object] = {"top1": found.top1}
            if line.name != EAGER:
                update |= {"drop": found.drop}
                update |= {"drop_low": found.drop_low, "drop_high": found.drop_high}
            line = line.model_copy(update=update)
        measured.append(line)
    return measured, num_images


def _top1_of(path: Path, gate: Gate) -> AccuracyGate:
    measured = read_artifact(path).gate if (path / MANIFEST_FILE).is_file() else None
    return measured or gate.measure(open_runtime(path))


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
