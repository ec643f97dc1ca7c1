"""What was measured, one JSON line each: LatencyRecord, AccuracyRecord, TrainingSpeedRecord."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from efficientnet.formats.class_accuracy import ClassAccuracy
from efficientnet.machine.atomic import append_line
from efficientnet.machine.environment import EnvironmentRecord

FORMAT_VERSION = 1


class _Version(BaseModel):
    format_version: int = FORMAT_VERSION


class _Measured(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    program_sha256: str
    """Of the artifact's program, or of a checkpoint's weights when the eager model was measured."""
    checkpoint_sha256: str
    """Of the weights that the program was made of."""
    variant: str
    runtime: str
    precision: str
    image_size: int
    """Pixels."""
    preprocess_sha256: str = ""
    """Of the preprocessing, which may differ for the same program; empty in older records."""
    data: str
    """Where the images came from: `digits` or the name of a folder, without its path."""
    environment: EnvironmentRecord
    started_at: AwareDatetime
    """UTC. The processes of one run of perf/latency.py take turns: their records have the same."""


class TriedRate(BaseModel):
    """What came of images at random times, so many a second."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images_per_s: float
    """Planned."""
    num_images: int
    """Answered: all that were planned, or those until too many were late."""
    num_late: int
    """Of these, over the bound."""
    p99_ms: float | None
    """From the planned time to the answer; None with fewer than ten above it."""
    held: bool
    """Whether all were answered and p99 is within the bound."""


class ServerLoad(BaseModel):
    """The highest rate of images at random times (Poisson) whose p99 stays within a bound."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bound_ms: float
    images_per_s: float
    """Planned; 0 when none of those that were tried held."""
    tried: tuple[TriedRate, ...]
    """In order; the samples of the record are of the last."""


class LatencyRecord(_Measured):
    """Time of a call at one batch size, measured in processes of its own."""

    batch_size: int = Field(ge=1)
    scenario: str
    """Its name in perf/measurements/scenarios.py."""
    timed_region: Literal["compute", "end_to_end"]
    """compute: inputs and outputs stay on the device. end_to_end: host memory to host memory."""
    clock: Literal["cuda_event", "perf_counter"]
    num_threads: int
    """Threads that a call computes with on the CPU."""
    num_warmup: int
    """Calls before the first that counts."""
    is_warmup_stable: bool
    """Whether the last two windows of the warm-up agreed; if not, the row is labelled unstable."""
    num_iterations: int
    """Calls that count."""
    num_turns: int
    """How often it was given the machine in between the others."""
    num_processes: int = 1
    """Processes, one after the other, that the turns are of; 1 in records of before."""
    num_input_images: int
    """Different images that the calls rotate through."""
    seed: int
    """Draws those images."""
    p50_ms: float | None
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    """Percentiles of one call; None with fewer than ten calls above the percentile."""
    mean_ms: float
    stdev_ms: float
    min_ms: float
    max_ms: float
    turn_p50_ms: tuple[float, ...]
    """Median of each turn: how much the machine moved meanwhile."""
    samples_ms: tuple[float, ...] | str
    """Every measured call in order, or the name of a .npy file beside the records."""
    throughput_images_per_s: float
    """Images divided by the wall time of the turns; of the scenario server, the rate that held."""
    server: ServerLoad | None = None
    """Of the scenario server, whose times are from the planned time of an image to its answer."""
    peak_device_memory_bytes: int | None
    """None on a CPU."""
    peak_process_memory_bytes: int
    """Resident, without the images that all processes share."""
    mfu: float | None
    mbu: float | None
    """Achieved share of the device's peak of operations, and of its bandwidth by reading the
    weights once a call, 0..1; None if it is unknown."""
    floor_ms: float | None = None
    """Below which a call cannot take on this device: see cost.latency_floor_ms; None if the
    device's peak is unknown."""
    device_peak: str | None = None
    """The peak that mfu, mbu and floor_ms refer to, and where it is from."""
    harness_overhead_ms: float
    """p50 of a runtime that computes nothing, measured in the same way."""
    cores_busy_elsewhere: float | None
    """Cores that other programs, or other guests of the host, kept busy during the turns on
    average; None where the system does not tell."""


