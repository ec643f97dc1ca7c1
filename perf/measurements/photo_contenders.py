"""Photos -> milliseconds of contenders that take turns, and how pixels differ from timm's."""

import io
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

from efficientnet.errors import PipelineError
from efficientnet.images.datasets import find_image_files
from efficientnet.images.preprocess import PreprocessSpec
from efficientnet.measuring.turns import take_turns

try:
    import torch
    from timm.data.transforms_factory import create_transform
except ImportError as missing:
    MISSING: ImportError | None = missing
else:
    MISSING = None

PHOTOS_PER_TURN = 16

Contender = Callable[[bytes], Any]


class PreprocessingError(PipelineError):
    """Nothing to compare, or nothing to compare with."""


class Difference(BaseModel):
    """How pixels differ from timm's, in counts of 255."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_counts: float
    mean_counts: float
    share_above_1: float
    """Share of values, 0..1, that are off by more than one count."""


def read_photos(folder: Path) -> list[bytes]:
    """Read all images of a folder, in the order of their paths."""
    paths, _ = find_image_files(folder)
    if not paths:
        raise PreprocessingError(f"no images in {folder}; give a folder of JPEG files")
    return [path.read_bytes() for path in paths]


def timm_transform(spec: PreprocessSpec) -> Contender:
    """Make what timm's validation does with the bytes of one image, in one thread."""
    if MISSING is not None:
        raise PreprocessingError(f"{MISSING}; timm is compared with: install the extra 'train'")
    torch.set_num_threads(1)  # pyright: ignore[reportPossiblyUnboundVariable]
    transform: Any = create_transform(  # pyright: ignore[reportPossiblyUnboundVariable]
        input_size=spec.image_size,
        interpolation=spec.interpolation,
        crop_pct=spec.crop_fraction or 1.0,
        crop_mode="squash" if spec.crop_fraction is None or spec.is_squashed else "center",
        mean=spec.mean,
        std=spec.std,
    )
    return lambda data: transform(Image.open(io.BytesIO(data)).convert("RGB"))


def measure(
    contenders: dict[str, Contender], photos: list[bytes], num_rounds: int
) -> dict[str, float]:
    """Let the contenders take turns; return each one's milliseconds per photo."""
    seconds = {name: np.empty((num_rounds, len(photos))) for name in contenders}
    for contender in contenders.values():
        contender(photos[0])
    starts = range(0, len(photos), PHOTOS_PER_TURN)
    visits = [(number, start) for number in range(num_rounds) for start in starts]

    def turn(name: str, number: int) -> None:
        round_number, start = visits[number]
        for photo in range(start, min(start + PHOTOS_PER_TURN, len(photos))):
            begin = time.perf_counter()
            contenders[name](photos[photo])
            seconds[name][round_number, photo] = time.perf_counter() - begin
        bar.update()

    num_turns = len(visits) * len(contenders)
    with tqdm(desc="measuring", total=num_turns, unit="turn", disable=None, leave=False) as bar:
        take_turns(contenders, len(visits), turn)
    return {name: 1000 * float(np.median(s, axis=0).mean()) for name, s in seconds.items()}


class Comparison:
    """Collects by how much normalized images [3, H, W] differ from timm's."""

    def __init__(self, spec: PreprocessSpec) -> None:
        self._counts = 255 * np.asarray(spec.std)[:, None, None]
        self._rows: dict[str, list[tuple[float, float, float]]] = {}

    def add(self, images: dict[str, NDArray[np.float32]], expected: NDArray[np.float32]) -> None:
        """Compare one photo's images, by method."""
        for name, image in images.items():
            distance = np.abs(image - expected) * self._counts
            # A difference of one count comes out of float32 as a little more.
            row = (float(distance.max()), float(distance.mean()), float((distance > 1.01).mean()))
            self._rows.setdefault(name, []).append(row)

    def differences(self) -> dict[str, Difference]:
        """Sum up by method."""
        return {
            name: Difference(
                max_counts=max(row[0] for row in rows),
                mean_counts=fmean(row[1] for row in rows),
                share_above_1=fmean(row[2] for row in rows),
            )
            for name, rows in self._rows.items()
        }
