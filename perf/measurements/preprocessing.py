"""A folder of photos -> time and pixels of our preprocessing beside timm's, in one thread."""

import io
import logging
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict
from timm.data.transforms_factory import create_transform
from tqdm import tqdm

from efficientnet.images.datasets import read_photos
from efficientnet.images.preprocess import IMAGENET_MEAN, IMAGENET_STD, PreprocessSpec, preprocess
from efficientnet.machine.atomic import write_text
from efficientnet.machine.environment import current_environment
from efficientnet.measuring.turns import take_turns
from efficientnet.reporting import publishing
from efficientnet.reporting.tables import NOTHING, Table, format_ms, format_percent, format_ratio
from efficientnet.runtimes import Runtime, open_runtime
from perf.measurements.config import PreprocessingConfig

SECTION = "preprocessing"
OUTPUT_FILE = "preprocessing.json"

# Size, crop and filter of published weights, and two that are harder: little to resize.
PUBLISHED_CASES = (
    (224, 0.875, "bicubic"),  # B0
    (300, 0.904, "bicubic"),  # B3
    (380, 0.922, "bicubic"),  # B4
    (384, 1.0, "bicubic"),  # V2-S of timm
    (384, 1.0, "bilinear"),  # V2-S of torchvision
    (480, None, "bicubic"),  # V2-M and L of timm
    (480, 1.0, "bilinear"),  # V2-M of torchvision
    (224, 0.875, "bilinear"),
    (384, None, "bilinear"),
)

PHOTOS_PER_TURN = 16

Contender = Callable[[bytes], Any]

log = logging.getLogger(__name__)


class Difference(BaseModel):
    """How pixels differ from timm's, in counts of 255."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_counts: float
    mean_counts: float
    share_above_1: float
    """Share of values, 0..1, that are off by more than one count."""


class PreprocessingRecord(publishing.Measured):
    """What was measured."""

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


class PreprocessingReport(BaseModel):
    """What one run of the command measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cases: tuple[PreprocessingRecord, ...]


def main(config: PreprocessingConfig) -> Path:
    """Measure, print the table and write the records."""
    if config.publish:
        publishing.find_section(config.readme, SECTION)
    photos = read_photos(config.folder)
    runtime = None if config.checkpoint is None else open_runtime(config.checkpoint, 1)
    cases: list[PreprocessingRecord] = []
    if config.publish:
        for size, crop_fraction, interpolation in PUBLISHED_CASES:
            spec = _spec(size, interpolation, crop_fraction)
            cases.append(measure_case(spec, photos, config.rounds, None))
    if runtime:
        cases.append(measure_case(runtime.info.preprocess, photos, config.rounds, runtime))
    elif not config.publish:
        spec = _spec(config.size, config.interpolation, config.crop_fraction)
        cases.append(measure_case(spec, photos, config.rounds, None))
    path = config.output
    if config.publish:
        path = (
            publishing.published_directory(cases[0].started_at, [cases[0].environment])
            / OUTPUT_FILE
        )
        environments = [case.environment for case in cases]
        publishing.write_section(config.readme, SECTION, to_markdown(cases), environments)
    write_text(path, PreprocessingReport(cases=tuple(cases)).model_dump_json(indent=1) + "\n")
    print(results_table(cases).aligned_text())
    return path


def measure_case(
    spec: PreprocessSpec, photos: list[bytes], num_rounds: int, runtime: Runtime | None
) -> PreprocessingRecord:
    """Measure one way of preprocessing by all contenders, and compare their pixels."""
    started_at = datetime.now(UTC)
    fast, exact = (spec.model_copy(update={"method": method}) for method in ("fast", "exact"))
    contenders: dict[str, Contender] = {
        "timm": timm_transform(spec),
        "exact": lambda data: preprocess(data, exact),
        "fast": lambda data: preprocess(data, fast),
        "timm again": timm_transform(spec),
    }
    log.info("%d photos, %s", len(photos), describe(spec))
    ms = measure(contenders, photos, num_rounds)
    off_by: dict[str, list[tuple[float, float, float]]] = {"exact": [], "fast": []}
    same: list[bool] = []
    for photo in tqdm(photos, "comparing", unit="img", disable=None, leave=False):
        images = {name: contenders[name](photo) for name in off_by}
        expected = contenders["timm"](photo).numpy()
        for name, image in images.items():
            off_by[name].append(off_by_counts(image, expected, spec))
        if runtime:
            same.append(len({_answer(runtime, image) for image in images.values()}) == 1)
    differences = {
        name: Difference(
            max_counts=max(own[0] for own in rows),
            mean_counts=fmean(own[1] for own in rows),
            share_above_1=fmean(own[2] for own in rows),
        )
        for name, rows in off_by.items()
    }
    return PreprocessingRecord(
        spec=exact,
        num_images=len(photos),
        num_rounds=num_rounds,
        ms_per_image=ms,
        differences=differences,
        top1_agreement=sum(same) / len(same) if same else None,
        checkpoint_sha256=runtime.info.program_sha256 if runtime else None,
        environment=current_environment(),
        started_at=started_at,
    )


