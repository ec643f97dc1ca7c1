"""Records -> rows of a report: each speed with its accuracy, and with the eager row of its run."""

import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from efficientnet.formats.records import AccuracyRecord, LatencyRecord
from efficientnet.machine.environment import EnvironmentRecord
from efficientnet.runtimes.names import EAGER_RUNTIME
from perf.measurements.scenarios import SCENARIOS, Scenario, rate_ratio, time_ratio
from perf.measurements.stability import eager_of, instabilities

Record = TypeVar("Record", LatencyRecord, AccuracyRecord)


@dataclass(frozen=True)
class Row:
    """One program in one scenario."""

    latency: LatencyRecord
    accuracy: AccuracyRecord
    eager: "Row | None"
    """The eager model of the same weights, measured in the same run; None without one."""
    label: str
    """Tells it from the other rows of its group."""

    @property
    def is_eager(self) -> bool:
        """Whether it is the reference itself."""
        return self.latency.runtime == EAGER_RUNTIME

    @property
    def scenario(self) -> Scenario:
        """What it was measured in."""
        return SCENARIOS[self.latency.scenario]

    @property
    def ratio(self) -> float | None:
        """To the eager model, of what the scenario compares."""
        if self.eager is None:
            return None
        divide = time_ratio if self.scenario.compares == "time" else rate_ratio
        return divide(self.latency, self.eager.latency)

    @property
    def instabilities(self) -> list[str]:
        """Why the row is labelled unstable; empty when it is stable."""
        return instabilities(self.latency)


@dataclass(frozen=True, eq=False)
class Group:
    """The rows of one machine with one set of versions; nothing is compared across groups."""

    environment: EnvironmentRecord
    """Without the commit, which each record has."""
    rows: tuple[Row, ...]

    def of(self, scenario: Scenario) -> list[Row]:
        """Return the rows of a scenario, the eager model first, then in the scenario's order."""
        return [row for row in self.rows if row.latency.scenario == scenario.name]


@dataclass(frozen=True)
class Joined:
    """What a report shows: speeds with their accuracy, and speeds alone."""

    groups: tuple[Group, ...]
    unverified: tuple[LatencyRecord, ...]
    """Without an accuracy: nothing is compared with them, and no choice made by them."""


def join(latencies: Sequence[LatencyRecord], accuracies: Sequence[AccuracyRecord]) -> Joined:
    """Put the newest speed of each program beside the newest accuracy of the same program.

    Of a network that was trained again only the weights of the newest measurement are shown; two
    that were measured in one run are both shown.

    Args:
        latencies: oldest first, of known scenarios; of one that picks the batch size the newest
            counts, whatever its size.
        accuracies: oldest first; one measured in the same environment is preferred.
    """
    newest: dict[tuple[object, ...], LatencyRecord] = {}
    for record in latencies:
        newest[_identity(record)] = record
    current = _weights_of_the_newest_runs(newest.values())
    newest = {key: r for key, r in newest.items() if r.checkpoint_sha256 in current[_network(r)]}
    accuracies_of = _by(accuracies, _program)
    runs = _by(latencies, _run)

    def accuracy_of(record: LatencyRecord) -> AccuracyRecord | None:
        return find_accuracy(record, accuracies_of.get(_program(record), ()))

    unverified: list[LatencyRecord] = []
    by_machine: dict[str, list[tuple[LatencyRecord, AccuracyRecord]]] = {}
    for record in newest.values():
        if (accuracy := accuracy_of(record)) is None:
            unverified.append(record)
        else:
            by_machine.setdefault(_machine(record.environment), []).append((record, accuracy))
    groups: list[Group] = []
    for pairs in by_machine.values():
        labels = _labels([record for record, _ in pairs])
        rows: list[Row] = []
        for (record, accuracy), label in zip(pairs, labels, strict=True):
            # Its eager row may be older than the newest: what counts is that they took turns.
            eager = eager_of(record, runs[_run(record)])
            eager_accuracy = accuracy_of(eager) if eager else None
            reference = (
                Row(eager, eager_accuracy, None, label) if eager and eager_accuracy else None
            )
            rows.append(Row(record, accuracy, reference, label))
        environment = pairs[0][0].environment.model_copy(update={"git_commit": None})
        groups.append(Group(environment, tuple(sorted(rows, key=_order))))
    return Joined(tuple(groups), tuple(unverified))


