"""A recipe's data -> training and held-out images, without those that cannot be decoded."""

import logging
from collections.abc import Collection
from dataclasses import replace

from efficientnet.datasets import (
    DIGITS,
    Dataset,
    hold_out,
    load_dataset,
    without_broken_images,
)
from efficientnet.shards import with_image_key
from training.config import TrainConfig
from training.distributed import Ranks, from_main
from training.named_sets import NAMED_SETS, prepare_named_set

log = logging.getLogger(__name__)


def load_training_data(
    config: TrainConfig, ranks: Ranks, left_out: Collection[str] | None
) -> Dataset:
    """Load what a run trains on and is evaluated with.

    Args:
        config: the recipe.
        ranks: of the processes; rank 0 prepares and checks, the others follow it.
        left_out: names of the images that the run was begun without; None = find them, for which
            every file is decoded once.

    Raises:
        FileNotFoundError, DatasetError: the data cannot be used.
    """
    source = config.data or DIGITS
    if source in NAMED_SETS:
        prepared = prepare_named_set(source, config.data_folder) if ranks.is_main else None
        source = str(from_main(prepared))
    if config.image_key is not None:
        source = with_image_key(source, config.image_key)
    dataset = load_dataset(source)
    if config.minival is not None:
        dataset = hold_out(dataset, config.minival)
    if left_out is None:
        names: list[str] = from_main(_names_of_broken(dataset) if ranks.is_main else [])
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