def timm_transform(spec: PreprocessSpec) -> Contender:
    """Make what timm's validation does with the bytes of one image, in one thread."""
    torch.set_num_threads(1)
    transform: Any = create_transform(
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
    for contender in contenders.values():
        contender(photos[0])
    starts = range(0, len(photos), PHOTOS_PER_TURN)
    visits = [start for _ in range(num_rounds) for start in starts]

    def turn(name: str, number: int) -> list[float]:
        seconds: list[float] = []
        for photo in photos[visits[number] :][:PHOTOS_PER_TURN]:
            begin = time.perf_counter()
            contenders[name](photo)
            seconds.append(time.perf_counter() - begin)
        bar.update()
        return seconds

    num_turns = len(visits) * len(contenders)
    with tqdm(desc="measuring", total=num_turns, unit="turn", disable=None, leave=False) as bar:
        turns = take_turns(contenders, len(visits), turn)
    rounds = {name: np.concatenate(own).reshape(num_rounds, -1) for name, own in turns.items()}
    return {name: 1000 * float(np.median(own, axis=0).mean()) for name, own in rounds.items()}


def off_by_counts(
    image: NDArray[np.float32], expected: NDArray[np.float32], spec: PreprocessSpec
) -> tuple[float, float, float]:
    """Return how far normalized pixels [3, H, W] are off: most, mean, and how many by over 1."""
    distance = np.abs(image - expected) * (255 * np.asarray(spec.std)[:, None, None])
    # A difference of one count comes out of float32 as a little more.
    return float(distance.max()), float(distance.mean()), float((distance > 1.01).mean())


def describe(spec: PreprocessSpec) -> str:
    """Write size, cropping and filter in words."""
    cut = "squash" if spec.crop_fraction is None else f"crop {spec.crop_fraction:g}"
    if spec.is_squashed and spec.crop_fraction is not None:
        cut = f"squash, {cut}"
    return f"{spec.image_size} px, {cut}, {spec.interpolation}"


def results_table(cases: Sequence[PreprocessingRecord]) -> Table:
    """Lay out the times, their ratios to timm's, and how the pixels differ from timm's."""
    columns = ("preprocessing", "timm ms", "exact / timm", "fast / timm", "timm / timm")
    columns += ("exact: largest difference", "fast: mean difference", "off by > 1", "same top-1")
    rows: list[tuple[str, ...]] = []
    for case in cases:
        ms, exact, fast = case.ms_per_image, case.differences["exact"], case.differences["fast"]
        ratios = (ms[name] / ms["timm"] for name in ("exact", "fast", "timm again"))
        agreement = case.top1_agreement
        rows.append(
            (
                describe(case.spec),
                format_ms(ms["timm"]),
                *map(format_ratio, ratios),
                f"{exact.max_counts:.0f}",
                f"{fast.mean_counts:.1f}",
                format_percent(fast.share_above_1, 0),
                NOTHING if agreement is None else format_percent(agreement),
            )
        )
    return Table(columns, tuple(rows), frozenset(columns[:1]))


def to_markdown(cases: Sequence[PreprocessingRecord]) -> str:
    """Write the table and how it was measured."""
    environment = cases[0].environment
    return (
        f"{results_table(cases).markdown()}\n\n"
        f"From the bytes of a file to the tensor, one thread of {environment.processor}, "
        f"{cases[0].num_images} photos, contenders taking turns, {cases[0].started_at:%Y-%m-%d} "
        "UTC. timm / timm is the noise. Differences are from timm's pixels, in counts of 255. Same "
        "top-1: how many photos one network classifies the same after exact and fast.\n"
    )


def _answer(runtime: Runtime, image: NDArray[np.float32]) -> int:
    return int(runtime.infer(image[None])[0].argmax())


def _spec(size: int, interpolation: str, crop_fraction: float | None) -> PreprocessSpec:
    return PreprocessSpec.model_validate(
        {
            "image_size": size,
            "interpolation": interpolation,
            "crop_fraction": crop_fraction,
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
        }
    )