def find_accuracy(
    record: LatencyRecord, accuracies: Sequence[AccuracyRecord]
) -> AccuracyRecord | None:
    """Find the newest accuracy of the same program in the same runtime, rather on this machine."""
    found = [accuracy for accuracy in accuracies if _program(accuracy) == _program(record)]
    found.reverse()
    here = (a for a in found if is_same_machine(a.environment, record.environment))
    return next(here, found[0] if found else None)


def is_same_machine(one: EnvironmentRecord, other: EnvironmentRecord) -> bool:
    """Compare all of an environment but the commit."""
    # Mostly they are the same in all: that is told faster.
    return one == other or _machine(one) == _machine(other)


def command_for_accuracy(record: LatencyRecord) -> str:
    """Give the command that measures the accuracy of the same program."""
    return f"python perf/accuracy.py {find_directory(record) or 'DIRECTORY'}"


def find_directory(record: LatencyRecord) -> Path | None:
    """Find the program of a record where commands put it by default; None when it is not there."""
    manifests = sorted(Path("artifacts").glob("*/*/manifest.json"))
    checkpoints = sorted(Path("runs").glob("*/checkpoint/checkpoint.json"))
    for path in (*manifests, *checkpoints):
        if path.parent.is_symlink() or path.parent.parent.is_symlink():
            # runs/latest and artifacts/<variant>/default, which may be others tomorrow.
            continue
        try:
            text = path.read_text(encoding="utf-8")
            found: dict[str, object] = json.loads(text)
        except (OSError, ValueError):
            continue
        sha256 = found.get("program_sha256", found.get("weights_sha256"))
        runtime = found.get("runtime", EAGER_RUNTIME)
        if (sha256, runtime) == (record.program_sha256, record.runtime):
            return path.parent
    return None


def _machine(environment: EnvironmentRecord) -> str:
    # All of it but the commit.
    return environment.model_dump_json(exclude={"git_commit"})


def _program(record: LatencyRecord | AccuracyRecord) -> tuple[str, ...]:
    return record.program_sha256, record.runtime, record.precision, record.preprocess_sha256


def _run(record: LatencyRecord) -> tuple[object, ...]:
    # What has the same took turns: see eager_of.
    return record.started_at, record.checkpoint_sha256, record.scenario


def _by(records: Sequence[Record], key: Callable[[Record], Hashable]) -> dict[Any, list[Record]]:
    found: dict[Any, list[Record]] = {}
    for record in records:
        found.setdefault(key(record), []).append(record)
    return found


def _identity(record: LatencyRecord) -> tuple[object, ...]:
    return (
        _machine(record.environment),
        *_program(record)[:3],
        record.scenario,
        record.timed_region,
        record.num_threads,
        record.image_size,
        None if SCENARIOS[record.scenario].picks_fastest else record.batch_size,
    )


def _network(record: LatencyRecord) -> tuple[object, ...]:
    return _machine(record.environment), record.variant, record.image_size, record.data


def _weights_of_the_newest_runs(
    records: Iterable[LatencyRecord],
) -> dict[tuple[object, ...], set[str]]:
    runs: dict[tuple[object, ...], dict[datetime, set[str]]] = {}
    for record in records:
        run = runs.setdefault(_network(record), {}).setdefault(record.started_at, set())
        run.add(record.checkpoint_sha256)
    return {network: weights[max(weights)] for network, weights in runs.items()}


def _labels(records: Sequence[LatencyRecord]) -> list[str]:
    # The weights are named only where two rows would read alike otherwise.
    weights: dict[str, set[str]] = {}
    for record in records:
        weights.setdefault(record.variant, set()).add(record.checkpoint_sha256)
    return [
        f"{r.variant} ({r.checkpoint_sha256[:7]})" if len(weights[r.variant]) > 1 else r.variant
        for r in records
    ]


def _order(row: Row) -> tuple[object, ...]:
    record = row.latency
    return (
        record.variant,
        row.label,
        record.image_size,
        record.num_threads,
        list(SCENARIOS).index(record.scenario),
        not row.is_eager,
        row.scenario.order(record),
    )
