"""Records of this device -> the best program within a budget, verified by a fresh run."""

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict

from efficientnet.formats.records import AccuracyRecord, LatencyRecord, read_records
from efficientnet.machine.atomic import write_bytes
from efficientnet.machine.environment import EnvironmentRecord, current_environment
from efficientnet.measuring.intervals import mcnemar_p_value
from efficientnet.reporting.tables import NOTHING, Table, format_ms, format_percent
from perf.measurements import latency
from perf.measurements.accuracy import SIGNIFICANCE, paired_hits
from perf.measurements.config import LatencyConfig
from perf.measurements.scenarios import SINGLE_STREAM
from perf.measurements.stability import instabilities
from perf.pages.document import machine_name
from perf.pages.rows import find_directory, is_same_machine
from perf.studies.candidates import (
    Candidate,
    ChoiceError,
    find_candidates,
    of_device,
    of_images,
    pareto_front,
    read_all,
)
from perf.studies.choice_plot import draw_choice
from perf.studies.config import ChooseConfig

FORMAT_VERSION = 1

# A median needs 20 calls, and each turn one.
TURNS = 6

log = logging.getLogger(__name__)


class CandidateRow(BaseModel):
    """A program that was chosen from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    """None: unverified."""
    top1_interval: tuple[float, float] | None
    """Of 95 % confidence (Wilson)."""
    num_images: int | None
    is_on_front: bool
    """No other program is faster and as accurate, or more accurate and as fast."""
    excluded: tuple[str, ...]
    """Why it cannot be chosen; empty when it can."""
    notes: tuple[str, ...]
    measured_at: AwareDatetime


class FreshRun(BaseModel):
    """What a second measurement of a program found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    recorded_ms: float
    fresh_ms: float | None
    """None: too few calls for the percentile."""
    reference_ms: float | None
    """The same percentile of the eager model, in turns with it; None where its checkpoint is not
    there."""
    notes: tuple[str, ...]
    holds: bool
    """Whether it is within the budget this time, too."""


