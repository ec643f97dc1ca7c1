"""Lines of records.jsonl, written as they come by the jobs and by the command that starts them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from efficientnet.errors import PipelineError, first_problem
from efficientnet.machine.atomic import append_line
from efficientnet.machine.environment import EnvironmentRecord

RECORDS_FILE = "records.jsonl"

Status = Literal["done", "skipped", "failed", "out of time", "not begun"]

# A job with one of these is not run again by a call that goes on with the folder.
FINAL: tuple[Status, ...] = ("done", "skipped")

Region = Literal["device to device", "host to host"]


class RecordsError(PipelineError):
    """A folder whose records cannot be gone on with."""


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CallStart(_Line):
    """One call of the command."""

    kind: Literal["call"] = "call"
    format_version: Literal[1] = 1
    started_at: AwareDatetime
    minutes: float
    is_dry_run: bool
    device: str
    compute_capability: str | None
    """None on a CPU."""
    cuda: str | None
    """That torch was built with."""
    cudnn: int | None
    environment: EnvironmentRecord


class JobEnd(_Line):
    """How a job ended; the last one of a name counts."""

    kind: Literal["end"] = "end"
    part: str
    job: str
    status: Status
    reason: str
    """Empty when it is done."""
    seconds: float
    stderr: tuple[str, ...] = ()
    """The last lines, unless it is done."""


class GpuState(_Line):
    """What nvidia-smi told while something was measured."""

    sm_clock_mhz: tuple[float, float] | None
    """Lowest and highest."""
    max_temperature_c: float | None
    slowed_by: tuple[str, ...]
    """Reasons that clocks were held down by, while it was busy."""


class LimitMeasured(_Line):
    """Most that the device does of one thing."""

    kind: Literal["limit"] = "limit"
    what: str
    unit: Literal["bytes/s", "operations/s"]
    best: float
    median: float
    data_sheet: float | None
    """None where the project's table has not got it."""
    samples_us: tuple[int, ...]
    gpu: GpuState | None


class Parity(_Line):
    """Logits beside those of the eager float32 model of the same process and images."""

    num_images: int
    max_relative_error: float
    """Largest error of a logit, in standard deviations of the reference's logits."""
    top1_agreement: float


class LatencyMeasured(_Line):
    """A program at one batch size, which took turns with others."""

    kind: Literal["latency"] = "latency"
    job: str
    variant: str
    method: str
    precision: str
    batch_size: int
    is_best_batch: bool
    """Whether the batch size is the one of most images/s that the eager model or its CUDA graph
    had."""
    image_size: int
    region: Region
    turns_us: tuple[tuple[int, ...], ...] = ()
    """Calls that count, in order; one tuple a turn."""
    p50_ms: float | None = None
    p90_ms: float | None = None
    """None with fewer than a hundred calls."""
    num_calls: int = 0
    images_per_s: float | None = None
    """Images by the wall time of the turns."""
    of_eager: float | None = None
    """Median of the turns' ratios to the eager model's time, same precision and region."""
    prepare_s: float | None = None
    """Building, compiling and capturing, with the first call."""
    parity: Parity | None = None
    problem: str | None = None
    """Why there are no times."""
    gpu: GpuState | None = None


class PytestMeasured(_Line):
    """What pytest told, test by test."""

    kind: Literal["tests"] = "tests"
    outcomes: dict[str, str]
    """Test -> passed, failed, error, skipped, xfailed or xpassed."""
    last_lines: tuple[str, ...]
    is_complete: bool


class TrainingMeasured(_Line):
    """A record of training/speed.py, without what all have alike."""

    kind: Literal["training"] = "training"
    job: str
    record: dict[str, Any]


class LoaderMeasured(_Line):
    """The report of training/loader_speed.py."""

    kind: Literal["loader"] = "loader"
    record: dict[str, Any]


Line = (
    CallStart
    | JobEnd
    | LimitMeasured
    | LatencyMeasured
    | PytestMeasured
    | TrainingMeasured
    | LoaderMeasured
)

_LINE: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="kind")])


def append(folder: Path, line: Line) -> None:
    """Append a line in one write: a process that is killed leaves whole lines."""
    append_line(folder / RECORDS_FILE, line.model_dump_json())


def read(folder: Path) -> list[Line]:
    """Read all lines, oldest first; a folder without records has none."""
    path = folder / RECORDS_FILE
    if not path.exists():
        return []
    lines: list[Line] = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            lines.append(_LINE.validate_json(text))
        except ValidationError as error:
            raise RecordsError(
                f"{path}, line {number} is damaged or of another version: {first_problem(error)}; "
                "move the folder away, or choose another one with --output"
            ) from None
    return lines


def ends_by_job(lines: Sequence[Line]) -> dict[str, JobEnd]:
    """Return the last end of each job, in the order of their first ones."""
    return {line.job: line for line in lines if isinstance(line, JobEnd)}


def to_us(samples_ms: Sequence[float]) -> tuple[int, ...]:
    """Round milliseconds to whole microseconds, which is what is kept of a sample."""
    return tuple(round(1e3 * sample) for sample in samples_ms)
