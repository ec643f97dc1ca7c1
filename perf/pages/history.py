"""Records of several commits -> for each program of a machine a line: its median at each."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from efficientnet.formats.records import LatencyRecord, read_records
from efficientnet.runtimes.names import title
from perf.pages.document import machine_name


class Measured(NamedTuple):
    """A median at a commit."""

    commit: str
    date: str
    p50: float
    """Milliseconds."""


class Line(NamedTuple):
    """A network in one runtime and precision, at one batch size on one machine, over commits."""

    machine: str
    scenario: str
    network: str
    runtime: str
    precision: str
    batch: int
    threads: int
    points: list[Measured]
    """Oldest first, one for each commit: the newest there."""


def read_history(folder: Path) -> list[LatencyRecord]:
    """Read all latency.jsonl under a folder, oldest first.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a line is damaged or of another format.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"--history {folder} is no folder; expected one with latency.jsonl in it, or in "
            "folders of it"
        )
    files = sorted(folder.rglob("latency.jsonl"))
    records = [record for path in files for record in read_records(path, LatencyRecord)]
    return sorted(records, key=lambda record: record.started_at)


def history_lines(records: Iterable[LatencyRecord]) -> list[Line]:
    """Follow each program over the commits it was measured at; of one commit there is no line.

    Weights count as little as what they were exported to: what is followed is the time of the same
    network in the same runtime.

    Args:
        records: oldest first; the same one may come twice.
    """
    lines: dict[tuple[object, ...], dict[str, Measured]] = {}
    for record in records:
        commit = (record.environment.git_commit or "unknown")[:12]
        if record.p50_ms is None:
            continue
        key = (
            machine_name(record.environment),
            record.scenario,
            f"{record.variant}, {record.image_size} px",
            title(record.runtime, "").strip(),
            record.precision,
            record.batch_size,
            record.num_threads,
        )
        own = lines.setdefault(key, {})
        own.pop(commit, None)
        own[commit] = Measured(commit, f"{record.started_at:%Y-%m-%d}", record.p50_ms)
    return [
        Line(*key, points=list(own.values()))  # pyright: ignore[reportArgumentType, reportCallIssue]
        for key, own in lines.items()
        if len(own) > 1
    ]
