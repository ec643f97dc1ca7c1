"""A table of the paper -> its rows measured on this device, or why not, as record and Markdown."""

import logging
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict

from efficientnet.errors import PipelineError
from efficientnet.formats.records import LatencyRecord, Record, TrainingSpeedRecord
from efficientnet.machine.atomic import write_text
from efficientnet.machine.environment import current_environment, num_usable_cores
from efficientnet.measuring.clock import Turn
from efficientnet.measuring.contender import Contender, ContenderError, running
from efficientnet.measuring.peaks import cpu_peaks, gpu_peak
from efficientnet.measuring.turns import TimeBudget
from efficientnet.network.cost import DevicePeak, latency_floor_ms, network_cost
from efficientnet.network.variants import get_variant
from efficientnet.reporting.publishing import (
    Measured,
    device_slug,
    find_section,
    publish_part,
    read_all,
)
from efficientnet.reporting.tables import NOTHING, Table, format_ms, format_percent, format_rate
from efficientnet.runtimes.names import EAGER_RUNTIME, RUNTIMES, title
from perf.measurements.scenarios import SINGLE_STREAM
from perf.studies import paper_tables
from perf.studies.config import PaperConfig
from perf.studies.paper_network import open_row
from perf.studies.paper_tables import DEVICE_CLASS, PRECISION, TABLES, TIMM, PaperRow, PaperTable

SECTION = "paper"

# Whose latency in fp32 a table tells on a CPU, measured or not; others stand beside them if they
# were measured.
CPU_RUNTIMES = (EAGER_RUNTIME, "onnxruntime", "openvino")

TURNS = 5

# NVIDIA's own run on the paper's device was 3 to 9 % slower than the paper.
BAND = 0.10

PAPER_GPU = "V100 SXM2"

# Label, image size and batch size.
RowKey = tuple[str, int, int | None]

log = logging.getLogger(__name__)


class PaperTimes(BaseModel):
    """What was measured of a row."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: str
    samples_ms: tuple[tuple[float, ...], ...]
    """Of each turn, every call."""
    elapsed_s: float


class RuntimeLatency(BaseModel):
    """Time of one image by a program of the row's network, of a record of perf/latency.py."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime: str
    precision: str
    ms: float
    """Median of the turns' medians, host memory to host memory."""
    started_at: AwareDatetime
    """The programs of one run have the same, and took turns."""


class RowRecord(BaseModel):
    """A row: what the paper prints, and what was measured here."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str
    network: str | None
    image_size: int
    batch_size: int | None
    paper: float | None
    """In the table's unit."""
    ours: float | None
    """The same, eager; None: not measured."""
    times: PaperTimes | None
    why_not: str | None
    """Why it was not measured."""
    artifact: str | None
    """The best artifact of the same variant, image and batch size that was measured here."""
    artifact_value: float | None
    projected: float | None
    """What the cost model makes of `ours` on the paper's device: no measurement."""
    latencies: tuple[RuntimeLatency, ...] = ()
    """The newest of each program, of a table that has them."""


class PaperError(PipelineError):
    """A run that cannot go on with an earlier one."""


class PaperRecord(Measured):
    """A table of the paper and what stands beside it."""

    table: paper_tables.TableName
    unit: str
    device: str
    precision: str
    num_threads: int
    seconds: float | None = None
    """Measured time of each row; None: of a record older than this field."""
    rows: tuple[RowRecord, ...]


