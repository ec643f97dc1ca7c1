"""Records of training steps -> a table of each run, also beside timm's, published."""

import logging
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from efficientnet.formats.records import TrainingSpeedRecord, read_records
from efficientnet.machine.atomic import write_text
from efficientnet.measuring.turns import Ratio, ratio
from efficientnet.reporting.publishing import find_section, published_directory, write_section
from efficientnet.reporting.tables import (
    NOTHING,
    Table,
    format_bytes,
    format_ms,
    format_percent,
    format_rate,
    format_ratio,
)
from training.studies.speed_plan import TIMM

Run = Sequence[TrainingSpeedRecord]

SECTION = "training-speed"

log = logging.getLogger(__name__)


def publish(records: Run, readme: Path) -> Path:
    """Add a run to what is published of this day and device, in the place of one like it."""
    find_section(readme, SECTION)
    directory = published_directory(records[0].started_at, [records[0].environment])
    path = directory / "training-speed.jsonl"
    older = [
        run
        for run in runs_of(read_records(path, TrainingSpeedRecord))
        if (title_of(run), _sizes(run)) != (title_of(records), _sizes(records))
    ]
    every = [record for run in (*older, records) for record in run]
    text = document(every, as_markdown=True)
    write_text(path, "".join(f"{record.model_dump_json()}\n" for record in every))
    write_text(directory / "training-speed.md", f"# Speed of a training step\n\n{text}\n")
    write_section(readme, SECTION, text, [record.environment for record in every])
    log.info("published: %s, and the tables in %s", directory, readme)
    return directory


def runs_of(records: Sequence[TrainingSpeedRecord]) -> list[Run]:
    """Group records by the run of the command that they are of."""
    runs: dict[datetime, list[TrainingSpeedRecord]] = {}
    for record in records:
        runs.setdefault(record.started_at, []).append(record)
    return [tuple(run) for run in runs.values()]


def _sizes(run: Run) -> set[tuple[int, int]]:
    return {(record.image_size, record.micro_batch_size) for record in run}


def title_of(run: Run) -> str:
    """Say what a run is about; a newer one of the same title takes its place."""
    first = run[0]
    settings = f"{first.precision}{', compiled' if first.is_compiled else ''}"
    if first.table == 2:
        return f"Table 2 of the paper's first version: EfficientNet-B6, {settings}"
    if first.table == 3:
        return f"Table 3 of the paper: EfficientNet-B4 with fused stages, {settings}"
    if len({record.contender for record in run}) > 1:
        return f"{first.variant} beside timm's training step, {settings}"
    data = dict.fromkeys(r.data for r in run if r.is_loader_fed)
    return f"{first.variant}, {settings}{''.join(f', images of {name}' for name in data)}"


def document(records: Sequence[TrainingSpeedRecord], as_markdown: bool) -> str:
    """Write each run's title, table, and how it was measured."""
    parts: list[str] = []
    for run in runs_of(records):
        table = _table(run)
        if as_markdown:
            parts += [f"**{title_of(run)}**", table.markdown(), _how(run)]
        else:
            parts += [title_of(run), table.aligned_text(), _how(run)]
    return "\n\n".join(parts)


def _table(run: Run) -> Table:
    has_peer = len({record.contender for record in run}) > 1
    has_loader = any(record.is_loader_fed for record in run)
    has_variants = len({record.variant for record in run}) > 1
    columns = ["variant"] * has_variants
    columns += ["px", "batch", "images/s", "step p50 ms", "memory", "of device", "of peak"]
    columns += ["compile s"] * run[0].is_compiled + ["fed by", "of synthetic"] * has_loader
    columns += ["step of", "x timm", "turns"] * has_peer
    lines: list[tuple[str, ...]] = []
    for record in run:
        line = [record.variant] * has_variants
        line += [str(record.image_size), str(record.micro_batch_size), _speed(record.images_per_s)]
        line += [format_ms(record.step_p50_ms), *_memory(record)]
        line.append(NOTHING if record.mfu is None else format_percent(record.mfu))
        if record.is_compiled:
            line.append(NOTHING if record.compile_s is None else f"{record.compile_s:.0f}")
        if has_loader:
            share = _ratio(record.images_per_s, _synthetic(run, record).images_per_s)
            fed = "loader" if record.is_loader_fed else "synthetic"
            is_told = record.is_loader_fed and share is not None
            line += [fed, format_percent(share or 0) if is_told else NOTHING]
        if has_peer:
            found = timms_ratio(run, record)
            spread = f"{found.low:.2f} to {found.high:.2f}" if found else NOTHING
            line += [record.contender, format_ratio(found.median if found else None)]
            line.append(NOTHING if record.contender == TIMM else spread)
        lines.append(tuple(line))
    return Table(tuple(columns), tuple(lines), frozenset({"variant", "fed by", "step of"}))


def timms_ratio(run: Run, record: TrainingSpeedRecord) -> Ratio | None:
    """Compare timm's times with a contender's, turn by turn; None without both."""
    for peer in run:
        if peer.contender == TIMM and _shape(peer) == _shape(record):
            own, timms = record.turn_p50_ms, peer.turn_p50_ms
            return ratio(timms, own) if own and timms else None
    return None


def _synthetic(run: Run, record: TrainingSpeedRecord) -> TrainingSpeedRecord:
    same = [r for r in run if _shape(r) == _shape(record) and not r.is_loader_fed]
    return same[0] if same else record


def _shape(record: TrainingSpeedRecord) -> tuple[str, int, int]:
    return record.variant, record.image_size, record.micro_batch_size


def _speed(images_per_s: float | None) -> str:
    return "OOM" if images_per_s is None else format_rate(images_per_s)


def _ratio(value: float | None, reference: float | None) -> float | None:
    return None if value is None or reference is None else value / reference


def _memory(record: TrainingSpeedRecord) -> list[str]:
    measured, predicted = record.peak_memory_bytes, record.predicted_memory_bytes
    num_bytes = predicted if measured is None else measured
    if num_bytes is None:
        return [NOTHING, NOTHING]
    share = format_percent(num_bytes / record.device_memory_bytes, 0)
    about = "~" if measured is None else ""
    return [about + format_bytes(num_bytes), about + share]


def _how(run: Run) -> str:
    first = run[0]
    environment = first.environment
    device = environment.gpus[0] if environment.gpus else environment.processor
    versions = [f"torch {environment.libraries.get('torch')}"]
    versions += dict.fromkeys(f"timm {r.contender_version}" for r in run if r.contender_version)
    peak = first.device_peak or "unknown"
    text = (
        f"{device}, {first.num_threads} CPU threads, {', '.join(versions)}, "
        f"{first.started_at:%Y-%m-%d} UTC. Each row in a process of its own, channels_last, "
        f"{first.num_classes} classes; memory: peak while steps counted, ~ predicted; of peak: "
        f"operations of three forward passes per image, as a share of the device's {peak}."
    )
    if any(record.is_loader_fed for record in run):
        text += f" The loader has {max(record.num_workers for record in run)} worker processes."
    if len({record.contender for record in run}) > 1:
        text += (
            " Processes take turns; x timm: how many times timm's speed, median of the ratios of "
            "step p50 within a turn, and their range; for timm again it is the noise."
        )
    return text
