"""Checkpoint -> what folding batch norm and fusing squeeze-excite bring, runtime by runtime."""

import logging
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from efficientnet.images.datasets import data_name
from efficientnet.machine.environment import current_environment
from efficientnet.reporting.publishing import Measured, find_section, publish_record
from efficientnet.reporting.tables import NOTHING, Table, format_ms, format_ratio
from export.graphs.fusable_parts import FusedPart
from export.graphs.fusion_forms import FORMS
from export.inputs.reference import load_reference
from export.inputs.study_config import AblationConfig
from export.studies.ablation_rows import FormRecord, measure_forms

SECTION = "fusion"
TITLE = "What folding batch norm and fusing squeeze-excite bring"

log = logging.getLogger(__name__)


class AblationRecord(Measured):
    """All rows of one run."""

    format_version: Literal[1] = 1
    variant: str
    image_size: int
    """Pixels."""
    checkpoint_sha256: str
    num_parity_images: int
    data: str
    seconds: float
    """Measured for each row."""
    rows: tuple[FormRecord, ...]


def main(config: AblationConfig) -> AblationRecord:
    """Make and measure all forms; return the record."""
    if config.publish:
        find_section(config.readme, SECTION)
    started_at = datetime.now(UTC)
    export_config = config.export_config
    reference = load_reference(export_config)
    rows: list[FormRecord] = []
    with ExitStack() as stack:
        scratch = config.output or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for number, runtime in enumerate(config.runtimes, start=1):
            log.info("[%d of %d] %s", number, len(config.runtimes), runtime)
            folder = scratch / runtime
            rows += measure_forms(
                runtime, reference, export_config, config.seconds, config.turns, folder
            )
    record = AblationRecord(
        variant=reference.variant,
        image_size=reference.image_size,
        checkpoint_sha256=reference.record.weights_sha256,
        num_parity_images=config.num_parity_images,
        data=data_name(reference.dataset.source),
        seconds=config.seconds,
        environment=current_environment(),
        started_at=started_at,
        rows=tuple(rows),
    )
    log.info("%s", "\n".join([table_of(rows).aligned_text(), *fused_part_lines(rows)]))
    if config.publish:
        publish_record(
            record, f"{SECTION}.json", config.readme, SECTION, to_markdown(record), TITLE
        )
    return record


def table_of(rows: Sequence[FormRecord]) -> Table:
    """Lay out the forms of each runtime; a runtime that is not here gets one line."""
    columns = ("runtime", "form", "p50 ms", "ratio", "range", "logit error", "executed", "gain")
    lines: list[tuple[str, ...]] = []
    for row in rows:
        if row.reason is not None:
            if row.form == "nothing":
                lines.append((row.runtime, "all", *[NOTHING] * 5, row.verdict))
            continue
        assert row.max_abs_logit_error is not None and row.executed is not None
        low, high = min(row.turn_ratios), max(row.turn_ratios)
        is_base = row.form == "nothing"
        lines.append(
            (
                row.runtime,
                FORMS[row.form],
                format_ms(row.p50_ms),
                format_ratio(statistics.median(row.turn_ratios)),
                NOTHING if is_base else f"{format_ratio(low)} to {format_ratio(high)}",
                f"{row.max_abs_logit_error:.1e}",
                str(row.executed.num_nodes),
                row.verdict or NOTHING,
            )
        )
    return Table(columns, tuple(lines), frozenset({"runtime", "form", "gain"}))


def fused_part_lines(rows: Iterable[FormRecord]) -> list[str]:
    """Tell for each runtime which executed nodes do the adds, gates and SiLUs of the last form."""
    return [
        f"{row.runtime}: {'; '.join(map(_part_line, row.executed.fates))}"
        for row in rows
        if row.form == "fused" and row.executed is not None
    ]


def _part_line(part: FusedPart) -> str:
    where = ", ".join(f"{n} in {kind}" for kind, n in part.executed_by.items())
    return f"{part.part} ({part.total}): {where or NOTHING}"


def to_markdown(record: AblationRecord) -> str:
    """Write the table, what became of the parts, and how it was measured."""
    versions = record.environment.libraries
    names = ("torch", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt-cu13")
    libraries = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
    devices = [gpu.partition(",")[0] for gpu in record.environment.gpus]
    cores = f"{record.environment.num_cores} cores of {record.environment.processor}"
    parts = "\n".join(f"- {line}" for line in fused_part_lines(record.rows))
    return (
        f"{table_of(record.rows).markdown()}\n\n"
        "What became of the parts of the network in the last form, by the kind of node, kernel or "
        f"operator that computes them:\n\n{parts}\n\n"
        f"{record.variant} at {record.image_size} px, batch 1, fp32, "
        f"{', '.join([*devices, cores])}, {libraries}, {record.started_at:%Y-%m-%d} UTC. "
        "Each form in a process of its own, taking turns within its runtime; ms: median of the "
        f"turns' medians, {record.seconds:g} s each; ratio: median of the ratios to 'nothing' "
        "within a turn, and their range, which is 'no gain' where 1 is in it; logit error: the "
        f"largest against the eager model, on {record.num_parity_images} held-out images; "
        "executed: nodes in ONNX Runtime's profile of the optimized session, in OpenVINO's runtime "
        "model, kernels that AOTInductor's code calls, layers of TensorRT's engine, operators that "
        "are not views in eager torch.\n"
    )
