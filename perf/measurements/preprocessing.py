"""A folder of photos -> time and pixels of our preprocessing beside timm's, in one thread."""

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AwareDatetime, BaseModel, ConfigDict
from tqdm import tqdm

from efficientnet.images.preprocess import IMAGENET_MEAN, IMAGENET_STD, PreprocessSpec, preprocess
from efficientnet.machine.atomic import write_text
from efficientnet.machine.environment import EnvironmentRecord, current_environment
from efficientnet.reporting.publishing import find_section, published_directory, write_section
from efficientnet.reporting.tables import NOTHING, Table, format_ms, format_percent, format_ratio
from efficientnet.runtimes import Runtime, open_runtime
from perf.measurements import photo_contenders
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
    differences: dict[str, photo_contenders.Difference]
    """By method: exact, fast."""
    top1_agreement: float | None
    """Share of the photos, 0..1, of which the checkpoint says the same by exact and fast."""
    checkpoint_sha256: str | None
    environment: EnvironmentRecord
    started_at: AwareDatetime


class PreprocessingReport(BaseModel):
    """What one run of the command measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cases: tuple[PreprocessingRecord, ...]


def main(config: PreprocessingConfig) -> Path:
    """Measure, print the table and write the records."""
    if config.publish:
        find_section(config.readme, SECTION)
    photos = photo_contenders.read_photos(config.folder)
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
        path = published_directory(cases[0].started_at, [cases[0].environment]) / OUTPUT_FILE
        write_section(config.readme, SECTION, to_markdown(cases))
    write_text(path, PreprocessingReport(cases=tuple(cases)).model_dump_json(indent=1) + "\n")
    print(results_table(cases).aligned_text())
    return path


def measure_case(
    spec: PreprocessSpec, photos: list[bytes], num_rounds: int, runtime: Runtime | None
) -> PreprocessingRecord:
    """Measure one way of preprocessing by all contenders, and compare their pixels."""
    started_at = datetime.now(UTC)
    fast, exact = (spec.model_copy(update={"method": method}) for method in ("fast", "exact"))
    contenders: dict[str, photo_contenders.Contender] = {
        "timm": photo_contenders.timm_transform(spec),
        "exact": lambda data: preprocess(data, exact),
        "fast": lambda data: preprocess(data, fast),
        "timm again": photo_contenders.timm_transform(spec),
    }
    log.info("%d photos, %s", len(photos), describe(spec))
    ms = photo_contenders.measure(contenders, photos, num_rounds)
    comparison, same = photo_contenders.Comparison(spec), list[bool]()
    for photo in tqdm(photos, "comparing", unit="img", disable=None, leave=False):
        images = {name: contenders[name](photo) for name in ("exact", "fast")}
        comparison.add(images, contenders["timm"](photo).numpy())
        if runtime:
            same.append(len({_answer(runtime, image) for image in images.values()}) == 1)
    return PreprocessingRecord(
        spec=exact,
        num_images=len(photos),
        num_rounds=num_rounds,
        ms_per_image=ms,
        differences=comparison.differences(),
        top1_agreement=sum(same) / len(same) if same else None,
        checkpoint_sha256=runtime.info.program_sha256 if runtime else None,
        environment=current_environment(),
        started_at=started_at,
    )


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
