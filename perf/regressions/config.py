"""What can be set when two revisions are compared."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from efficientnet.command import require_least, require_positive
from perf.measurements.config import Threads


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
