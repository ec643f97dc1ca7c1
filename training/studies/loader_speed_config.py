"""What can be set when the loaders are compared."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from efficientnet.command import require_least
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
