"""A recipe's data -> training and held-out images, without those that cannot be decoded."""

import logging
import statistics
from collections.abc import Collection, Sequence
from dataclasses import replace

from efficientnet.images.datasets import (
    DIGITS,
    Dataset,
    Sample,
    hold_out,
    load_dataset,
    without_broken_images,
)
from efficientnet.images.preprocess import ImageError, decode_image
from efficientnet.images.shards import with_image_key
from training.inputs.named_sets import NAMED_SETS, prepare_named_set
from training.learning.distributed import Ranks, broadcast_from_rank0
from training.recipe.config import TrainConfig
from training.recipe.recipes import RecipeFacts

# Of them the size of a set's images is the median.
NUM_SIZED_IMAGES = 64

# What the named sets hold, so that to choose a recipe fetches nothing.
NAMED_FACTS = {
    "cifar10": RecipeFacts(50_000, 10, 32),
    "cifar100": RecipeFacts(50_000, 100, 32),
    "flowers102": RecipeFacts(2_040, 102, 500),
    "stanford_cars": RecipeFacts(8_144, 196, 483),
    "imagenet": RecipeFacts(1_281_167, 1_000, 375),
}

log = logging.getLogger(__name__)


def look_at(source: str | None, image_key: str | None) -> RecipeFacts:
    """Count images and classes, as load_training_data will find them, and measure some images.

    Logs nothing: what there is to say is said when they are loaded.
    """
    if source in NAMED_FACTS:
        return NAMED_FACTS[source]
    source = source or DIGITS
    logging.disable(logging.WARNING)
    try:
        dataset = load_dataset(with_image_key(source, image_key) if image_key else source)
    finally:
        logging.disable(logging.NOTSET)
    return RecipeFacts(
        len(dataset.train), len(dataset.class_names), _median_short_side(dataset.train)
    )


def _median_short_side(samples: Sequence[Sample]) -> int:
    sides: list[int] = []
    for sample in samples[:: max(len(samples) // NUM_SIZED_IMAGES, 1)]:
        try:
            sides.append(min(decode_image(sample.read()).size))
        except (ImageError, OSError):
            continue  # told, and counted, when the images are loaded
    return round(statistics.median(sides)) if sides else 1


def load_training_data(
    config: TrainConfig, ranks: Ranks, left_out: Collection[str] | None
) -> Dataset:
    """Load what a run trains on and is evaluated with.

    Rank 0 prepares and checks, the others follow it. `left_out` are the names of the images that
    the run was begun without; None = find them, for which every file is decoded once.
    """
    source = config.data or DIGITS
    if source in NAMED_SETS:
        prepared = prepare_named_set(source, config.data_folder) if ranks.is_main else None
        source = str(broadcast_from_rank0(prepared))
    if config.image_key is not None:
        source = with_image_key(source, config.image_key)
    dataset = load_dataset(source)
    if config.minival is not None:
        dataset = hold_out(dataset, config.minival)
    if left_out is None:
        names: list[str] = broadcast_from_rank0(_names_of_broken(dataset) if ranks.is_main else [])
        left_out = names
    return _without(dataset, set(left_out))


def _names_of_broken(dataset: Dataset) -> list[str]:
    checked = without_broken_images(dataset)
    for problem in checked.broken:
        log.warning("left out: %s", problem)
    if checked.broken:
        log.warning("left out %d images that cannot be decoded", len(checked.broken))
    kept = {sample.name for sample in (*checked.train, *checked.val)}
    return [s.name for s in (*dataset.train, *dataset.val) if s.name not in kept]


def _without(dataset: Dataset, names: set[str]) -> Dataset:
    if not names:
        return dataset
    return replace(
        dataset,
        train=tuple(s for s in dataset.train if s.name not in names),
        val=tuple(s for s in dataset.val if s.name not in names),
        broken=tuple(sorted(names)),
    )