class AccuracyRecord(_Measured):
    """Share of held-out images that the same program classified rightly."""

    top1: float = Field(ge=0, le=1)
    top5: float = Field(ge=0, le=1)
    num_images: int
    classes: tuple[tuple[str, int, int], ...] | None = None
    """Name, images and hits of each class that has images; None in records of before."""
    num_classes: int | None = None
    """Of the program, with or without images."""
    dataset_sha256: str
    """Of the images and labels, in order."""
    hits: str | None = None
    """Which images were classified rightly, in order: a bit for each, the first the highest of the
    first byte, in hexadecimal. None in records of before."""

    @property
    def is_hit(self) -> tuple[bool, ...] | None:
        """Whether each image was classified rightly; None in records of before."""
        if self.hits is None:
            return None
        bits = "".join(f"{byte:08b}" for byte in bytes.fromhex(self.hits))
        return tuple(bit == "1" for bit in bits[: self.num_images])

    @property
    def class_accuracy(self) -> ClassAccuracy | None:
        """The counts, in the order of `classes`; None in records of before."""
        if self.classes is None:
            return None
        _, images, hits = zip(*self.classes, strict=True)
        return ClassAccuracy(images, hits)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of `classes`."""
        return tuple(name for name, _, _ in self.classes or ())


class TrainingSpeedRecord(BaseModel):
    """Speed of a training step at one image size and batch size, measured in a process of its own.

    A step is one forward and backward pass, the optimizer's update and the moving average's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    variant: str
    contender: str
    """`ours`, or whose training step it is compared with: `timm`, and `timm again` for the
    noise."""
    contender_version: str | None = None
    """Of the library that a contender is from; None for ours."""
    image_size: int
    """Pixels."""
    micro_batch_size: int = Field(ge=1)
    """Images per forward pass; a step has one pass here."""
    precision: str
    num_classes: int
    is_compiled: bool
    is_loader_fed: bool
    """Whether the images were decoded and augmented meanwhile; if not, one batch of random pixels
    stays on the device."""
    data: str
    """Where the images came from: `synthetic`, or the name of a folder, without its path."""
    num_workers: int
    """Processes that decode; 0 without a loader."""
    num_threads: int
    """Threads that a step computes with on the CPU."""
    table: Literal[2, 3] | None = None
    """Of the V2 paper, which the run stands beside."""
    num_warm_up_steps: int
    num_steps: int
    """Steps that count."""
    images_per_s: float | None
    """Images divided by the time of all turns; None where it did not fit."""
    step_p50_ms: float | None
    """Median of a step."""
    turn_p50_ms: tuple[float, ...]
    """The same of each turn: processes that are compared take turns."""
    compile_s: float | None
    """What the first step took longer than a later one; None where nothing is compiled."""
    peak_memory_bytes: int | None
    """While steps counted: of the GPU what torch had allocated, else of the process."""
    predicted_memory_bytes: int | None
    """By training/learning/memory.py; None for contenders."""
    device_memory_bytes: int
    mfu: float | None
    """Three times the forward pass's operations, as a share of the device's peak, 0..1; None if
    that is unknown."""
    device_peak: str | None
    """The peak that mfu refers to, and where it is from."""
    is_out_of_memory: bool
    """On a CPU predicted, and the step was not tried."""
    environment: EnvironmentRecord
    started_at: AwareDatetime
    """UTC; all records of one run of the command have the same."""


def pack_hits(is_hit: Sequence[bool]) -> str:
    """Write what AccuracyRecord.hits holds."""
    bits = "".join("01"[hit] for hit in is_hit)
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)).hex()


Record = TypeVar("Record", LatencyRecord, AccuracyRecord, TrainingSpeedRecord)


def append_record(path: Path, record: LatencyRecord | AccuracyRecord | TrainingSpeedRecord) -> None:
    """Append a record to a .jsonl file."""
    append_line(path, record.model_dump_json())


def read_records(path: Path, kind: type[Record], problems: list[str] | None = None) -> list[Record]:
    """Read the records of a .jsonl file, oldest first; a file that is not there holds none.

    Args:
        path: the file.
        kind: of its lines.
        problems: takes what is wrong with a line, and the others go on; None = nothing may be.

    Raises:
        ValueError: a line is damaged or of another format.
    """
    if not path.exists():
        return []
    records: list[Record] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            records.append(_read_line(line, kind))
        except ValueError as error:
            problem = f"{path}, line {number} {error}"
            if problems is None:
                raise ValueError(f"{problem}; move the file away and measure again") from None
            problems.append(problem)
    return records


def _read_line(line: str, kind: type[Record]) -> Record:
    problem = None
    try:
        record = kind.model_validate_json(line)
        version = record.format_version
        if version == FORMAT_VERSION:
            return record
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        problem = f"{field}: {first['msg']}" if field else first["msg"]
        try:
            version = _Version.model_validate_json(line).format_version
        except ValidationError:
            version = FORMAT_VERSION
    # Another version explains all else that is wrong with a line.
    if version != FORMAT_VERSION:
        raise ValueError(f"has format version {version}, this program reads {FORMAT_VERSION}")
    raise ValueError(f"is damaged or not a {kind.__name__} ({problem})")
