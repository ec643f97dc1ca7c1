"""Searches that are over in a second: two stages, two steps, the digits loaded once a process."""

from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from efficientnet.network.variant_file import write_variant_file
from efficientnet.network.variants import VARIANTS
from training.searching.experiment import Experiment, prepare
from training.searching.search_config import SearchConfig
from training.searching.search_record import SearchRecord, collect
from training.searching.storage import open_storage
from training.searching.study import open_study, setting_of
from training.searching.worker import Worker

# Of each stage one layer, fused, that expands by 1 or 4.
FOUR_NETWORKS: dict[str, Any] = {
    "operators": ("fused_mbconv",),
    "kernel_sizes": (3,),
    "expand_ratios": (1, 4),
    "layer_changes": (-9,),
}

_BRIEF: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 16,
    "flags": "--steps 2",
    "minival": 0.05,
    "turns": 2,
    "turn_seconds": 0.001,
    "trials": 3,
    "seeds": 0,
    "name": "brief",
}


def brief(output: Path, **changes: Any) -> SearchConfig:
    """As little as a network can be trained and measured."""
    backbone = output / "backbone.json"
    if "backbone" not in changes and not backbone.exists():
        tiny = VARIANTS["tiny"]
        write_variant_file(backbone, replace(tiny, name="two", stages=tiny.stages[:2]), {})
    return SearchConfig(**{**_BRIEF, "backbone": str(backbone), "output": output, **changes})


def worker_of(config: SearchConfig) -> Worker:
    """Join, or begin, a study without what comes after it."""
    experiment, space = _experiment_of(config), config.space()
    storage = open_storage(config.storage, config.directory, 5, config.heartbeat)
    study = open_study(config, storage, setting_of(config, experiment, space))
    return Worker(config, experiment, space, study, storage, None)


def searched(config: SearchConfig) -> SearchRecord:
    """Search, and draw nothing of it."""
    worker = worker_of(config)
    worker.run()
    return collect(config, worker.study, worker.space, len(worker.experiment.held_out))


def outcomes(record: SearchRecord) -> Counter[str]:
    """Count the trials by what came of them."""
    return Counter(trial.outcome for trial in record.trials)


def _experiment_of(config: SearchConfig) -> Experiment:
    return _prepared(config.epochs, config.flags, config.minival, config.image_size)


@cache
def _prepared(epochs: int, flags: str, minival: float, image_size: int) -> Experiment:
    changes = {"epochs": epochs, "flags": flags, "minival": minival, "image_size": image_size}
    return prepare(SearchConfig(**{**_BRIEF, **changes}))
