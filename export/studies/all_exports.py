"""Checkpoint -> every artifact that this machine can make, one table of them, and the default."""

import logging
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from efficientnet import PROJECT_ROOT
from efficientnet.errors import PipelineError
from efficientnet.formats.artifact import read_artifact
from efficientnet.images.datasets import SAMPLE_PHOTOS
from efficientnet.machine.atomic import point_link
from efficientnet.machine.children import stop_command
from efficientnet.machine.environment import current_environment
from efficientnet.precision import Precision
from efficientnet.reporting.publishing import find_section
from efficientnet.runtimes import names, open_runtime
from export.builders.measuring import measure
from export.checks.gate import Gate, GateError, is_labelled
from export.inputs.config import ExportConfig, flags_of
from export.inputs.reference import Reference, load_reference
from export.inputs.study_config import AllConfig
from export.studies import export_table
from export.studies.export_table import Line

NUM_TURNS = 6

EAGER = "eager"

# Command, kind of artifact, precision; those for the CPU first.
CANDIDATES: tuple[tuple[str, names.Export, Precision], ...] = tuple(
    (row.command, kind, precision)
    for device in ("cpu", "cuda")
    for row in names.RUNTIMES.values()
    for kind in row.exports
    if kind.device == device
    for precision in kind.precisions
)

log = logging.getLogger(__name__)


def main(config: AllConfig) -> export_table.Summary:
    """Run every export in a process of its own, measure what came out, and point to the fastest."""
    started_at = datetime.now(UTC)
    reference = load_reference(config)
    is_published = reference.record.data == SAMPLE_PHOTOS
    section = export_table.PUBLISHED_WEIGHTS_SECTION if is_published else export_table.SECTION
    if config.publish:
        find_section(config.readme, section)
    chosen = [one for one in CANDIDATES if not config.only or one[0] in config.only]
    lines = [Line(name=EAGER, precision="fp32", artifact=str(reference.checkpoint))]
    for number, candidate in enumerate(chosen, start=1):
        lines.append(_export(*candidate, reference, config, f"[{number} of {len(chosen)}]"))
    if not any(line.artifact for line in lines[1:]):
        raise PipelineError("not one artifact could be made: see the reasons above")
    num_images: int | None = None
    try:
        gate = Gate(reference, config.num_gate_images, config.max_drop / 100)
        num_images = gate.num_images
        lines = [_with_top1(line, gate) for line in lines]
    except GateError as error:
        log.info("no top-1: %s", error)
    lines = _with_latency(lines, config)
    default, notes = export_table.choose_default(lines[1:])
    if num_images is not None and not is_labelled(reference):
        notes.append("images without labels: top-1 is the share that is answered as by eager")
    if default is not None:
        point_link(_folder(reference) / export_table.DEFAULT_LINK, Path(Path(default).name))
    table = export_table.table_of(lines, default)
    log.info("%s", "\n".join((table.aligned_text(), *table.notes, *notes)))
    summary = export_table.Summary(
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
        export_table.publish(summary, config.readme)
    return summary


def _folder(reference: Reference) -> Path:
    return Path("artifacts") / reference.variant


def _export(
    command: str,
    kind: names.Export,
    precision: Precision,
    reference: Reference,
    config: AllConfig,
    place: str,
) -> Line:
    log.info("%s %s %s", place, kind.name, precision)
    output = _folder(reference) / f"{kind.name}-{precision}"
    shared: dict[str, Any] = {f.name: getattr(config, f.name) for f in fields(ExportConfig)}
    shared |= {"checkpoint": reference.checkpoint, "output": output}
    made_of = ExportConfig(**shared)
    words = [
        *(sys.executable, str(PROJECT_ROOT / "export" / f"{command}.py"), *flags_of(made_of)),
        *("--precision", precision, *kind.flags),
    ]
    with subprocess.Popen(
        words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as run:
        assert run.stderr is not None
        text = ""
        try:
            for text_line in run.stderr:
                text += text_line
                sys.stderr.write(f"    {text_line}")
        except BaseException:
            stop_command(run)
            raise
    if run.returncode != 0:
        reason = reason_of(text) or f"it ended with exit code {run.returncode}, see its log above"
        return Line(name=kind.name, precision=precision, artifact=None, left_out=reason)
    manifest = read_artifact(output, allow_unchecked=True)
    return export_table.line_of(kind.name, output, manifest)


def reason_of(text: str) -> str:
    """Return the message of a command that failed, in one line."""
    found = re.search(r"^error: (.*)", text, re.M)
    if found:
        return found.group(1).replace(f"{PROJECT_ROOT}/", "")
    # A wrong flag's box: its words without the frame.
    inner = re.findall(r"^│ (.*?)\s*│$", text, re.M)
    return re.sub(r"^Error parsing \w+: ", "", " ".join(inner).partition(" ───")[0])


def _with_top1(line: Line, gate: Gate) -> Line:
    # int8 and fp8 were judged when they were made.
    if not line.can_run or line.artifact is None or line.top1 is not None:
        return line
    found = gate.measure(open_runtime(line.artifact))
    update: dict[str, object] = {"top1": found.top1}
    if line.name != EAGER:
        update |= {name: getattr(found, name) for name in ("drop", "drop_low", "drop_high")}
    return line.model_copy(update=update)


def _with_latency(lines: Sequence[Line], config: AllConfig) -> list[Line]:
    paths = [Path(str(line.artifact)) for line in lines if line.can_run]
    records = measure(paths, config.seconds, NUM_TURNS, config.tuned_batch_size, config.data)
    # Too few calls for a percentile of all are enough for one of each turn.
    return export_table.with_p50(lines, [statistics.median(r.turn_p50_ms) for r in records])
