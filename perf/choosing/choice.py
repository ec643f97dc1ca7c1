"""Records of this device -> the best program within a budget, verified by a fresh run."""

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict

from efficientnet.formats.records import LatencyRecord, read_records
from efficientnet.machine.atomic import write_bytes
from efficientnet.machine.environment import EnvironmentRecord, current_environment
from efficientnet.measuring.intervals import mcnemar_p_value
from efficientnet.reporting.tables import NOTHING, Table, format_ms, format_percent
from perf.choosing.candidates import Candidate, ChoiceError, read_candidates
from perf.choosing.choice_plot import draw_choice
from perf.choosing.config import ChooseConfig
from perf.measurements import latency
from perf.measurements.accuracy import SIGNIFICANCE, paired_hits
from perf.measurements.config import LatencyConfig
from perf.measurements.scenarios import SINGLE_STREAM
from perf.measurements.stability import instabilities
from perf.pages.document import machine_name
from perf.pages.rows import find_directory

# A median needs 20 calls, and each turn one.
TURNS = 6
NUM_PROCESSES = 3

log = logging.getLogger(__name__)


class FreshRun(BaseModel):
    """What a second measurement of a program found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    recorded_ms: float
    fresh_ms: float | None
    """None: too few calls for the percentile."""
    reference_ms: float | None
    """Of the eager model, in turns with it; None where its checkpoint is not there."""
    notes: tuple[str, ...]
    holds: bool
    """Whether it is within the budget this time, too."""

    def __str__(self) -> str:
        """Say it in words."""
        ms, recorded = format_ms(self.fresh_ms), format_ms(self.recorded_ms)
        fresh = f"{ms} ms in a fresh run ({recorded} recorded)"
        if self.reference_ms is not None:
            fresh += f", beside {format_ms(self.reference_ms)} of the eager model in turns with it"
        return "; ".join((fresh if self.holds else f"{self.name}, {fresh}", *self.notes))


class Choice(BaseModel):
    """The answer, and what it was chosen from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = 1
    verdict: tuple[str, ...]
    budget_ms: float
    percentile: int
    min_top1: float | None
    data: str | None
    """Images that the accuracies are of; None when all are unverified."""
    chosen: Candidate
    fresh_runs: tuple[FreshRun, ...]
    """Of the chosen one, after those that did not hold; empty when none was asked for."""
    candidates: tuple[Candidate, ...]
    """The most accurate first."""
    picture: str
    environment: EnvironmentRecord
    started_at: AwareDatetime


def main(config: ChooseConfig) -> Choice:
    """Choose from the records, and measure the choice once more."""
    started_at, here = datetime.now(UTC), current_environment()
    candidates = read_candidates(config, here)
    log.info("%s", _table(candidates, config).aligned_text())
    able = [candidate for candidate in candidates if not candidate.excluded]
    if not able:
        raise ChoiceError(_nothing(candidates, config))
    chosen, fresh_runs = _verified(able, config) if config.seconds > 0 else (able[0], [])
    verdict = _verdict(chosen, able, fresh_runs, config)
    picture = config.result_file.with_suffix(".png")
    data = next((c.accuracy.data for c in candidates if c.accuracy is not None), None)
    title = f"{machine_name(here)}, {data or 'no accuracy'}"
    write_bytes(picture, draw_choice(candidates, chosen, config, title))
    log.info("%s", "\n".join(verdict))
    return Choice(
        verdict=tuple(verdict),
        budget_ms=config.budget_ms,
        percentile=int(config.percentile),
        min_top1=config.min_top1,
        data=data,
        chosen=chosen,
        fresh_runs=tuple(fresh_runs),
        candidates=tuple(candidates),
        picture=str(picture),
        environment=here,
        started_at=started_at,
    )


def _verified(able: Sequence[Candidate], config: ChooseConfig) -> tuple[Candidate, list[FreshRun]]:
    # The first that holds, and what was measured until then.
    runs: list[FreshRun] = []
    for candidate in able:
        runs.append(_measure_again(candidate, config))
        if runs[-1].holds:
            return candidate, runs
        log.warning("does not hold in a fresh run: %s", runs[-1])
    raise ChoiceError(
        f"nothing that the records choose holds in a fresh run: {'; '.join(map(str, runs))}; was "
        "the machine busy? Measure all again: python perf/latency.py"
    )


