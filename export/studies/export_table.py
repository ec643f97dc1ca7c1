"""All artifacts of a checkpoint -> one table, the default among them, and what is published."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from efficientnet.formats.artifact import ArtifactManifest
from efficientnet.precision import Precision
from efficientnet.reporting.publishing import Measured, publish_part
from efficientnet.reporting.tables import NOTHING, Table, format_bytes, format_ms, format_percent
from efficientnet.runtimes.names import EXPORTS

SECTION = "exports"
# Of weights that were published by others, trained on ImageNet.
PUBLISHED_WEIGHTS_SECTION = "published-weights"

# To the fastest artifact, beside the others.
DEFAULT_LINK = "default"


class Line(BaseModel):
    """One row of the table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    precision: Precision
    artifact: str | None
    size_bytes: int | None = None
    max_abs_logit_error: float | None = None
    top1: float | None = None
    drop: float | None = None
    drop_low: float | None = None
    drop_high: float | None = None
    """95 % confidence interval of the drop, paired."""
    p50_ms: float | None = None
    kept_blocks: int = 0
    left_out: str | None = None
    """Why there is no artifact, or none that can be run here."""

    @property
    def can_run(self) -> bool:
        """Whether there is something to measure."""
        return self.artifact is not None and self.left_out is None


def line_of(name: str, output: Path, manifest: ArtifactManifest) -> Line:
    """Tell of an artifact what its manifest says."""
    quantization, gate = manifest.quantization, manifest.gate
    return Line(
        name=name,
        precision=manifest.precision,
        artifact=str(output),
        size_bytes=manifest.size_bytes,
        max_abs_logit_error=manifest.parity.max_abs_logit_error if manifest.parity else None,
        top1=gate.top1 if gate else None,
        drop=gate.drop if gate else None,
        drop_low=gate.drop_low if gate else None,
        drop_high=gate.drop_high if gate else None,
        kept_blocks=len(quantization.kept_blocks) if quantization else 0,
        left_out=None if manifest.parity else "built here, to be checked where it can run",
    )


def with_p50(lines: Sequence[Line], p50_ms: Iterable[float]) -> list[Line]:
    """Give the times to those lines that could be measured, in order."""
    times = iter(p50_ms)
    return [
        line.model_copy(update={"p50_ms": next(times)}) if line.can_run else line for line in lines
    ]


class Summary(Measured):
    """The table as JSON."""

    variant: str
    image_size: int
    batch_size: int = 1
    """Images in the calls that were measured."""
    section: str = SECTION
    """Of docs/results.md."""
    num_images: int | None = None
    """Held-out images that top-1 is of; None where that was not recorded."""
    lines: tuple[Line, ...]
    default: str | None
    notes: tuple[str, ...]


def publish(summary: Summary, readme: Path) -> None:
    """Write a table to its place, and all that stand there into docs/results.md."""
    name = f"{summary.section}-{summary.variant}-{summary.image_size}px.json"
    lines = tuple(
        line.model_copy(update={"artifact": _on_any_machine(line.artifact)})
        for line in summary.lines
    )
    default = _on_any_machine(summary.default)
    summary = summary.model_copy(update={"lines": lines, "default": default})
    publish_part(summary, name, readme, summary.section, section_of)


def _on_any_machine(path: str | None) -> str | None:
    # Where a run lies is nobody's business; which it is its last two folders tell.
    return path if path is None or not Path(path).is_absolute() else "/".join(Path(path).parts[-2:])


def section_of(summary: Summary) -> str:
    """Write a table as Markdown."""
    table = table_of(list(summary.lines), summary.default).markdown()
    cpu, cores = summary.environment.processor, summary.environment.num_cores
    images = "" if summary.num_images is None else f"Top-1: on {summary.num_images:,} images. "
    return "\n\n".join(
        [
            f"**{summary.variant}, {summary.image_size} px**",
            table,
            f"{cpu}, {cores} cores, {summary.started_at:%Y-%m-%d} UTC. {images}p50: in turns, at "
            f"batch {summary.batch_size}.",
            *(f"- {note}" for note in summary.notes),
        ]
    )


def choose_default(lines: list[Line]) -> tuple[str | None, list[str]]:
    """Return the fastest artifact, and what is worth saying of the others.

    An int8 or fp8 artifact is slower than one of more bits on some devices, of its own runtime or
    of another on the same device (bf16 on processors with AMX); it is said then.
    """
    timed = sorted((line.p50_ms, i) for i, line in enumerate(lines) if line.p50_ms is not None)
    if not timed:
        return None, []
    fastest = lines[timed[0][1]]
    notes = [f"the default is {fastest.name} {fastest.precision}: {fastest.artifact}"]
    # Device -> the fastest on it of those with more bits.
    best: dict[str, tuple[float, Line]] = {}
    for ms, index in timed:
        line = lines[index]
        device = EXPORTS[line.name].device
        if line.precision not in ("int8", "fp8"):
            best.setdefault(device, (ms, line))
        elif device in best:
            best_ms, other = best[device]
            notes.append(
                f"{line.name} {line.precision} is slower here than {other.name} "
                f"{other.precision} ({ms:.1f} ms against {best_ms:.1f} ms): not worth its rounding"
            )
    return fastest.artifact, notes


def table_of(lines: list[Line], default: str | None) -> Table:
    """Lay the artifacts out; reasons why one was left out are notes, each told once."""
    words = ("runtime", "precision", "default", "left out")
    columns = (*words[:2], "on disk", "logit error", "top-1", "change", "p50 ms", *words[2:])
    reasons = list(dict.fromkeys(line.left_out for line in lines if line.left_out))
    rows = [
        (
            line.name,
            line.precision,
            NOTHING if line.size_bytes is None else format_bytes(line.size_bytes),
            NOTHING if line.max_abs_logit_error is None else f"{line.max_abs_logit_error:.1e}",
            NOTHING if line.top1 is None else format_percent(line.top1, 2),
            _change(line),
            format_ms(line.p50_ms),
            "yes" if line.artifact is not None and line.artifact == default else "",
            f"({reasons.index(line.left_out) + 1})" if line.left_out else "",
        )
        for line in lines
    ]
    notes = tuple(f"({number}) {reason}" for number, reason in enumerate(reasons, start=1))
    return Table(columns, tuple(rows), frozenset(words), notes)


def _change(line: Line) -> str:
    if line.drop is None:
        return NOTHING
    text = f"{0.0 - 100 * line.drop:+.2f}"
    if line.drop_low is None or line.drop_high is None:
        return text
    return f"{text} ({0.0 - 100 * line.drop_high:+.1f} to {0.0 - 100 * line.drop_low:+.1f})"
