"""What can be set when a GPU is asked all at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from efficientnet.command import require_positive

Part = Literal[
    "tests",
    "limits",
    "network",
    "training",
    "compile",
    "aoti",
    "loader",
    "onnxruntime",
    "tensorrt",
    "tensorrt-rtx",
]


@dataclass(frozen=True)
class DeviceConfig:
    """What is asked, and for how long."""

    parts: tuple[Part, ...] = get_args(Part)
    """tests: pytest -m gpu. limits: copies and matrix products. network: eager and as a CUDA graph.
    compile: torch.compile. training: a step beside timm's. loader: the step fed by the loader, and
    the loader beside timm's. The others: exports, measured as artifacts."""

    minutes: float = 8.0
    """Time for all parts together; a job that has not ended then is ended."""

    output: Path | None = None
    """Folder of the records; one that is there is gone on with. None =
    reports/device/<date>-<device>."""

    dry_run: bool = False
    """On the CPU, with the smallest networks and few repetitions."""

    def __post_init__(self) -> None:
        require_positive(self, "minutes")
        if not self.parts:
            raise ValueError(f"--parts names none, expected some of {', '.join(get_args(Part))}")