def main(config: PaperConfig) -> Path:
    """Measure the rows one after the other; return the path of the table as Markdown.

    The record is written after each row, so that a run that is ended can be resumed.

    Raises:
        PaperError: there is nothing to resume, or it is of another machine or other settings.
        PublishError: docs/results.md has no place for the table; nothing is measured then.
    """
    if config.publish:
        find_section(config.readme, SECTION)
    table = TABLES[config.table]
    here = current_environment()
    num_threads = config.threads or num_usable_cores()
    on_gpu = bool(here.gpus)
    expected = "fp16" if on_gpu else "fp32"
    device = here.gpus[0].partition(",")[0] if on_gpu else here.processor
    asked = [row for row in table.rows if _is_asked(row, config.rows)]
    if not asked:
        raise ValueError(
            f"--rows {' '.join(config.rows)}: table {config.table} has none of them; it has "
            f"{', '.join(row.label for row in table.rows)}"
        )
    if not on_gpu:
        log.warning("%s", _no_v100(device))
    latencies = _of_this_device(config.latency, LatencyRecord)
    trainings = _of_this_device(config.training_speed, TrainingSpeedRecord)
    peaks = _peaks(config, table, on_gpu, device, num_threads)
    name = f"table-{config.table}"
    record = PaperRecord(
        environment=here,
        started_at=datetime.now(UTC),
        table=config.table,
        unit=table.unit,
        device=device,
        precision=expected,
        num_threads=num_threads,
        seconds=config.seconds,
        rows=(),
    )
    kept: dict[RowKey, PaperTimes] = {}
    if config.resume:
        record, kept = _resumed(config.output / f"{name}.json", record)

    def make_row(row: PaperRow, found: PaperTimes | str) -> RowRecord:
        if not table.is_training:
            own = _record(row, found, table, latencies)
            return _with_projection(own, table, peaks)
        own = _of_training(row, config, trainings)
        times = _latencies(row, latencies, num_threads) if table.has_latencies else ()
        return own.model_copy(update={"latencies": times})

    rows = [make_row(row, kept.get(_key(row), "not asked for")) for row in table.rows]

    def keep() -> PaperRecord:
        so_far = record.model_copy(update={"rows": tuple(rows)})
        write_text(config.output / f"{name}.json", so_far.model_dump_json(indent=1) + "\n")
        return so_far

    for index, row in enumerate(table.rows):
        if row in asked and _key(row) not in kept and not table.is_training:
            rows[index] = make_row(row, measure_row(row, config, num_threads))
            keep()
        log.info("%s: %s", row.label, _say(rows[index], table))
    record = keep()
    path = config.output / f"{name}.md"
    write_text(path, f"# The paper, side by side\n\n{section_of(record)}\n")
    if config.publish:
        publish_part(record, f"{SECTION}-{name}.json", config.readme, SECTION, section_of)
    return path


def _resumed(path: Path, record: PaperRecord) -> tuple[PaperRecord, dict[RowKey, PaperTimes]]:
    # The record to go on with, without its rows, and what was measured of each.
    if not path.exists():
        raise PaperError(f"--resume: there is no {path}; leave it out to begin")
    try:
        earlier = PaperRecord.model_validate_json(path.read_bytes())
    except ValueError:
        raise PaperError(
            f"--resume: {path} is damaged, or of another version; leave out --resume to measure "
            "all rows again"
        ) from None
    before, now = _conditions(earlier), _conditions(record)
    for name in before:
        if before[name] != now[name]:
            raise PaperError(
                f"--resume: {path} was measured with {name} {before[name]}, and now it is "
                f"{now[name]}; give the same, or leave out --resume to measure all rows again"
            )
    kept = {_key(row): row.times for row in earlier.rows if row.times}
    return earlier.model_copy(update={"rows": ()}), kept


def _conditions(record: PaperRecord) -> dict[str, object]:
    # Under which rows of one table are measured.
    here = record.environment
    return {
        "device": device_slug([here]),
        "precision": record.precision,
        "threads": record.num_threads,
        "seconds": record.seconds,
        "libraries": ", ".join(f"{name} {version}" for name, version in here.libraries.items()),
    }


def _key(row: PaperRow | RowRecord) -> RowKey:
    return row.label, row.image_size, row.batch_size


def verdict(row: RowRecord, record: PaperRecord) -> str:
    """Say whether the paper's number is reproduced: between like and like only."""
    if row.paper is None:
        return "the paper has no number"
    if row.ours is None:
        return "not measured"
    if DEVICE_CLASS not in record.device:
        return f"no verdict: not a {DEVICE_CLASS}"
    if record.precision != PRECISION or row.batch_size is None:
        return "no verdict: another precision or batch size"
    share = row.ours / row.paper - 1
    if abs(share) <= BAND:
        return f"reproduced within {max(1, round(100 * abs(share)))} %"
    is_slower = (share > 0) == (record.unit == "ms")
    return f"not reproduced: {100 * abs(share):.0f} % {'slower' if is_slower else 'faster'}"


