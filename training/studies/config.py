"""What can be set when loaders or finished runs are compared, and in every long study."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import tyro

from efficientnet.command import JsonFlags, require_least, require_only_publishing
from efficientnet.images.datasets import data_name
from training.recipe.config import MAX_RANDAUGMENT_MAGNITUDE


@dataclass(frozen=True)
class LoaderSpeedConfig:
    """Settings of the comparison."""

    folder: tyro.conf.Positional[Path]
    """Folder of JPEG images, with folders in it or without."""

    image_sizes: tuple[int, ...] = (128, 224, 300)
    """Height and width of the batches, pixels."""

    num_workers: int = 2
    """Processes of each loader."""

    batch_size: int = 32

    rounds: int = 5
    """Turns of each loader at each size."""

    passes: int = 4
    """Over the images in each turn, after one that does not count."""

    magnitude: int = 10
    """Of RandAugment, 3..30."""

    output: Path = Path("reports/loader.json")
    """File that is written."""

    publish: bool = False
    """Also write it to reports/published/<date>-<device>/, and the table into docs/results.md."""

    readme: Path = Path("docs/results.md")

    def __post_init__(self) -> None:
        require_least(self, num_workers=1, batch_size=1, rounds=1, passes=1, image_sizes=16)
        if not 3 <= self.magnitude <= MAX_RANDAUGMENT_MAGNITUDE:
            raise ValueError(
                f"--magnitude is {self.magnitude}, expected 3 to {MAX_RANDAUGMENT_MAGNITUDE:g}"
            )


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


@dataclass(frozen=True, kw_only=True)
class StudyFlags:
    """Flags of a study that goes on where it was, and whose record can be written again."""

    kind: ClassVar[str]

    data: str | None = None
    """As in training/run.py; None = the digits."""

    name: str | None = None
    """None = that of the data. The same name goes on with a study."""

    output: Path | None = None
    """Folder of the results; None = runs/KIND-NAME, as runs/search-digits."""

    publish: bool = False
    """Copy the results to reports/published/<date>-<device>/ and a section into docs/results.md."""

    readme: Path = Path("docs/results.md")

    record: Path | None = None
    """Train nothing: write text and pictures of this record (a .json of the results, or a published
    one) again, beside it; with --publish where published ones go, and into docs/results.md."""

    def __post_init__(self) -> None:
        if "/" in self.title:
            raise ValueError(f"name is {self.title!r}, expected a file name's part; give --name")
        require_only_publishing(self, "what was trained")

    @property
    def data_name(self) -> str:
        """The data's name, without a path of this machine."""
        return data_name(self.data)

    @property
    def title(self) -> str:
        """The study's name."""
        return self.name or self.data_name

    @property
    def directory(self) -> Path:
        """The folder of the results."""
        return self.output or Path("runs") / f"{self.kind}-{self.title}"
