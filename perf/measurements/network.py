"""The network against timm's same one, eager on the CPU -> a table of ratios."""

import itertools
import logging
import statistics
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Literal

import timm
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from efficientnet.machine.atomic import write_text
from efficientnet.machine.environment import current_environment, num_usable_cores
from efficientnet.measuring.clock import Call
from efficientnet.measuring.turns import Ratio, TimeBudget, measure_calls, ratio
from efficientnet.network.architectures import peer_of
from efficientnet.network.model import build_model
from efficientnet.network.variants import NetworkOptions, Padding, get_variant
from efficientnet.reporting.publishing import Measured, find_section, publish_record
from efficientnet.reporting.tables import Table, format_ms, format_ratio
from perf.measurements.config import NetworkConfig

Pass = Literal["forward", "forward + backward"]

CONTENDERS = ("ours", "timm", "timm again")

SECTION = "network"
TITLE = "The network beside timm's, eager"

log = logging.getLogger(__name__)


class ComparisonRecord(BaseModel):
    """One row of the table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: str
    padding: Padding
    passes: Pass
    image_size: int
    batch_size: int
    turn_p50_ms: dict[str, tuple[float, ...]] = {}
    """Of each contender, the median of a call in each turn; empty before it is measured."""

    def ratio(self, contender: str) -> Ratio:
        """Return the contender's time over timm's."""
        return ratio(self.turn_p50_ms[contender], self.turn_p50_ms["timm"])

    def p50_ms(self, contender: str) -> float:
        """Return the median over the turns."""
        return statistics.median(self.turn_p50_ms[contender])


class NetworkRecord(Measured):
    """All rows of one run."""

    num_threads: int
    comparisons: tuple[ComparisonRecord, ...]


def main(config: NetworkConfig) -> Path:
    """Measure all rows; return the table's file."""
    if config.publish:
        find_section(config.readme, SECTION)
    started_at, num_threads = datetime.now(UTC), config.threads or num_usable_cores()
    measured: list[ComparisonRecord] = []
    for row in tqdm(rows_of(config), "comparing", unit="row", disable=None):
        measured.append(compare(row, config, num_threads))
        log.info(
            "%s, %s padding, %s: %.2f of timm's time (timm of its own: %.2f)",
            *(row.variant, row.padding, row.passes),
            *(measured[-1].ratio(name).median for name in ("ours", "timm again")),
        )
    record = NetworkRecord(
        started_at=started_at,
        num_threads=num_threads,
        environment=current_environment(),
        comparisons=tuple(measured),
    )
    table = to_markdown(record)
    if config.publish:
        path = publish_record(record, "network.json", config.readme, SECTION, table, TITLE)
        return path.with_suffix(".md")
    write_text(config.output, record.model_dump_json(indent=1) + "\n")
    path = config.output.with_suffix(".md")
    write_text(path, f"# {TITLE}\n\n{table}")
    return path


def rows_of(config: NetworkConfig) -> list[ComparisonRecord]:
    """List the rows: each network and padding, forward and both passes."""
    rows: list[ComparisonRecord] = []
    for name, padding in itertools.product(config.variants, config.paddings):
        spec = get_variant(name)
        shapes: dict[Pass, tuple[int, int]] = {
            "forward": (spec.eval_image_size, 1),
            "forward + backward": (spec.train_image_size, config.train_batch_size),
        }
        rows += [
            ComparisonRecord(
                variant=name, padding=padding, passes=passes, image_size=size, batch_size=batch
            )
            for passes, (size, batch) in shapes.items()
        ]
    return rows


def compare(row: ComparisonRecord, config: NetworkConfig, num_threads: int) -> ComparisonRecord:
    """Let the contenders of a row take turns."""
    openers = {name: partial(open_passes, name, row, num_threads) for name in CONTENDERS}
    turns = measure_calls(openers, TimeBudget(config.seconds, config.turns))
    return row.model_copy(update={"turn_p50_ms": turns})


def to_markdown(record: NetworkRecord) -> str:
    """Write the table and how it was measured."""
    columns = ("variant", "padding", "pass", "px", "batch", "ours ms", "timm ms", "ours / timm")
    columns += ("turns", "timm / timm")
    lines: list[tuple[str, ...]] = []
    for row in record.comparisons:
        ours, noise = row.ratio("ours"), row.ratio("timm again")
        lines.append(
            (
                row.variant,
                row.padding,
                row.passes,
                str(row.image_size),
                str(row.batch_size),
                format_ms(row.p50_ms("ours")),
                format_ms(row.p50_ms("timm")),
                format_ratio(ours.median),
                f"{ours.low:.2f} to {ours.high:.2f}",
                format_ratio(noise.median),
            )
        )
    table = Table(columns, tuple(lines), frozenset(columns[:3]))
    versions = record.environment.libraries
    return (
        f"{table.markdown()}\n\n"
        f"Float32, channels_last, {record.num_threads} threads of {record.environment.processor}, "
        f"torch {versions.get('torch')}, timm {timm.__version__}, "
        f"{record.started_at:%Y-%m-%d} UTC. "
        "Each contender in a process of its own, taking turns; ms: median of the turns' medians; "
        "ours / timm: median of the ratios within a turn, and their range; timm / timm: the same "
        "of a second process with timm's network, which is the noise.\n"
    )


def open_passes(name: str, row: ComparisonRecord, num_threads: int) -> Call:
    """Build a contender's network, in its own process, and what it does with it."""
    torch.set_num_threads(num_threads)
    torch.set_flush_denormal(True)  # noise may make them, and times would be of those
    torch.manual_seed(0)
    spec = get_variant(row.variant)
    if name == "ours":
        model = build_model(spec, 1000, options=NetworkOptions(padding=row.padding))
    else:
        model = timm.create_model(peer_of(row.variant, "timm", row.padding), num_classes=1000)
    model = model.to(memory_format=torch.channels_last)
    shape = (row.batch_size, 3, row.image_size, row.image_size)
    images = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    return _forward(model, images) if row.passes == "forward" else _both(model, images)


def _forward(model: nn.Module, images: Tensor) -> Call:
    model.eval()

    def call() -> Tensor:
        with torch.inference_mode():
            return model(images)

    return call


def _both(model: nn.Module, images: Tensor) -> Call:
    model.train()
    labels = torch.arange(len(images))
    parameters = list(model.parameters())

    def call() -> None:
        cross_entropy(model(images), labels).backward()
        for parameter in parameters:
            parameter.grad = None

    return call
