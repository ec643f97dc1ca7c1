"""Checkpoint -> what the stock tools make of it, and our times beside theirs."""

import logging
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from efficientnet.formats.artifact import read_manifest
from efficientnet.machine.environment import current_environment, num_usable_cores
from efficientnet.machine.processor import cpu_features
from efficientnet.measuring.turns import ratio
from efficientnet.reporting.publishing import Measured, find_section, publish_part
from efficientnet.reporting.tables import NOTHING, Table, format_ms, format_ratio_and_range
from export.builders.measuring import measure
from export.inputs.reference import Reference, load_reference
from export.inputs.study_config import StockConfig
from export.studies.stock_tools import find_stock_artifacts, make_stock_artifacts

SECTION = "stock"

# What decides which kernels a processor gets.
CPU_FEATURES = frozenset({"avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8"})

log = logging.getLogger(__name__)


class Ratio(BaseModel):
    """Our time over another's: median of the ratios within a turn, and their range."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    program: str
    p50_ms: float | None
    other: str
    ratio: float
    low: float
    high: float


class Comparison(Measured):
    """All ratios of one run."""

    variant: str
    num_threads: int
    cpu_features: tuple[str, ...]
    batch_size: int
    image_size: int
    is_for_time_only: bool = False
    """Whether one of ours may lose any answer: the network is none to be used."""
    ratios: tuple[Ratio, ...]


class Comparisons(BaseModel):
    """Those of all batch sizes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    comparisons: tuple[Comparison, ...]


def main(config: StockConfig) -> Comparisons | str:
    """Make the stock artifacts and measure all programs in turns."""
    if config.publish:
        find_section(config.readme, SECTION)
    reference = load_reference(config.export_config)
    folder = Path("artifacts") / reference.variant / "stock"
    get_stock = find_stock_artifacts if config.made else make_stock_artifacts
    stock = get_stock(reference, config.export_config, folder)
    if not config.paths:
        return "\n".join(map(str, stock))
    found: list[Comparison] = []
    for batch_size in config.batch_sizes:
        found.append(compare(reference, stock, config, batch_size))
        log.info("%s", table_of(found[-1]).aligned_text())
        if config.publish:
            publish(found[-1], config.readme)
    return Comparisons(comparisons=tuple(found))


def compare(
    reference: Reference, stock: Sequence[Path], config: StockConfig, batch_size: int
) -> Comparison:
    """Measure all programs in turns at one batch size."""
    started_at = datetime.now(UTC)
    paths = [reference.checkpoint, *stock, *config.paths]
    records = measure(paths, config.seconds, config.turns, batch_size, config.data)
    # Ours are beside the stock ones, and beside each other.
    names = ["eager", *(path.name for path in (*stock, *config.paths))]
    others = dict(zip(names, records, strict=True))
    ratios: list[Ratio] = []
    for program in names[-len(config.paths) :]:
        own = others[program]
        for name, other in others.items():
            if name == program:
                continue
            found = ratio(own.turn_p50_ms, other.turn_p50_ms)
            ratios.append(
                Ratio(
                    program=program,
                    # Too few calls for a percentile of all are enough for one of each turn.
                    p50_ms=statistics.median(own.turn_p50_ms),
                    other=name,
                    ratio=found.median,
                    low=found.low,
                    high=found.high,
                )
            )
    return Comparison(
        variant=reference.variant,
        num_threads=num_usable_cores(),
        environment=current_environment(),
        cpu_features=tuple(sorted(CPU_FEATURES & cpu_features())),
        started_at=started_at,
        batch_size=batch_size,
        image_size=reference.image_size,
        is_for_time_only=any(read_manifest(path).is_for_time_only for path in config.paths),
        ratios=tuple(ratios),
    )


def publish(comparison: Comparison, readme: Path) -> None:
    """Write a comparison to its place, and all that stand there into docs/results.md."""
    c = comparison
    name = f"stock-{c.variant}-{c.image_size}px-batch-{c.batch_size}.json"
    publish_part(comparison, name, readme, SECTION, section_of)


def section_of(comparison: Comparison) -> str:
    """Write a comparison as Markdown."""
    c, features = comparison, ", ".join(comparison.cpu_features)
    return (
        f"**{c.variant}, {c.image_size} px, batch {c.batch_size}**\n\n"
        f"{table_of(c).markdown()}\n\n"
        f"{c.environment.cpu} ({features}), {c.num_threads} threads, {c.started_at:%Y-%m-%d} UTC. "
        "Ours / theirs: median of the ratios of the medians within a turn, and their range; less "
        "than 1 is faster."
        f"{' Time only: any loss of top-1 was allowed.' if c.is_for_time_only else ''}"
    )


def table_of(comparison: Comparison) -> Table:
    """Lay the ratios out: ours by row, the others by column."""
    ratios = comparison.ratios
    others = list(dict.fromkeys(r.other for r in ratios))
    rows: list[tuple[str, ...]] = []
    for program in dict.fromkeys(r.program for r in ratios):
        own = {r.other: r for r in ratios if r.program == program}
        cells = [
            format_ratio_and_range(r.ratio, r.low, r.high) if (r := own.get(other)) else NOTHING
            for other in others
        ]
        rows.append((program, format_ms(next(iter(own.values())).p50_ms), *cells))
    columns = ("ours / theirs", "p50 ms", *others)
    return Table(columns, tuple(rows), frozenset(columns[:1]))