def section_of(record: PaperRecord) -> str:
    """Write a table and how it was measured as Markdown."""
    table, libraries = TABLES[record.table], record.environment.libraries
    runs = {latency.started_at for row in record.rows for latency in row.latencies}
    write_table = _training_table if table.is_training else _answer_table
    nvidia = (paper_tables.NVIDIA_BATCH_SIZE, paper_tables.NVIDIA_MS)
    notes = {
        f"Paper: {DEVICE_CLASS}; its precision is not printed. Here: training/speed.py, whose own "
        "table says how it measures.": table.is_training,
        f"Paper: {DEVICE_CLASS}, {PRECISION}, timm's PyTorch code. Here: eager PyTorch "
        f"{libraries.get('torch')}, {record.precision}, channels_last, random weights (time only), "
        f"images on the device, each call waited for, {record.num_threads} threads, each row in a "
        "process of its own; the median call.": not table.is_training,
        "Latencies, which the paper does not print: one image, host memory to host memory, "
        f"{record.num_threads} threads, of whatever weights and accuracy, by perf/latency.py.": (
            table.has_latencies
        ),
        "All its programs took turns.": len(runs) == 1,
        f"Of {len(runs)} runs: only programs of one run took turns.": len(runs) > 1,
        _no_v100(record.device): not record.environment.gpus,
        f"'Reproduced' is within {format_percent(BAND, 0)}, between the same class of device, "
        "precision and batch size only.": True,
        "Best artifact: the fastest of the same variant, image and batch size in the records of "
        "this device, host memory to host memory, of whatever weights and accuracy.": any(
            row.artifact for row in record.rows
        ),
        "NVIDIA: its own runs, V100-SXM3-32GB and A100-SXM-80GB, TensorRT 8.0, CUDA graphs, no "
        "transfers: another kind of measurement, which has no verdict.": any(
            row.batch_size == nvidia[0] and row.network in nvidia[1] for row in record.rows
        ),
        f"Projected: no measurement. Our time, times the cost model's floor on a {PAPER_GPU} over "
        "that on this device; in brackets how far it is from the paper's.": any(
            row.projected is not None for row in record.rows
        ),
    }
    said = " ".join(note for note, is_said in notes.items() if is_said)
    return (
        f"**{table.title}, {record.unit}, on {record.device}**\n\n"
        f"{write_table(record).markdown()}\n\n{said} {record.started_at:%Y-%m-%d} UTC."
    )


def _no_v100(device: str) -> str:
    return (
        f"The paper's device is a V100 GPU, this one is a CPU ({device}), in fp32: nothing here "
        "reproduces or refutes the paper's numbers."
    )


def _is_asked(row: PaperRow, patterns: Sequence[str]) -> bool:
    if not patterns:
        return True
    network = (row.network or "").removeprefix(TIMM)
    return any(p.removeprefix(TIMM) == network or p.lower() in row.label.lower() for p in patterns)


def _of_this_device(path: Path, kind: type[Record]) -> list[Record]:
    slug = device_slug([current_environment()])
    records = read_all(path, kind)
    return [record for record in records if device_slug([record.environment]) == slug]


def measure_row(row: PaperRow, config: PaperConfig, num_threads: int) -> PaperTimes | str:
    """Measure in a process of its own; return why not when it fails."""
    if row.network is None or row.batch_size is None:
        return "neither this project nor timm has it"
    budget = TimeBudget(config.seconds, TURNS)
    opener = partial(open_row, row.network, row.image_size, row.batch_size, num_threads)
    process = Contender(row.label, opener)
    try:
        with running([process]):
            process.ask("warm_up", budget.window_s, budget.warm_up_s)
            turns: list[Turn] = [process.ask("turn", budget.turn_s) for _ in range(TURNS)]
    except ContenderError as error:
        return str(error)
    return PaperTimes(
        precision="fp16" if current_environment().gpus else "fp32",
        samples_ms=tuple(turn.samples_ms for turn in turns),
        elapsed_s=sum(turn.elapsed_s for turn in turns),
    )


