"""What can be set when runs are compared."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from efficientnet.command import JsonFlags


@dataclass(frozen=True)
class SideBySideConfig(JsonFlags):
    """What is compared."""

    result_file = Path("reports/side-by-side.json")

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of complete runs of one variant on the same images."""

    publish: bool = False
    """Write to reports/published/<date>-<device>/, and the table into docs/results.md."""

    readme: Path = Path("docs/results.md")

    def __post_init__(self) -> None:
        if len(self.runs) < 2:
            raise ValueError(f"{len(self.runs)} runs are named, expected at least two")
