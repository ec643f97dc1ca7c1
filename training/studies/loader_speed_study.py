"""A folder of JPEG images -> images per second of our training loader beside timm's."""

import gc
import logging
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from timm.data.dataset_factory import create_dataset
from timm.data.loader import create_loader
from tqdm import tqdm

from efficientnet.errors import PipelineError
from efficientnet.images.datasets import Sample, find_image_files
from efficientnet.machine.atomic import write_text
from efficientnet.machine.children import obey_parent
from efficientnet.machine.environment import current_environment
from efficientnet.measuring.contender import Contender, running
from efficientnet.measuring.turns import ratio, take_turns
from efficientnet.reporting.publishing import Measured, find_section, publish_record
from efficientnet.reporting.tables import Table, format_ms, format_rate, format_ratio
from training.batches.loader import train_batches
from training.batches.sampler import StepPlan, StepSampler
from training.recipe.config import ProgressiveConfig
from training.recipe.recipes import imagenet_recipe
from training.recipe.stages import plan_stages
from training.studies.config import LoaderSpeedConfig

JPEG_SUFFIXES = frozenset({".jpg", ".jpeg"})

TIMM, AGAIN, CPU, DEVICE = "timm", "timm again", "cpu", "device"
CONTENDERS = (TIMM, CPU, DEVICE, AGAIN)

SECTION = "loader"

NUM_RANDAUGMENT_LAYERS = 2
MIN_CROP_AREA = 0.05

log = logging.getLogger(__name__)


class LoaderSpeedError(PipelineError):
    """Nothing to load, or a loader that failed."""


class LoaderCase(BaseModel):
    """What was measured at one image size."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int
    """Pixels."""
    images_per_s: dict[str, tuple[float, ...]]
    """By contender, each turn: timm, timm again, cpu and device (where RandAugment runs)."""
    core_ms_per_image: dict[str, tuple[float, ...]]
    """Time of the workers on a core, to which other programs on the machine add little."""


class LoaderReport(Measured):
    """What one run of the command measured."""

    format_version: Literal[1] = 1
    num_images: int
    num_workers: int
    batch_size: int
    num_passes: int
    """Over the images in each turn, after one that does not count."""
    magnitude: int
    """Of RandAugment, of which two operations are applied."""
    cases: tuple[LoaderCase, ...]
    timm_version: str


@dataclass(frozen=True)
class Loaded:
    """What a turn gave."""

    images_per_s: float
    core_ms_per_image: float


def main(config: LoaderSpeedConfig) -> Path:
    """Measure, print the table and write the report."""
    started_at = datetime.now(UTC)
    if config.publish:
        find_section(config.readme, SECTION)
    files = find_jpegs(config.folder)
    log.info("%d images, %d workers per loader", len(files), config.num_workers)
    report = LoaderReport(
        num_images=len(files),
        num_workers=config.num_workers,
        batch_size=config.batch_size,
        num_passes=config.passes,
        magnitude=config.magnitude,
        cases=measure(files, config),
        timm_version=metadata.version("timm"),
        environment=current_environment(),
        started_at=started_at,
    )
    write_text(config.output, report.model_dump_json(indent=1) + "\n")
    print(to_table(report).aligned_text())
    if config.publish:
        about = (
            f"On {report.environment.processor}, timm {report.timm_version}, {started_at:%Y-%m-%d}."
        )
        text = f"{to_table(report).markdown()}\n\n{about}"
        publish_record(report, f"{SECTION}.json", config.readme, SECTION, text)
    return config.output


def find_jpegs(folder: Path) -> tuple[Path, ...]:
    """List the JPEG files of a folder and the folders in it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: expected one of JPEG images")
    files = [path for path in find_image_files(folder)[0] if path.suffix.lower() in JPEG_SUFFIXES]
    if not files:
        raise LoaderSpeedError(f"{folder} has no .jpg or .jpeg files: give a folder of photos")
    return tuple(files)


