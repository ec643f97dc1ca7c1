"""What can be set when records are asked for an answer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from efficientnet.command import JsonFlags, require_least, require_positive
from perf.measurements.config import Data, Paths, Threads
from perf.studies.paper_tables import TableName


@dataclass(frozen=True)
class ChooseConfig(JsonFlags):
    """What is asked for."""

    result_file = Path("reports/choice.json")

    budget_ms: float
    """Longest time of a call at batch 1, milliseconds."""

    min_top1: float | None = None
    """Least share of held-out images classified rightly, 0 to 1; None = whatever is best."""

    percentile: Literal["50", "90", "99"] = "90"
    """Of the calls, that must be within the budget."""

    data: str | None = None
    """Images whose accuracy counts, by their name or the first digits of their SHA-256; None =
    those of all records, which must be the same."""

    include_unverified: bool = False
    """Also take programs whose accuracy was not measured, after all others."""

    seconds: float = 10.0
    """Measured time of the fresh run, without warm-up; 0 = none, and the answer says so."""

    latency: Path = Path("reports/latency.jsonl")
    """Records of perf/latency.py, which the fresh run is appended to."""

    accuracy: Path = Path("reports/accuracy.jsonl")
    """Records of perf/accuracy.py."""

    def __post_init__(self) -> None:
        require_positive(self, "budget_ms")
        if self.min_top1 is not None and not 0 <= self.min_top1 <= 1:
            raise ValueError(
                f"--min-top1 is {self.min_top1:g}, expected a share of 0 to 1: 0.9 is 90 %"
            )
        if not 0 <= self.seconds < float("inf"):
            raise ValueError(f"--seconds is {self.seconds:g}, expected at least 0")


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


@dataclass(frozen=True)
class RegressionConfig:
    """Settings of the comparison."""

    base: str
    """Revision that is compared with: a branch, a tag or a commit."""

    head: str = "HEAD"
    """Revision that may be slower. Files that are not committed are not in it."""

    checkpoint: Path | None = None
    """What both make their programs of; None = one that the base trains on the embedded digits, of
    --variant."""

    variant: str = "tiny"
    """Of the network that is trained where no checkpoint is given."""

    exports: tuple[Literal["eager", "ort", "ov"], ...] = ("eager", "ort")
    """Programs that are compared: the checkpoint itself, ONNX Runtime's or OpenVINO's fp32."""

    max_slowdown: float = 0.05
    """Part of the base's time that a call may take longer, above 0."""

    processes: int = 5
    """Fresh processes of each, at least 2: where a program's memory lies changes its speed."""

    rounds: int = 6
    """Turns that each process takes, in random order, at least 2."""

    turn_seconds: float = 0.3
    """Length of a turn, above 0."""

    threads: Threads = None

    output: Path = Path("reports/latency-ci")
    """Folder of regression.json, summary.md and benchmark.json."""

    def __post_init__(self) -> None:
        if not 0 < self.max_slowdown < 1:
            raise ValueError(f"--max-slowdown is {self.max_slowdown:g}, expected between 0 and 1")
        require_least(self, processes=2, rounds=2, threads=1)
        require_positive(self, "turn_seconds")
        if not self.exports:
            raise ValueError("--exports names none, expected some of eager, ort, ov")