class Choice(BaseModel):
    """The answer, and what it was chosen from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    verdict: tuple[str, ...]
    budget_ms: float
    percentile: int
    min_top1: float | None
    data: str | None
    """Images that the accuracies are of; None when all are unverified."""
    chosen: CandidateRow | None
    """None: nothing fits, or nothing held in a fresh run."""
    fresh_runs: tuple[FreshRun, ...]
    """Of the chosen one, after those that did not hold; empty when none was asked for."""
    candidates: tuple[CandidateRow, ...]
    """The most accurate first."""
    picture: str
    environment: EnvironmentRecord
    started_at: AwareDatetime


def main(config: ChooseConfig) -> Choice:
    """Choose from the records, and measure the choice once more.

    Raises:
        ChoiceError: no records of this device, accuracies of different images, nothing within the
            budget, or nothing that holds in a fresh run.
        ValueError: a record is damaged or of another format.
    """
    started_at, here = datetime.now(UTC), current_environment()
    candidates = _read(config, here)
    front = pareto_front(candidates, config.percentile)
    excluded = [_excluded(candidate, config) for candidate in candidates]
    order = sorted(range(len(candidates)), key=lambda i: _preference(candidates[i], config))
    rows = [_row(candidates[i], excluded[i], candidates[i] in front, config, here) for i in order]
    log.info("%s", _table(rows, config).aligned_text())
    able = [(candidates[i], row) for i, row in zip(order, rows, strict=True) if not excluded[i]]
    if not able:
        raise ChoiceError(_nothing(candidates, rows, config))
    fresh_runs: list[FreshRun] = []
    chosen = able[0]
    if config.seconds > 0:
        for chosen in able:
            fresh_runs.append(_measure_again(chosen[0], config))
            if fresh_runs[-1].holds:
                break
            log.warning("does not hold in a fresh run: %s", _say_fresh(fresh_runs[-1], config))
        if not fresh_runs[-1].holds:
            told = "; ".join(_say_fresh(run, config) for run in fresh_runs)
            raise ChoiceError(
                f"nothing that the records choose holds in a fresh run: {told}; was the machine "
                "busy? Measure all again: python perf/latency.py"
            )
    verdict = _verdict(chosen[0], [candidate for candidate, _ in able], fresh_runs, config)
    picture = config.result_file.with_suffix(".png")
    title = f"{machine_name(here)}, {_data_of(candidates) or 'no accuracy'}"
    write_bytes(picture, draw_choice(candidates, front, chosen[0], config, title))
    for sentence in verdict:
        log.info("%s", sentence)
    return Choice(
        verdict=tuple(verdict),
        budget_ms=config.budget_ms,
        percentile=int(config.percentile),
        min_top1=config.min_top1,
        data=_data_of(candidates),
        chosen=chosen[1],
        fresh_runs=tuple(fresh_runs),
        candidates=tuple(rows),
        picture=str(picture),
        environment=here,
        started_at=started_at,
    )


def _read(config: ChooseConfig, here: EnvironmentRecord) -> list[Candidate]:
    latencies = read_all(config.latency, config.published, LatencyRecord)
    if not latencies:
        raise ChoiceError(
            f"no latency in {config.latency} or {config.published}: run 'python perf/latency.py' "
            "and 'python perf/accuracy.py' first"
        )
    accuracies = read_all(config.accuracy, config.published, AccuracyRecord)
    candidates = find_candidates(of_device(latencies, here), accuracies)
    if not candidates:
        raise ChoiceError(
            f"no record of this device is of the scenario {SINGLE_STREAM.name}: run "
            "'python perf/latency.py'"
        )
    return of_images(candidates, config.data)


def _excluded(candidate: Candidate, config: ChooseConfig) -> list[str]:
    reasons: list[str] = []
    time_ms = candidate.percentile_ms(config.percentile)
    if time_ms is None:
        reasons.append(f"too few calls for p{config.percentile}")
    elif time_ms > config.budget_ms:
        reasons.append("over the budget")
    if candidate.top1 is None:
        if config.min_top1 is not None or not config.include_unverified:
            reasons.append("unverified")
    elif config.min_top1 is not None and candidate.top1 < config.min_top1:
        reasons.append("top-1 too low")
    return reasons


def _preference(candidate: Candidate, config: ChooseConfig) -> tuple[float, float]:
    time_ms = candidate.percentile_ms(config.percentile)
    top1 = -1.0 if candidate.top1 is None else candidate.top1
    return -top1, float("inf") if time_ms is None else time_ms


def _row(
    candidate: Candidate,
    excluded: Sequence[str],
    is_on_front: bool,
    config: ChooseConfig,
    here: EnvironmentRecord,
) -> CandidateRow:
    record, accuracy = candidate.latency, candidate.accuracy
    path = find_directory(record)
    notes = list(instabilities(record))
    if record.environment.libraries != here.libraries:
        notes.append("its time was measured with other versions than those installed now")
    if accuracy is not None and not is_same_machine(accuracy.environment, record.environment):
        notes.append("its accuracy was measured on another machine or with other versions")
    return CandidateRow(
        name=candidate.name,
        variant=record.variant,
        image_size=record.image_size,
        runtime=record.runtime,
        precision=record.precision,
        num_threads=record.num_threads,
        program_sha256=record.program_sha256,
        path=str(path) if path else None,
        latency_ms=candidate.percentile_ms(config.percentile),
        top1=candidate.top1,
        top1_interval=candidate.top1_interval,
        num_images=accuracy.num_images if accuracy else None,
        is_on_front=is_on_front,
        excluded=tuple(excluded),
        notes=tuple(notes),
        measured_at=record.started_at,
    )


def _measure_again(candidate: Candidate, config: ChooseConfig) -> FreshRun:
    record = candidate.latency
    path = find_directory(record)
    if path is None:
        raise ChoiceError(
            f"{candidate.name} is the choice of the records, but its program "
            f"{record.program_sha256[:7]} is not under artifacts/ or runs/, so it cannot be "
            "measured again; export it again, or answer from the records alone: --seconds 0"
        )
    reference = _reference(record)
    paths = tuple(dict.fromkeys(p for p in (reference, path) if p is not None))
    before = len(read_records(config.latency, LatencyRecord))
    latency.main(
        LatencyConfig(
            paths=paths,
            seconds=config.seconds,
            turns=TURNS,
            threads=record.num_threads,
            batches=(1,),
            scenarios=(SINGLE_STREAM.name,),
            output=config.latency,
            seed=record.seed,
        )
    )
    found = read_records(config.latency, LatencyRecord)[before:]
    own = next(r for r in found if r.program_sha256 == record.program_sha256)
    eager = next((r for r in found if r.program_sha256 == record.checkpoint_sha256), None)
    fresh = Candidate(own, candidate.accuracy).percentile_ms(config.percentile)
    notes = list(instabilities(own))
    if fresh is None:
        notes.append(f"too few calls for p{config.percentile}: raise --seconds")
    if reference is None:
        notes.append("measured alone: the checkpoint of its weights is not under runs/")
    recorded = candidate.percentile_ms(config.percentile)
    assert recorded is not None
    return FreshRun(
        name=candidate.name,
        recorded_ms=recorded,
        fresh_ms=fresh,
        reference_ms=Candidate(eager, None).percentile_ms(config.percentile) if eager else None,
        notes=tuple(notes),
        holds=fresh is not None and fresh <= config.budget_ms,
    )


def _reference(record: LatencyRecord) -> Path | None:
    eager = record.model_copy(
        update={"program_sha256": record.checkpoint_sha256, "runtime": "torch"}
    )
    return find_directory(eager)


def _verdict(
    chosen: Candidate,
    able: Sequence[Candidate],
    fresh_runs: Sequence[FreshRun],
    config: ChooseConfig,
) -> list[str]:
    time_ms = chosen.percentile_ms(config.percentile)
    asked = f"{config.budget_ms:g} ms (p{config.percentile} of a call at batch 1)"
    sentences = [
        f"Within {asked}: {chosen.name}, {format_ms(time_ms)} ms, {_say_top1(chosen)}."
        if not fresh_runs
        else f"Within {asked}: {chosen.name}, {_say_top1(chosen)}; "
        f"{_say_fresh(fresh_runs[-1], config)}."
    ]
    if not fresh_runs:
        sentences.append("From the records alone: not verified by a fresh run.")
    for run in fresh_runs[:-1]:
        sentences.append(f"Did not hold in a fresh run: {_say_fresh(run, config)}.")
    faster = [
        other
        for other in able
        if other is not chosen
        and not _is_told_apart(chosen, other)
        and (other.percentile_ms(config.percentile) or 0) < (time_ms or 0)
    ]
    if faster:
        best = min(faster, key=lambda other: other.percentile_ms(config.percentile) or 0)
        sentences.append(
            f"So few images do not tell it from {best.name}, {_say_top1(best)}, which takes "
            f"{format_ms(best.percentile_ms(config.percentile))} ms by the records."
        )
    return sentences


def _is_told_apart(chosen: Candidate, other: Candidate) -> bool:
    if chosen.accuracy is None or other.accuracy is None:
        return True
    pair = paired_hits(chosen.accuracy, other.accuracy)
    if pair is not None:
        return mcnemar_p_value(*pair) < SIGNIFICANCE
    # Records of before do not tell which images were right: whether its share is in the interval.
    return chosen.top1_interval is not None and other.accuracy.top1 < chosen.top1_interval[0]


def _say_top1(candidate: Candidate) -> str:
    accuracy, interval = candidate.accuracy, candidate.top1_interval
    if accuracy is None or interval is None:
        return "unverified: its accuracy was not measured"
    return (
        f"top-1 {format_percent(accuracy.top1)} of {accuracy.num_images:,} images "
        f"({format_percent(interval[0])} to {format_percent(interval[1])})"
    )


def _say_fresh(run: FreshRun, config: ChooseConfig) -> str:
    fresh = f"{format_ms(run.fresh_ms)} ms in a fresh run ({format_ms(run.recorded_ms)} recorded)"
    if run.reference_ms is not None:
        fresh += f", beside {format_ms(run.reference_ms)} of the eager model in turns with it"
    notes = "".join(f"; {note}" for note in run.notes)
    return f"{fresh if run.holds else f'{run.name}, {fresh}'}{notes}"


def _nothing(
    candidates: Sequence[Candidate], rows: Sequence[CandidateRow], config: ChooseConfig
) -> str:
    times = [t for c in candidates if (t := c.percentile_ms(config.percentile)) is not None]
    fastest = f"the fastest of {len(rows)} takes {format_ms(min(times))} ms" if times else ""
    best = max((c.top1 for c in candidates if c.top1 is not None), default=None)
    accurate = "no accuracy was measured" if best is None else f"best top-1 {format_percent(best)}"
    wanted = f"{config.budget_ms:g} ms at p{config.percentile}"
    if config.min_top1 is not None:
        wanted += f" with a top-1 of {format_percent(config.min_top1)}"
    unverified = sum(row.excluded == ("unverified",) for row in rows)
    advice = (
        f"; {unverified} would fit but are unverified: run 'python perf/accuracy.py', or add "
        "--include-unverified"
        if unverified
        else ""
    )
    told = ", ".join(filter(None, (fastest, accurate)))
    return f"no program of this device fits {wanted}: {told}{advice}"


def _data_of(candidates: Sequence[Candidate]) -> str | None:
    return next((c.accuracy.data for c in candidates if c.accuracy is not None), None)


def _table(rows: Sequence[CandidateRow], config: ChooseConfig) -> Table:
    columns = ("program", f"p{config.percentile} ms", "top-1", "95 %", "front", "excluded")
    cells = tuple(
        (
            row.name,
            format_ms(row.latency_ms),
            "unverified" if row.top1 is None else format_percent(row.top1),
            NOTHING
            if row.top1_interval is None
            else " to ".join(format_percent(end) for end in row.top1_interval),
            "yes" if row.is_on_front else "",
            ", ".join(row.excluded),
        )
        for row in rows
    )
    return Table(columns, cells, frozenset(("program", "front", "excluded")))
