"""Records of many devices and images -> the programs of this device that can be compared."""

import logging
from collections import Counter
from collections.abc import Sequence

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from efficientnet.errors import PipelineError
from efficientnet.formats.records import AccuracyRecord, LatencyRecord
from efficientnet.machine.environment import EnvironmentRecord
from efficientnet.measuring.intervals import wilson_interval
from efficientnet.reporting.publishing import PUBLISHED, device_slug, read_all
from efficientnet.runtimes.names import title
from perf.choosing.config import ChooseConfig
from perf.measurements.scenarios import SINGLE_STREAM
from perf.measurements.stability import instabilities
from perf.pages.rows import find_accuracy, find_directory, is_same_machine

log = logging.getLogger(__name__)


class ChoiceError(PipelineError):
    """The records hold no answer."""


class Candidate(BaseModel):
    """A program on this device, with the newest of its times."""

    model_config = ConfigDict(frozen=True)

    latency: LatencyRecord = Field(exclude=True)
    accuracy: AccuracyRecord | None = Field(exclude=True)
    """None: unverified, as all that is made of it."""
    name: str
    variant: str
    image_size: int
    runtime: str
    precision: str
    num_threads: int
    program_sha256: str
    path: str | None
    """Its directory; None where commands put it by default it is not."""
    latency_ms: float | None
    """The percentile that was asked for; None with too few calls."""
    top1: float | None
    top1_interval: tuple[float, float] | None
    """Of 95 % confidence (Wilson)."""
    num_images: int | None
    is_on_front: bool = False
    """No other program is faster and as accurate, or more accurate and as fast."""
    excluded: tuple[str, ...]
    """Why it cannot be chosen; empty when it can."""
    notes: tuple[str, ...]
    measured_at: AwareDatetime


def read_candidates(config: ChooseConfig, here: EnvironmentRecord) -> list[Candidate]:
    """Read the programs of this device that can be compared, the most accurate first.

    Raises:
        ChoiceError: none, or accuracies of different images.
        ValueError: a record is damaged or of another format.
    """
    latencies = read_all(config.latency, LatencyRecord)
    if not latencies:
        raise ChoiceError(
            f"no latency in {config.latency} or {PUBLISHED}: run 'python perf/latency.py' "
            "and 'python perf/accuracy.py' first"
        )
    accuracies = read_all(config.accuracy, AccuracyRecord)
    # Oldest first: the newest time of a program counts.
    newest = {
        (r.program_sha256, r.runtime, r.precision, r.preprocess_sha256, r.num_threads): r
        for r in _of_device(latencies, here)
        if r.scenario == SINGLE_STREAM.name and r.batch_size == 1
    }
    if not newest:
        raise ChoiceError(
            f"no record of this device is of the scenario {SINGLE_STREAM.name}: run "
            "'python perf/latency.py'"
        )
    pairs = [(record, find_accuracy(record, accuracies)) for record in newest.values()]
    found = [make_candidate(*pair, config, here) for pair in _of_images(pairs, config.data)]
    front = pareto_front(found)
    found = [c.model_copy(update={"is_on_front": c in front}) for c in found]
    return sorted(found, key=_preference)


def _preference(candidate: Candidate) -> tuple[bool, float, float]:
    return candidate.top1 is None, -(candidate.top1 or 0), candidate.latency_ms or float("inf")


def make_candidate(
    record: LatencyRecord,
    accuracy: AccuracyRecord | None,
    config: ChooseConfig,
    here: EnvironmentRecord,
) -> Candidate:
    """Put a program's time and accuracy beside what is asked for."""
    latency_ms = getattr(record, f"p{config.percentile}_ms")
    excluded: list[str] = []
    if latency_ms is None:
        excluded.append(f"too few calls for p{config.percentile}")
    elif latency_ms > config.budget_ms:
        excluded.append("over the budget")
    if accuracy is None:
        if config.min_top1 is not None or not config.include_unverified:
            excluded.append("unverified")
    elif config.min_top1 is not None and accuracy.top1 < config.min_top1:
        excluded.append("top-1 too low")
    notes = instabilities(record)
    if record.environment.libraries != here.libraries:
        notes.append("its time was measured with other versions than those installed now")
    if accuracy is not None and not is_same_machine(accuracy.environment, record.environment):
        notes.append("its accuracy was measured on another machine or with other versions")
    path, program = find_directory(record), title(record.runtime, record.precision)
    threads = f"{record.num_threads} thread{'s' if record.num_threads > 1 else ''}"
    return Candidate(
        latency=record,
        accuracy=accuracy,
        name=f"{record.variant} {record.image_size} px {program}, {threads}",
        variant=record.variant,
        image_size=record.image_size,
        runtime=record.runtime,
        precision=record.precision,
        num_threads=record.num_threads,
        program_sha256=record.program_sha256,
        path=str(path) if path else None,
        latency_ms=latency_ms,
        top1=accuracy and accuracy.top1,
        top1_interval=accuracy
        and wilson_interval(round(accuracy.top1 * accuracy.num_images), accuracy.num_images),
        num_images=accuracy and accuracy.num_images,
        excluded=tuple(excluded),
        notes=tuple(notes),
        measured_at=record.started_at,
    )


def pareto_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return those that no other beats in time and top-1 at once, the fastest first."""
    known = [c for c in candidates if c.latency_ms is not None and c.top1 is not None]
    front: list[Candidate] = []
    for c in sorted(known, key=lambda c: (c.latency_ms or 0, -(c.top1 or 0))):
        if not front or (c.top1 or 0) > (front[-1].top1 or 0):
            front.append(c)
    return front


def _of_device(records: Sequence[LatencyRecord], here: EnvironmentRecord) -> list[LatencyRecord]:
    own = device_slug([here])
    places = [device_slug([record.environment]) for record in records]
    others = Counter(place for place in places if place != own)
    told = ", ".join(f"{count} of {place}" for place, count in others.items())
    kept = [record for record, place in zip(records, places, strict=True) if place == own]
    if not kept:
        raise ChoiceError(
            f"no record is of this device ({own}): there are {told}, and times of one device say "
            "nothing of another; measure here: python perf/latency.py, python perf/accuracy.py"
        )
    if others:
        log.warning("left out, measured on other devices than this (%s): %s", own, told)
    return kept


Pair = tuple[LatencyRecord, AccuracyRecord | None]


def _of_images(pairs: Sequence[Pair], data: str | None) -> list[Pair]:
    # Accuracies of the same images, and the unverified.
    sets = Counter((own.data, own.dataset_sha256) for _, own in pairs if own is not None)
    asked = {own for own in sets if not data or own[0] == data or own[1].startswith(data)}
    told = "; ".join(
        f"'{name}' {sha[:7]} of {count} programs" for (name, sha), count in sets.items()
    )
    if data and not asked:
        raise ChoiceError(
            f"no accuracy is of --data {data}; there are: {told or 'none'}; measure it: "
            f"python perf/accuracy.py --data {data}"
        )
    if len(asked) > 1:
        raise ChoiceError(
            f"the accuracies are of different images, and do not compare: {told}; choose with "
            "--data NAME, or the first digits of the SHA-256"
        )
    return [p for p in pairs if p[1] is None or (p[1].data, p[1].dataset_sha256) in asked]
