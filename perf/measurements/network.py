"""The network against timm's same one, eager on the CPU -> a table of ratios."""

import gc
import logging
import multiprocessing
import signal
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import timm
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from efficientnet.errors import PipelineError
from efficientnet.machine.atomic import write_text
from efficientnet.machine.children import obey_parent
from efficientnet.machine.environment import (
    EnvironmentRecord,
    current_environment,
    num_usable_cores,
)
from efficientnet.measuring.clock import Call, measure_turn, warm_up_until_stable
from efficientnet.network.architectures import peer_of
from efficientnet.network.model import build_model
from efficientnet.network.variants import NetworkOptions, Padding, get_variant
from efficientnet.reporting.publishing import find_section, published_directory, write_section
from efficientnet.reporting.tables import Table, format_ms, format_ratio
from perf.measurements.config import NetworkConfig

Pass = Literal["forward", "forward + backward"]

CONTENDERS = ("ours", "timm", "timm again")

SECTION = "network"

WARM_UP_WINDOW_S = 1.0
WARM_UP_MAX_S = 20.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """One row of the table, before it is measured."""

    variant: str
    padding: Padding
    passes: Pass
    image_size: int
    batch_size: int


class ComparisonRecord(BaseModel):
    """What was measured for one row."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: str
    padding: Padding
    passes: Pass
    image_size: int
    batch_size: int
    turn_p50_ms: dict[str, tuple[float, ...]]
    """Of each contender, the median of a call in each turn."""

    def turn_ratios(self, contender: str) -> list[float]:
        """Return the contender's time over timm's in each turn."""
        pairs = zip(self.turn_p50_ms[contender], self.turn_p50_ms["timm"], strict=True)
        return [own / timm for own, timm in pairs]

    def ratio(self, contender: str) -> float:
        """Return the median of the turns' ratios."""
        return statistics.median(self.turn_ratios(contender))

    def p50_ms(self, contender: str) -> float:
        """Return the median over the turns."""
        return statistics.median(self.turn_p50_ms[contender])


class NetworkRecord(BaseModel):
    """All rows of one run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    started_at: datetime
    num_threads: int
    environment: EnvironmentRecord
    comparisons: tuple[ComparisonRecord, ...]


def main(config: NetworkConfig) -> Path:
    """Measure all rows; return the table's file.

    Raises:
        PublishError: docs/results.md has no place for the table; nothing is measured then.
    """
    if config.publish:
        find_section(config.readme, SECTION)
    rows: list[Comparison] = []
    for name in config.variants:
        spec = get_variant(name)
        for padding in config.paddings:
            eval_size, train_size = spec.eval_image_size, spec.train_image_size
            batch_size = config.train_batch_size
            rows.append(Comparison(name, padding, "forward", eval_size, 1))
            rows.append(Comparison(name, padding, "forward + backward", train_size, batch_size))
    started_at, num_threads = datetime.now(UTC), config.threads or num_usable_cores()
    measured: list[ComparisonRecord] = []
    for row in tqdm(rows, "comparing", unit="row", disable=None):
        measured.append(compare(row, config, num_threads))
        log.info(
            "%s, %s padding, %s: %.2f of timm's time (timm of its own: %.2f)",
            row.variant,
            row.padding,
            row.passes,
            measured[-1].ratio("ours"),
            measured[-1].ratio("timm again"),
        )
    record = NetworkRecord(
        started_at=started_at,
        num_threads=num_threads,
        environment=current_environment(),
        comparisons=tuple(measured),
    )
    path, table = config.output, to_markdown(record)
    if config.publish:
        path = published_directory(started_at, [record.environment]) / "network.json"
        write_section(config.readme, SECTION, table)
    write_text(path, record.model_dump_json(indent=1) + "\n")
    table_path = path.with_suffix(".md")
    write_text(table_path, f"# The network beside timm's, eager\n\n{table}")
    return table_path


def compare(row: Comparison, config: NetworkConfig, num_threads: int) -> ComparisonRecord:
    """Let the contenders of a row take turns."""
    turn_s = config.seconds / config.turns
    medians: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    with ExitStack() as stack:
        contenders = {
            name: stack.enter_context(_Contender(name, row, num_threads)) for name in CONTENDERS
        }
        for contender in contenders.values():
            contender.ask(None)
        for turn in range(config.turns):
            # There and back: a machine that gets slower or faster meanwhile favors nobody.
            order = CONTENDERS if turn % 2 == 0 else CONTENDERS[::-1]
            for name in order:
                medians[name].append(contenders[name].ask(turn_s))
    return ComparisonRecord(
        **vars(row), turn_p50_ms={name: tuple(values) for name, values in medians.items()}
    )


def to_markdown(record: NetworkRecord) -> str:
    """Write the table and how it was measured."""
    columns = ("variant", "padding", "pass", "px", "batch", "ours ms", "timm ms", "ours / timm")
    columns += ("turns", "timm / timm")
    lines: list[tuple[str, ...]] = []
    for row in record.comparisons:
        lines.append(
            (
                row.variant,
                row.padding,
                row.passes,
                str(row.image_size),
                str(row.batch_size),
                format_ms(row.p50_ms("ours")),
                format_ms(row.p50_ms("timm")),
                format_ratio(row.ratio("ours")),
                _range(row, "ours"),
                format_ratio(row.ratio("timm again")),
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


def _range(row: ComparisonRecord, contender: str) -> str:
    ratios = row.turn_ratios(contender)
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


class _Contender:
    # A process that computes only when it is asked to.
    def __init__(self, name: str, row: Comparison, num_threads: int) -> None:
        self._what = f"{name}, {row.variant}, {row.padding} padding, {row.passes}"
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_contend, args=(theirs, name, row, num_threads), daemon=True
        )
        self._process.start()
        theirs.close()

    def __enter__(self) -> "_Contender":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()

    def ask(self, seconds: float | None) -> float:
        """Let it measure for some seconds, or warm up; return the median of a call in ms.

        Raises:
            PipelineError: the process died.
        """
        try:
            self._connection.send(seconds)
            return self._connection.recv()
        except (EOFError, ConnectionError):
            raise PipelineError(f"the process of {self._what} {self._epitaph()}") from None

    def _epitaph(self) -> str:
        self._process.join()
        code = self._process.exitcode or 0
        if code < 0:
            hint = "; the machine may be out of memory" if -code == signal.SIGKILL else ""
            return f"was ended by {signal.Signals(-code).name}{hint}"
        return f"ended with exit code {code}; what it said stands above"


def _contend(connection: Connection, name: str, row: Comparison, num_threads: int) -> None:
    obey_parent()
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
    call = _forward(model, images) if row.passes == "forward" else _both(model, images)
    gc.disable()
    clock = time.perf_counter_ns
    while True:
        try:
            seconds: float | None = connection.recv()
        except EOFError:
            return
        if seconds is None:
            warm_up_until_stable(call, clock, WARM_UP_WINDOW_S, WARM_UP_MAX_S)
            connection.send(0.0)
        else:
            connection.send(statistics.median(measure_turn(call, clock, seconds).samples_ms))


def _forward(model: nn.Module, images: Tensor) -> Call:
    model.eval()

    def call() -> Tensor:
        with torch.inference_mode():
            return model(images)

    return call


def _both(model: nn.Module, images: Tensor) -> Call:
    model.train()
    labels = torch.arange(len(images))
    parameters: Sequence[nn.Parameter] = list(model.parameters())

    def call() -> None:
        cross_entropy(model(images), labels).backward()
        for parameter in parameters:
            parameter.grad = None

    return call