def measure(files: tuple[Path, ...], config: LoaderSpeedConfig) -> tuple[LoaderCase, ...]:
    """Let the loaders take turns at each size; only one of them works at a time."""
    batches_per_pass = max(len(files) // config.batch_size, 1)
    num_images = (config.passes + 1) * batches_per_pass * config.batch_size
    repeated = tuple(islice(cycle(files), num_images))
    num_turns = len(config.image_sizes) * config.rounds * len(CONTENDERS)
    processes = {name: Contender(name, partial(LoaderSubject, name, config)) for name in CONTENDERS}
    with (
        running(list(processes.values())),
        tqdm(total=num_turns, unit="turn", disable=None, leave=False) as bar,
    ):

        def case(image_size: int) -> LoaderCase:
            def turn(name: str, _: int) -> Loaded:
                bar.set_description(f"{image_size} px, {name}")
                loaded = processes[name].ask("turn", repeated, batches_per_pass, image_size)
                bar.update()
                return loaded

            turns = take_turns(CONTENDERS, config.rounds, turn).items()
            return LoaderCase(
                image_size=image_size,
                images_per_s={name: tuple(t.images_per_s for t in own) for name, own in turns},
                core_ms_per_image={
                    name: tuple(t.core_ms_per_image for t in own) for name, own in turns
                },
            )

        return tuple(map(case, config.image_sizes))


def to_table(report: LoaderReport) -> Table:
    """Lay out the medians of the turns, and the median and range of each turn's ratio to timm's."""
    columns = ("image size", "timm images/s", "cpu images/s", "device images/s")
    columns += ("cpu / timm", "device / timm", "timm / timm")
    columns += ("timm core ms", "cpu core ms", "device core ms")
    rows: list[tuple[str, ...]] = []
    for case in report.cases:
        rates, core_ms = case.images_per_s, case.core_ms_per_image
        ratios = (_ratio(rates[name], rates[TIMM]) for name in (CPU, DEVICE, AGAIN))
        rows.append(
            (
                f"{case.image_size} px",
                *(format_rate(statistics.median(rates[name])) for name in (TIMM, CPU, DEVICE)),
                *ratios,
                *(format_ms(statistics.median(core_ms[name])) for name in (TIMM, CPU, DEVICE)),
            )
        )
    note = (
        f"{report.num_images} images, {report.num_workers} workers, batches of "
        f"{report.batch_size}, RandAugment with {NUM_RANDAUGMENT_LAYERS} operations of magnitude "
        f"{report.magnitude}, in the workers (cpu) or not (device). Median and range of "
        f"{len(report.cases[0].images_per_s[TIMM])} turns; timm / timm is the noise. "
        "Core ms: time of the workers on a core per image."
    )
    return Table(columns, tuple(rows), notes=(note,))


def _ratio(rates: Sequence[float], reference: Sequence[float]) -> str:
    median, low, high = map(format_ratio, ratio(rates, reference))
    return f"{median} ({low} to {high})"


class LoaderSubject:
    """A contender's loader, in its own process, which begins its workers anew in each turn."""

    def __init__(self, contender: str, config: LoaderSpeedConfig) -> None:
        self._contender = contender
        self._config = config

    def turn(self, files: tuple[Path, ...], num_warm_up_batches: int, image_size: int) -> Loaded:
        """Load files, in number whole batches, the first of which do not count."""
        make = _timm_batches if self._contender in (TIMM, AGAIN) else _batches
        try:
            core_s = _core_s_of_children()
            batches = iter(make(files, image_size, self._config, self._contender))
            for _ in range(num_warm_up_batches):
                next(batches)
            num_images, begin = 0, time.perf_counter()
            for images, *_ in batches:
                num_images += len(images)
            seconds = time.perf_counter() - begin
            # Only of workers that have ended the time is known.
            del batches
            gc.collect()
            core_s = _core_s_of_children() - core_s
        # timm's and torch's own exceptions have no common base; a worker's message ends with what
        # it was, behind its traceback.
        except Exception as error:
            *_, last = (str(error).strip() or "(it has no message)").splitlines()
            raise LoaderSpeedError(f"{type(error).__name__}: {last}") from error
        return Loaded(num_images / seconds, 1000 * core_s / len(files))


def _core_s_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _batches(
    files: tuple[Path, ...], size: int, config: LoaderSpeedConfig, contender: str
) -> Iterable[Any]:
    magnitude = float(config.magnitude)
    train_config = replace(
        imagenet_recipe("v2-s"),
        progressive=ProgressiveConfig(
            (size, size), (magnitude, magnitude), (0, 0), (0, 0), num_stages=1
        ),
        epochs=1,
        batch_size=config.batch_size,
        micro_batch_size=None,
        min_crop_area=MIN_CROP_AREA,
        num_randaugment_layers=NUM_RANDAUGMENT_LAYERS,
        augment_on="device" if contender == DEVICE else "cpu",
    )
    samples = [Sample(path.name, 0, path) for path in files]
    plan = StepPlan(len(samples), train_config, [config.batch_size])
    stages = plan_stages(train_config.progressive)
    return train_batches(samples, train_config, stages, StepSampler(plan), config.num_workers)


def _timm_batches(
    files: tuple[Path, ...], size: int, config: LoaderSpeedConfig, _: str
) -> Iterable[Any]:
    dataset: Any = create_dataset("", str(config.folder), search_split=False)
    dataset.reader.samples = [(str(path), 0) for path in files]
    loader: Any = create_loader(
        dataset,
        input_size=(3, size, size),
        batch_size=config.batch_size,
        is_training=True,
        use_prefetcher=True,
        scale=(MIN_CROP_AREA, 1.0),
        hflip=0.5,
        color_jitter=0.0,
        # p: of each operation; mmax: the magnitude is not cut off at 10.
        auto_augment=f"rand-m{config.magnitude}-n{NUM_RANDAUGMENT_LAYERS}-p1-mmax100",
        interpolation=imagenet_recipe("v2-s").interpolation,
        num_workers=config.num_workers,
        device=torch.device("cpu"),
    )
    # What the prefetcher around it does is the device's work.
    batches = loader.loader
    batches.worker_init_fn = partial(_begin_timm_worker, batches.worker_init_fn)
    return batches


def _begin_timm_worker(theirs: Callable[[int], None], number: int) -> None:
    obey_parent()
    theirs(number)