def _record(
    row: PaperRow,
    found: PaperTimes | TrainingSpeedRecord | str,
    table: PaperTable,
    latencies: Sequence[LatencyRecord] = (),
) -> RowRecord:
    # What was found, or why nothing was.
    times = found if isinstance(found, PaperTimes) else None
    ours = found.images_per_s if isinstance(found, TrainingSpeedRecord) else None
    if times is not None:
        samples = [sample for turn in times.samples_ms for sample in turn]
        ours = statistics.median(samples)
        if table.unit == "images/s":
            ours = (row.batch_size or 0) * len(samples) / times.elapsed_s
    artifact = _best_artifact(row, latencies, table)
    return RowRecord(
        label=row.label,
        network=row.network,
        image_size=row.image_size,
        batch_size=row.batch_size,
        paper=row.value,
        ours=ours,
        times=times,
        why_not=found if isinstance(found, str) else None,
        artifact=title(artifact.runtime, artifact.precision) if artifact else None,
        artifact_value=_value(artifact, table) if artifact else None,
        projected=None,
    )


def _best_artifact(
    row: PaperRow, latencies: Sequence[LatencyRecord], table: PaperTable
) -> LatencyRecord | None:
    found = [
        record
        for record in latencies
        if record.runtime != EAGER_RUNTIME
        and (record.variant, record.image_size) == (row.network, row.image_size)
        and record.batch_size == row.batch_size
        and record.timed_region == "end_to_end"
    ]
    best = min if table.unit == "ms" else max
    return best(found, key=lambda record: _value(record, table)) if found else None


def _latencies(
    row: PaperRow, latencies: Sequence[LatencyRecord], num_threads: int
) -> tuple[RuntimeLatency, ...]:
    # The newest of each program; records are in order.
    newest = {
        (record.runtime, record.precision): RuntimeLatency(
            runtime=record.runtime,
            precision=record.precision,
            ms=statistics.median(record.turn_p50_ms),
            started_at=record.started_at,
        )
        for record in latencies
        if (record.variant, record.image_size) == (row.network, row.image_size)
        and (record.scenario, record.timed_region) == (SINGLE_STREAM.name, "end_to_end")
        and record.num_threads == num_threads
    }
    return tuple(newest.values())


def _value(record: LatencyRecord, table: PaperTable) -> float:
    if table.unit == "images/s":
        return record.throughput_images_per_s
    return statistics.median(record.turn_p50_ms)


def _of_training(
    row: PaperRow, config: PaperConfig, trainings: Sequence[TrainingSpeedRecord]
) -> RowRecord:
    # Table 3 prints no batch size: any of ours stands beside it, without a verdict.
    found = [
        record
        for record in trainings
        if (record.variant, record.image_size) == (row.network, row.image_size)
        and row.batch_size in (None, record.micro_batch_size)
        and record.contender == "ours"
        and not record.is_loader_fed
    ]
    table = TABLES[config.table]
    if not found:
        return _record(row, f"run python training/speed.py --table {config.table}", table)
    return _record(row, "out of memory" if found[-1].images_per_s is None else found[-1], table)


def _peaks(
    config: PaperConfig, table: PaperTable, on_gpu: bool, device: str, num_threads: int
) -> tuple[DevicePeak, DevicePeak] | None:
    # Of this device and of the paper's.
    if not config.projected or table.is_training:
        return None
    own = gpu_peak(device, "fp16") if on_gpu else cpu_peaks(num_threads, ["fp32"]).get("fp32")
    theirs = gpu_peak(PAPER_GPU, "fp16")
    if own is None or theirs is None:
        log.warning("nothing is projected: the peak of %s is not known", device)
        return None
    return own, theirs


