"""Records of many devices and images -> the programs of this device that can be compared."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from efficientnet.errors import PipelineError
from efficientnet.formats.records import AccuracyRecord, LatencyRecord, Record, read_records
from efficientnet.machine.environment import EnvironmentRecord
from efficientnet.measuring.intervals import wilson_interval
from efficientnet.reporting.publishing import device_slug
from efficientnet.runtimes.names import title
from perf.measurements.scenarios import SINGLE_STREAM
from perf.pages.rows import find_accuracy

log = logging.getLogger(__name__)


class ChoiceError(PipelineError):
    """The records hold no answer."""


@dataclass(frozen=True)
class Candidate:
    """A program on this device, with the newest of its times."""

    latency: LatencyRecord
    accuracy: AccuracyRecord | None
    """None: unverified."""

    @property
    def name(self) -> str:
        """Variant, size, runtime and precision, and threads, as people write them."""
        record = self.latency
        program = title(record.runtime, record.precision)
        threads = f"{record.num_threads} thread{'s' if record.num_threads > 1 else ''}"
        return f"{record.variant} {record.image_size} px {program}, {threads}"

    def percentile_ms(self, percent: str) -> float | None:
        """Return a percentile of a call; None when it has too few calls."""
        return getattr(self.latency, f"p{percent}_ms")

    @property
    def top1(self) -> float | None:
        """Share of the images; None when unverified."""
        return None if self.accuracy is None else self.accuracy.top1

    @property
    def top1_interval(self) -> tuple[float, float] | None:
        """Where the share lies with 95 % confidence."""
        if self.accuracy is None:
            return None
        count = self.accuracy.num_images
        return wilson_interval(round(self.accuracy.top1 * count), count)


def read_all(path: Path, published: Path, kind: type[Record]) -> list[Record]:
    """Read a file of records and those that are published under the same name, oldest first.

    Raises:
        ValueError: `path` is damaged or of another format; a published file is left out instead,
            and that is logged.
    """
    records = read_records(path, kind)
    for file in sorted(published.glob(f"*/{path.name}")):
        try:
            records += read_records(file, kind)
        except ValueError as error:
            log.warning("left out: %s", error)
    # A published record may be in the other file, too.
    different = {record.model_dump_json(): record for record in records}
    return sorted(different.values(), key=lambda record: record.started_at)


def of_device(records: Sequence[Record], here: EnvironmentRecord) -> list[Record]:
    """Keep the records of a device; whatever else is there is logged.

    Raises:
        ChoiceError: none is of it.
    """
    own = device_slug([here])
    places = [device_slug([record.environment]) for record in records]
    others = Counter(place for place in places if place != own)
    told = ", ".join(f"{count} of {place}" for place, count in others.items())
    kept = [record for record, place in zip(records, places, strict=True) if place == own]
    if records and not kept:
        raise ChoiceError(
            f"no record is of this device ({own}): there are {told}, and times of one device say "
            "nothing of another; measure here: python perf/latency.py, python perf/accuracy.py"
        )
    if others:
        log.warning("left out, measured on other devices than this (%s): %s", own, told)
    return kept


def find_candidates(
    latencies: Sequence[LatencyRecord], accuracies: Sequence[AccuracyRecord]
) -> list[Candidate]:
    """Put the newest time of each program beside its accuracy.

    Args:
        latencies: of one device, oldest first.
        accuracies: oldest first.
    """
    newest = {
        (
            record.program_sha256,
            record.runtime,
            record.precision,
            record.preprocess_sha256,
            record.num_threads,
        ): record
        for record in latencies
        if record.scenario == SINGLE_STREAM.name and record.batch_size == 1
    }
    return [Candidate(record, find_accuracy(record, accuracies)) for record in newest.values()]


def of_images(candidates: Sequence[Candidate], data: str | None) -> list[Candidate]:
    """Keep what can be compared: accuracies of the same images, and the unverified.

    Raises:
        ChoiceError: accuracies of several sets of images, or none of those asked for.
    """
    known = [c.accuracy for c in candidates if c.accuracy is not None]
    sets = Counter((record.data, record.dataset_sha256) for record in known)
    asked = {
        own for own in sets if data is None or own[0] == data or (data and own[1].startswith(data))
    }
    told = "; ".join(
        f"'{name}' {sha[:7]} of {count} programs" for (name, sha), count in sets.items()
    )
    if data is not None and not asked:
        raise ChoiceError(
            f"no accuracy is of --data {data}; there are: {told or 'none'}; measure it: "
            f"python perf/accuracy.py --data {data}"
        )
    if len(asked) > 1:
        raise ChoiceError(
            f"the accuracies are of different images, and do not compare: {told}; choose with "
            "--data NAME, or the first digits of the SHA-256"
        )
    return [
        c
        for c in candidates
        if c.accuracy is None or (c.accuracy.data, c.accuracy.dataset_sha256) in asked
    ]


def pareto_front(candidates: Sequence[Candidate], percent: str) -> list[Candidate]:
    """Return those that no other beats in time and top-1 at once, the fastest first."""
    known = [
        (time, -c.top1, index)
        for index, c in enumerate(candidates)
        if (time := c.percentile_ms(percent)) is not None and c.top1 is not None
    ]
    front: list[Candidate] = []
    best = 1.0
    for _, negative_top1, index in sorted(known):
        if negative_top1 < best:
            best = negative_top1
            front.append(candidates[index])
    return front
