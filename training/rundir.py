"""A run's directory: save what was reached, and go on from there.

runs/<variant>-<UTC time>/
    checkpoint/      see efficientnet/checkpoint.py
    metrics.jsonl    one line per epoch
    curves.png
runs/latest          the newest complete run
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from efficientnet.checkpoint import (
    RECORD_FILE,
    TRAIN_STATE_FILE,
    CheckpointError,
    CheckpointRecord,
    read_checkpoint,
    save_checkpoint,
)
from efficientnet.datasets import Dataset
from efficientnet.environment import current_environment
from efficientnet.preprocess import PreprocessSpec
from efficientnet.variants import NetworkOptions
from training.config import TrainConfig, config_from_json, config_to_json
from training.loop import Evaluation
from training.state import TrainState


@dataclass(frozen=True)
class Run:
    """One execution of training."""

    directory: Path
    config: TrainConfig
    dataset: Dataset
    preprocess: PreprocessSpec
    """Of evaluation and deployment."""
    network: NetworkOptions

    @property
    def checkpoint(self) -> Path:
        """The checkpoint's directory."""
        return self.directory / "checkpoint"

    @cached_property
    def data_fingerprint(self) -> str:
        """Hash of the names and labels of all images: a resumed run must find the same."""
        digest = hashlib.sha256()
        for part in (self.dataset.train, self.dataset.val):
            for sample in part:
                digest.update(f"{sample.label} {sample.name}\n".encode())
            digest.update(b"\n")
        return digest.hexdigest()


def save_run(run: Run, state: TrainState, epoch: int, evaluation: Evaluation | None) -> None:
    """Write the checkpoint in the place of the last one.

    Args:
        run: the run.
        state: of which the average is deployed and all is kept for resuming.
        epoch: whole epochs trained.
        evaluation: of the averaged weights; None within an epoch.
    """
    record = CheckpointRecord(
        variant=run.config.variant,
        num_classes=len(run.dataset.class_names),
        class_names=run.dataset.class_names,
        network=run.network,
        preprocess=run.preprocess,
        data=run.dataset.source,
        weights_sha256="",
        epoch=epoch,
        step=state.step,
        top1=evaluation.top1 if evaluation else None,
        top5=evaluation.top5 if evaluation else None,
        num_images_evaluated=evaluation.num_images if evaluation else 0,
        recipe=run.config.variant,
        train_config=config_to_json(run.config),
        environment=current_environment(),
    )
    saved = {"data_fingerprint": run.data_fingerprint, "state": state.to_dict()}
    save_checkpoint(run.checkpoint, state.average.tensors, record, saved)


@dataclass(frozen=True)
class SavedRun:
    """What a run needs to go on."""

    directory: Path
    config: TrainConfig
    record: CheckpointRecord
    values: dict[str, Any]
    """What save_run saved."""


def read_run(directory: Path, variant: str | None) -> SavedRun:
    """Read what a run needs to go on.

    Args:
        directory: of the run, or of its checkpoint.
        variant: what the run must train; None = whatever it trains.

    Raises:
        CheckpointError: no whole checkpoint, nothing left to train, or another variant.
    """
    run = directory.parent if (directory / RECORD_FILE).is_file() else directory
    checkpoint = run / "checkpoint"
    record = read_checkpoint(checkpoint)
    if variant is not None and variant != record.variant:
        raise CheckpointError(f"{run} trains {record.variant}, not {variant}")
    path = checkpoint / TRAIN_STATE_FILE
    if not path.is_file():
        raise CheckpointError(f"{checkpoint} has no {TRAIN_STATE_FILE}: it cannot be resumed")
    try:
        config = config_from_json(record.train_config)
        saved = torch.load(path, map_location="cpu", weights_only=True)
    # torch.load has no exception class of its own.
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if record.epoch >= config.epochs:
        raise CheckpointError(f"{run} is complete ({record.epoch} epochs): nothing to train")
    return SavedRun(run, config, record, saved)


def point_latest_to(run: Path) -> None:
    """Make `latest` beside a complete run point to it."""
    fresh = run.parent / f".latest-{run.name}"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(run.name)
    fresh.replace(run.parent / "latest")