def _with_projection(
    row: RowRecord, table: PaperTable, peaks: tuple[DevicePeak, DevicePeak] | None
) -> RowRecord:
    if peaks is None or row.ours is None or row.network is None or row.network.startswith(TIMM):
        return row
    assert row.times is not None and row.batch_size is not None
    precisions = ("fp16" if row.times.precision == "fp16" else "fp32", "fp16")
    here_ms, there_ms = (
        latency_floor_ms(
            network_cost(get_variant(row.network), row.image_size, row.batch_size, precision), peak
        )
        for precision, peak in zip(precisions, peaks, strict=True)
    )
    scale = there_ms / here_ms if table.unit == "ms" else here_ms / there_ms
    return row.model_copy(update={"projected": row.ours * scale})


def _training_table(record: PaperRecord) -> Table:
    table, programs = TABLES[record.table], _programs_of(record)
    tpu = ("paper: TPU core",) if any(row.tpu for row in table.rows) else ()
    latencies = tuple(f"{title(*program)}, ms" for program in programs)
    rows: list[tuple[str, ...]] = []
    for printed, row in zip(table.rows, record.rows, strict=True):
        found = {(latency.runtime, latency.precision): latency.ms for latency in row.latencies}
        rows.append(
            (
                row.label,
                str(row.image_size),
                str(row.batch_size or NOTHING),
                "out of memory" if printed.is_out_of_memory else format_rate(row.paper),
                *(format_rate(printed.tpu) for _ in tpu),
                f"not measured: {row.why_not}" if row.ours is None else format_rate(row.ours),
                *(format_ms(found[p]) if p in found else "not measured" for p in programs),
                verdict(row, record),
            )
        )
    columns = ("row", "px", "batch", f"paper: {DEVICE_CLASS}", *tpu, "ours", *latencies, "verdict")
    return Table(columns, tuple(rows), frozenset(("row", "verdict")))


def _programs_of(record: PaperRecord) -> list[tuple[str, str]]:
    # Runtime and precision, the eager model first.
    if not TABLES[record.table].has_latencies:
        return []
    found = {(one.runtime, one.precision) for row in record.rows for one in row.latencies}
    if not record.environment.gpus:
        found |= {(runtime, "fp32") for runtime in CPU_RUNTIMES}
    return sorted(found, key=lambda program: (list(RUNTIMES).index(program[0]), program[1]))


def _answer_table(record: PaperRecord) -> Table:
    table = TABLES[record.table]
    write = format_ms if record.unit == "ms" else format_rate
    nvidia_ms, nvidia = paper_tables.NVIDIA_MS, paper_tables.NVIDIA_COLUMNS
    if record.unit != "ms" or not any(row.network in nvidia_ms for row in record.rows):
        nvidia = ()
    has_projection = any(row.projected is not None for row in record.rows)
    columns = ("row", "px", "batch", "paper", *nvidia, "ours eager", "calls", "best artifact")
    columns += (*(("projected",) if has_projection else ()), "verdict")
    rows: list[tuple[str, ...]] = []
    for printed, row in zip(table.rows, record.rows, strict=True):
        theirs = nvidia_ms.get(row.network or "", (None,) * len(nvidia))
        artifact = NOTHING
        if row.artifact is not None:
            artifact = f"{write(row.artifact_value)} ({row.artifact})"
        projected = NOTHING
        if row.projected is not None:
            error = f" ({100 * (row.projected / row.paper - 1):+.0f} %)" if row.paper else ""
            projected = f"{write(row.projected)}{error}"
        calls = sum(map(len, row.times.samples_ms)) if row.times else None
        rows.append(
            (
                row.label,
                str(row.image_size) if row.image_size else NOTHING,
                str(row.batch_size) if row.batch_size else NOTHING,
                "out of memory" if printed.is_out_of_memory else write(row.paper),
                *(write(value) for value in (theirs if nvidia else ())),
                f"not measured: {row.why_not}" if row.ours is None else write(row.ours),
                NOTHING if calls is None else f"{calls:,}",
                artifact,
                *((projected,) if has_projection else ()),
                verdict(row, record),
            )
        )
    return Table(columns, tuple(rows), frozenset(("row", "verdict")))


def _say(row: RowRecord, table: PaperTable) -> str:
    if row.ours is None:
        return f"not measured: {row.why_not}"
    paper = "" if row.paper is None else f" (paper, V100: {row.paper:g})"
    return f"{format_ms(row.ours)} {table.unit}{paper}"
