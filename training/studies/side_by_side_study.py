"""Finished runs of one recipe -> how far each came after each epoch, side by side."""

import logging
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict

from efficientnet.errors import PipelineError
from efficientnet.formats.checkpoint import read_checkpoint
from efficientnet.images.datasets import data_name
from efficientnet.reporting.publishing import Measured, find_section, publish_part
from efficientnet.reporting.tables import NOTHING, Table, format_percent
from training.running.metrics import read_metrics
from training.studies.config import SideBySideConfig

SECTION = "fine-tuning"

log = logging.getLogger(__name__)


class SideBySideError(PipelineError):
    """Runs that cannot be compared."""


class Epoch(BaseModel):
    """Of a line of metrics.jsonl what is compared."""

    model_config = ConfigDict(frozen=True)

    epoch: int
    top1: float
    elapsed_s: float


class Curve(BaseModel):
    """One run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    start: str | None
    """What its weights began as; None = from scratch."""
    learning_rate: float
    epochs: tuple[Epoch, ...]


class SideBySide(Measured):
    """All runs."""

    variant: str
    data: str
    image_size: int
    num_images: int
    """Held-out images."""
    curves: tuple[Curve, ...]


def main(config: SideBySideConfig) -> SideBySide:
    """Read the runs, print their table, and publish it when asked."""
    if config.publish:
        find_section(config.readme, SECTION)
    records = [read_checkpoint(run / "checkpoint") for run in config.runs]
    for field in ("variant", "data", "num_images_evaluated"):
        if len({getattr(record, field) for record in records}) > 1:
            raise SideBySideError(
                f"the runs differ in {field.replace('_', ' ')}: nothing to compare"
            )
    first = records[0]
    found = SideBySide(
        environment=first.environment,
        started_at=datetime.now(UTC),
        variant=first.variant,
        data=data_name(first.data),
        image_size=first.preprocess.image_size,
        num_images=first.num_images_evaluated,
        curves=tuple(
            Curve(
                name=run.name,
                start=record.train_config.get("weights"),
                learning_rate=record.train_config["optimizer"]["learning_rate"],
                epochs=tuple(
                    Epoch(epoch=epoch.epoch, top1=epoch.top1, elapsed_s=epoch.elapsed_s)
                    for epoch in read_metrics(run)
                ),
            )
            for run, record in zip(config.runs, records, strict=True)
        ),
    )
    log.info("%s", table_of(found).aligned_text())
    if config.publish:
        name = f"{SECTION}-{found.variant}-{found.data}.json"
        publish_part(found, name, config.readme, SECTION, section_of)
    return found


def section_of(found: SideBySide) -> str:
    """Write the comparison as Markdown."""
    starts = "; ".join(
        f"{curve.name}: {curve.start or 'random weights'}, learning rate {curve.learning_rate:g}"
        for curve in found.curves
    )
    return (
        f"**{found.variant} on {found.data}, {found.image_size} px**\n\n"
        f"{table_of(found).markdown()}\n\n"
        f"Top-1 of the averaged weights on {found.num_images:,} held-out images, and seconds since "
        f"the start. {starts}. {found.environment.cpu}, {found.environment.num_cores} cores, "
        f"{found.started_at:%Y-%m-%d} UTC."
    )


def table_of(found: SideBySide) -> Table:
    """Lay the runs out by column and epochs by row."""
    rows: list[tuple[str, ...]] = []
    for index in range(max(len(curve.epochs) for curve in found.curves)):
        cells = [str(index + 1)]
        for curve in found.curves:
            epoch = curve.epochs[index] if index < len(curve.epochs) else None
            cells.append(
                f"{format_percent(epoch.top1)} ({epoch.elapsed_s:.0f} s)" if epoch else NOTHING
            )
        rows.append(tuple(cells))
    return Table(("epoch", *(curve.name for curve in found.curves)), tuple(rows))
