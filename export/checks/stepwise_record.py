"""What stepwise parity found -> its record, its table, and the first step that breaks."""

from pydantic import BaseModel, ConfigDict

from efficientnet.formats.artifact import AccuracyGate, ParityRecord
from efficientnet.precision import Precision
from efficientnet.reporting.tables import NOTHING, Table, format_percent
from export.checks.layers import LayersRecord, tables_of

REFERENCE = "eager fp32"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ParityStepRecord(_Frozen):
    """One step, compared with the eager model."""

    name: str
    parity: ParityRecord | None = None
    """None where it was skipped. Errors that are not finite are null in JSON."""
    problem: str | None = None
    """What exceeds the tolerances; None when nothing does."""
    skipped: str | None = None
    """Why it could not be run here."""


class StepwiseParityRecord(_Frozen):
    """All steps of one artifact."""

    artifact: str
    """Its directory."""
    program_sha256: str
    checkpoint_sha256: str
    variant: str
    runtime: str
    precision: Precision
    image_size: int
    """Pixels."""
    steps: tuple[ParityStepRecord, ...]
    """The steps, from the eager model's side to the artifact, which is the last."""
    first_broken: str | None
    """Name of the first that breaks; None when none does."""
    layers: LayersRecord | None = None
    """With --layers."""
    gate: AccuracyGate | None = None
    """Of a quantised artifact that was not checked before."""
    is_completed: bool = False
    """Whether the artifact was not checked before, passed, and is accepted by all from now on."""


def table_of(record: StepwiseParityRecord) -> Table:
    """Lay the steps out, one a row."""
    columns = (
        "step",
        "largest error",
        "mean error",
        "allowed",
        "top-1 agreement",
        "flips",
        "that count",
        "verdict",
    )
    rows = [(REFERENCE, *(NOTHING,) * 6, "the reference")]
    for step in record.steps:
        parity = step.parity
        if parity is None:
            rows.append((step.name, *(NOTHING,) * 6, f"skipped: {step.skipped}"))
            continue
        num_counted = round((1 - parity.top1_agreement) * parity.num_images)
        rows.append(
            (
                step.name,
                f"{parity.max_abs_logit_error:.1e}",
                f"{parity.mean_abs_logit_error:.1e}",
                f"{parity.tolerances.max_abs_logit_error:.1e}",
                format_percent(1 - parity.num_flips / parity.num_images),
                str(parity.num_flips),
                str(num_counted),
                "agrees" if step.problem is None else "breaks",
            )
        )
    return Table(columns, tuple(rows), frozenset({"step", "verdict"}))


def report_of(record: StepwiseParityRecord) -> str:
    """Write the table, which step is the first to break, and the layers."""
    lines = [
        f"{record.artifact}: logits against the eager model's",
        table_of(record).aligned_text(),
    ]
    artifact = record.steps[-1].parity
    if artifact is not None and any(r.parity and r.parity.num_flips for r in record.steps):
        lines.append(
            "a flip counts where the eager model prefers its own class by more than "
            f"{artifact.tolerances.flip_margin:.1e} (for the artifact)"
        )
    broken = next((r for r in record.steps if r.name == record.first_broken), None)
    if broken is not None:
        lines.append(f"the first step that breaks: {broken.name}: {broken.problem}")
    if record.layers is not None:
        lines.append(tables_of(record.layers))
    return "\n".join(lines)