def _measure_again(candidate: Candidate, config: ChooseConfig) -> FreshRun:
    record = candidate.latency
    if candidate.path is None:
        raise ChoiceError(
            f"{candidate.name} is the choice of the records, but its program "
            f"{record.program_sha256[:7]} is not under artifacts/ or runs/, so it cannot be "
            "measured again; export it again, or answer from the records alone: --seconds 0"
        )
    weights = {"program_sha256": record.checkpoint_sha256, "runtime": "torch"}
    reference = find_directory(record.model_copy(update=weights))
    before = len(read_records(config.latency, LatencyRecord))
    paths = dict.fromkeys(filter(None, (reference, Path(candidate.path))))
    latency.main(
        LatencyConfig(
            paths=tuple(paths),
            seconds=config.seconds,
            turns=TURNS,
            processes=NUM_PROCESSES,
            threads=record.num_threads,
            batches=(1,),
            scenarios=(SINGLE_STREAM.name,),
            output=config.latency,
        )
    )
    found = {r.program_sha256: r for r in read_records(config.latency, LatencyRecord)[before:]}
    own, percentile = found[record.program_sha256], f"p{config.percentile}_ms"
    fresh_ms = getattr(own, percentile)
    notes = instabilities(own)
    if fresh_ms is None:
        notes.append(f"too few calls for p{config.percentile}: raise --seconds")
    if reference is None:
        notes.append("measured alone: the checkpoint of its weights is not under runs/")
    assert candidate.latency_ms is not None
    return FreshRun(
        name=candidate.name,
        recorded_ms=candidate.latency_ms,
        fresh_ms=fresh_ms,
        reference_ms=getattr(found.get(record.checkpoint_sha256), percentile, None),
        notes=tuple(notes),
        holds=fresh_ms is not None and fresh_ms <= config.budget_ms,
    )


def _verdict(
    chosen: Candidate,
    able: Sequence[Candidate],
    fresh_runs: Sequence[FreshRun],
    config: ChooseConfig,
) -> list[str]:
    asked = f"Within {config.budget_ms:g} ms (p{config.percentile} of a call at batch 1)"
    if fresh_runs:
        sentences = [f"{asked}: {chosen.name}, {_say_top1(chosen)}; {fresh_runs[-1]}."]
    else:
        ms = format_ms(chosen.latency_ms)
        sentences = [
            f"{asked}: {chosen.name}, {ms} ms, {_say_top1(chosen)}.",
            "From the records alone: not verified by a fresh run.",
        ]
    sentences += [f"Did not hold in a fresh run: {run}." for run in fresh_runs[:-1]]
    best = min(able, key=lambda other: (_is_told_apart(chosen, other), other.latency_ms))
    if best is not chosen:
        sentences.append(
            f"So few images do not tell it from {best.name}, {_say_top1(best)}, which takes "
            f"{format_ms(best.latency_ms)} ms by the records."
        )
    return sentences


def _is_told_apart(chosen: Candidate, other: Candidate) -> bool:
    if other is chosen:
        return False
    if chosen.accuracy is None or other.accuracy is None:
        return True
    pair = paired_hits(chosen.accuracy, other.accuracy)
    if pair is not None:
        return mcnemar_p_value(*pair) < SIGNIFICANCE
    # Records of before do not tell which images were right: whether its share is in the interval.
    return chosen.top1_interval is not None and other.accuracy.top1 < chosen.top1_interval[0]


def _say_top1(candidate: Candidate) -> str:
    if candidate.top1 is None:
        return "unverified: its accuracy was not measured"
    interval = _interval(candidate)
    return f"top-1 {format_percent(candidate.top1)} of {candidate.num_images:,} images ({interval})"


def _interval(candidate: Candidate) -> str:
    return " to ".join(map(format_percent, candidate.top1_interval or ())) or NOTHING


def _nothing(candidates: Sequence[Candidate], config: ChooseConfig) -> str:
    wanted = f"{config.budget_ms:g} ms at p{config.percentile}"
    if config.min_top1 is not None:
        wanted += f" with a top-1 of {format_percent(config.min_top1)}"
    told: list[str] = []
    if times := [c.latency_ms for c in candidates if c.latency_ms is not None]:
        told.append(f"the fastest of {len(candidates)} takes {format_ms(min(times))} ms")
    known = [c.top1 for c in candidates if c.top1 is not None]
    told.append(f"best top-1 {format_percent(max(known))}" if known else "no accuracy was measured")
    if unverified := sum(c.excluded == ("unverified",) for c in candidates):
        told.append(
            f"{unverified} would fit but are unverified: run 'python perf/accuracy.py', or add "
            "--include-unverified"
        )
    return f"no program of this device fits {wanted}: {'; '.join(told)}"


def _table(candidates: Sequence[Candidate], config: ChooseConfig) -> Table:
    columns = ("program", f"p{config.percentile} ms", "top-1", "95 %", "front", "excluded")
    rows = tuple(
        (
            c.name,
            format_ms(c.latency_ms),
            "unverified" if c.top1 is None else format_percent(c.top1),
            _interval(c),
            "yes" if c.is_on_front else "",
            ", ".join(c.excluded),
        )
        for c in candidates
    )
    return Table(columns, rows, frozenset(("program", "front", "excluded")))
