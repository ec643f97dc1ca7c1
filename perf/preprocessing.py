"""A folder of photos -> time and pixels of our preprocessing beside timm's, in one thread.

timm's transform, the methods exact and fast, and timm's again (the noise of the comparison) take
turns over the same photos, from the bytes of a file to the tensor. A photo's time is the median of
its rounds, a contender's the mean over the photos.

    python perf/preprocessing.py photos
    python perf/preprocessing.py photos --size 384 --crop-fraction None
    python perf/preprocessing.py photos --checkpoint runs/latest/checkpoint
"""

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from numpy.typing import NDArray
from pydantic import AwareDatetime, BaseModel, ConfigDict
from tqdm import tqdm

from efficientnet.atomic import write_text
from efficientnet.command import parse_flags, run_command
from efficientnet.environment import EnvironmentRecord, current_environment
from efficientnet.preprocess import IMAGENET_MEAN, IMAGENET_STD, PreprocessSpec, preprocess
from efficientnet.runtimes import Runtime, open_runtime
from efficientnet.tables import Table, format_percent, format_ratio
from perf.contenders import Comparison, Contender, Difference, measure, read_photos, timm_transform

log = logging.getLogger(__name__)


class PreprocessingRecord(BaseModel):
    """What was measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    spec: PreprocessSpec
    num_images: int
    num_rounds: int
    ms_per_image: dict[str, float]
    """By contender: timm, timm again, exact, fast."""
    differences: dict[str, Difference]
    """By method: exact, fast."""
    top1_agreement: float | None
    """Share of the photos, 0..1, of which the checkpoint says the same by exact and fast."""
    checkpoint_sha256: str | None
    environment: EnvironmentRecord
    started_at: AwareDatetime


@dataclass(frozen=True)
class PreprocessingConfig:
    """Settings of the comparison."""

    folder: tyro.conf.Positional[Path]
    """Folder of photos, with folders in it or without."""

    size: int = 224
    """Height and width of the tensor, pixels; with --checkpoint, its own."""

    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """With --checkpoint, its own."""

    crop_fraction: float | None = 0.875
    """None: squash to the square; with --checkpoint, its own."""

    checkpoint: Path | None = None
    """Checkpoint or artifact whose preprocessing is measured, and whose answers by exact and fast
    are compared; None = not used."""

    rounds: int = 5
    """Times that each contender sees each photo, at least 1."""

    output: Path = Path("reports/preprocessing.json")
    """File that is written."""

    def __post_init__(self) -> None:
        """Check the limits."""
        for flag, value in (("--size", self.size), ("--rounds", self.rounds)):
            if value < 1:
                raise ValueError(f"{flag} is {value}, expected at least 1")
        if self.crop_fraction is not None and not 0 < self.crop_fraction <= 1:
            raise ValueError(
                f"--crop-fraction is {self.crop_fraction:g}, expected above 0, up to 1"
            )


def main(config: PreprocessingConfig) -> Path:
    """Measure, print the table and write the record.

    Raises:
        PreprocessingError: no photos, or timm is missing.
        ArtifactError, CheckpointError: the checkpoint is not what it should be.
        ImageError: a photo cannot be decoded.
    """
    started_at = datetime.now(UTC)
    photos = read_photos(config.folder)
    runtime = None if config.checkpoint is None else open_runtime(config.checkpoint, 1)
    spec = runtime.info.preprocess if runtime else _spec(config)
    fast, exact = (spec.model_copy(update={"method": method}) for method in ("fast", "exact"))
    contenders: dict[str, Contender] = {
        "timm": timm_transform(spec),
        "exact": lambda data: preprocess(data, exact),
        "fast": lambda data: preprocess(data, fast),
        "timm again": timm_transform(spec),
    }
    log.info("%d photos, %s", len(photos), spec.model_dump_json(exclude={"method"}))
    ms = measure(contenders, photos, config.rounds)
    comparison, same = Comparison(spec), list[bool]()
    for photo in tqdm(photos, "comparing", unit="img", disable=None, leave=False):
        images = {name: contenders[name](photo) for name in ("exact", "fast")}
        comparison.add(images, contenders["timm"](photo).numpy())
        if runtime:
            same.append(len({_answer(runtime, image) for image in images.values()}) == 1)
    record = PreprocessingRecord(
        spec=exact,
        num_images=len(photos),
        num_rounds=config.rounds,
        ms_per_image=ms,
        differences=comparison.differences(),
        top1_agreement=sum(same) / len(same) if same else None,
        checkpoint_sha256=runtime.info.program_sha256 if runtime else None,
        environment=current_environment(),
        started_at=started_at,
    )
    write_text(config.output, record.model_dump_json(indent=2) + "\n")
    print(results_table(record).aligned_text())
    if record.top1_agreement is not None:
        print(f"top-1 agreement of fast with exact: {format_percent(record.top1_agreement, 2)}")
    return config.output


def results_table(record: PreprocessingRecord) -> Table:
    """Lay out times, ratios to timm's, and how pixels differ from timm's."""
    rows: list[tuple[str, ...]] = []
    for name, ms in record.ms_per_image.items():
        difference = record.differences.get(name)
        pixels = ("-", "-", "-")
        if difference:
            share = format_percent(difference.share_above_1, 2)
            pixels = (f"{difference.max_counts:.1f}", f"{difference.mean_counts:.3f}", share)
        ratio = format_ratio(ms / record.ms_per_image["timm"])
        rows.append((name, f"{ms:.2f}", ratio, *pixels))
    columns = ("", "ms/image", "ratio to timm", "max counts", "mean counts", "off by > 1")
    return Table(columns, tuple(rows), frozenset([""]))


def _answer(runtime: Runtime, image: NDArray[np.float32]) -> int:
    return int(runtime.infer(image[None])[0].argmax())


def _spec(config: PreprocessingConfig) -> PreprocessSpec:
    return PreprocessSpec(
        image_size=config.size,
        interpolation=config.interpolation,
        crop_fraction=config.crop_fraction,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


if __name__ == "__main__":
    run_command(lambda: parse_flags(PreprocessingConfig, __doc__), main)
