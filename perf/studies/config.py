"""What can be set when programs are measured beside something else."""

from dataclasses import dataclass
from pathlib import Path

from efficientnet.command import JsonFlags, require_least, require_positive
from perf.measurements.config import Data, Paths, Threads
from perf.studies.paper_tables import TableName


@dataclass(frozen=True)
class PaperConfig:
    """Settings of the comparison."""

    table: TableName
    """Of the paper; batch = the appendix's, images a second by batch size."""

    rows: tuple[str, ...] = ()
    """Rows that are measured, by variant, timm's name or a part of the printed name; none = all.
    The others are in the table as not measured."""

    seconds: float = 60.0
    """Measured time of each row, without warm-up, above 0."""

    resume: bool = False
    """Keep the rows that the output's record has, of the same machine and settings, and measure
    only the others: of a run that was ended, or of other rows."""

    projected: bool = False
    """Add a column: what the cost model makes of our time on the paper's device, and its error."""

    threads: Threads = None

    output: Path = Path("reports/paper")
    """Folder of table-<number>.json and table-<number>.md."""

    latency: Path = Path("reports/latency.jsonl")
    """Records of perf/latency.py, of which the best artifact of each row is taken."""

    training_speed: Path = Path("reports/training-speed.jsonl")
    """Records of training/speed.py, which tables 2 and 3 are made of."""

    publish: bool = False
    """Write to reports/published/<date>-<device>/, and the table into docs/results.md."""

    readme: Path = Path("docs/results.md")

    def __post_init__(self) -> None:
        require_positive(self, "seconds")
        require_least(self, threads=1)


@dataclass(frozen=True)
class ProgramsConfig(JsonFlags):
    """Which programs a comparison is of, on which images, and where it is told."""

    paths: Paths = ()
    threads: Threads = None
    data: Data = None

    publish: bool = False
    """Write to reports/published/<date>-<device>/, and the table into docs/results.md."""

    readme: Path = Path("docs/results.md")


@dataclass(frozen=True)
class AgreementConfig(ProgramsConfig):
    """Settings of the comparison."""

    result_file = Path("reports/agreement.json")

    seconds: float = 30.0
    """Measured time of each program and of each tool, without warm-up, above 0."""

    rounds: int = 5
    """That this time is split into, at least 2: our harness and the other tool take turns."""

    def __post_init__(self) -> None:
        require_positive(self, "seconds")
        require_least(self, rounds=2, threads=1)


@dataclass(frozen=True)
class DenormalsConfig(ProgramsConfig):
    """Settings of the comparison."""

    result_file = Path("reports/denormals.json")

    seconds: float = 10.0
    """Measured time of each program with each input and each arithmetic, without warm-up, above
    0."""

    turns: int = 6
    """That this time is split into, at least 1."""

    def __post_init__(self) -> None:
        require_positive(self, "seconds")
        require_least(self, turns=1, threads=1)
