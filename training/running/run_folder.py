"""A run's directory: save what was reached, and go on from there.

runs/<variant>-<UTC time>/
    checkpoints/step-0001234/   see efficientnet/formats/checkpoint.py; the last ones and the best
    checkpoint                  the newest of them
    best                        that of the highest top-1
    metrics.jsonl               one line per epoch
    curves.png
    report.md, confusion.png    when the run is complete
    tensorboard/
runs/latest                     the newest complete run
"""

import hashlib
import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch

from efficientnet.formats.checkpoint import (
    RECORD_FILE,
    TRAIN_STATE_FILE,
    CheckpointError,
    CheckpointRecord,
    read_checkpoint,
    save_checkpoint,
)
from efficientnet.images.datasets import Dataset, data_name
from efficientnet.images.preprocess_spec import PreprocessSpec
from efficientnet.machine.atomic import dangling_link_hint, point_link
from efficientnet.machine.environment import current_environment
from efficientnet.network.variants import NetworkOptions
from training.batches.sampler import StepPlan
from training.learning.distributed import Ranks
from training.learning.evaluation import Evaluation
from training.learning.state import TrainState
from training.recipe.config import TrainConfig, config_from_json, config_to_json
from training.recipe.stages import Stage
from training.running.metrics import EpochMetrics, draw_curves, write_metrics

CHECKPOINT, BEST, CHECKPOINTS = "checkpoint", "best", "checkpoints"
REPORT_FILE = "report.md"
STEP_PREFIX = "step-"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """All that training begins, or goes on, with."""

    directory: Path
    config: TrainConfig
    dataset: Dataset
    preprocess: PreprocessSpec
    """Of evaluation and deployment."""
    network: NetworkOptions
    ranks: Ranks
    stages: tuple[Stage, ...]
    plan: StepPlan
    state: TrainState
    """Changed in place."""

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint's directory."""
        return self.directory / CHECKPOINT

    @cached_property
    def data_fingerprint(self) -> str:
        """See fingerprint_of."""
        return fingerprint_of(self.dataset)


def fingerprint_of(dataset: Dataset) -> str:
    """Hash the names and labels of all images: a resumed run must find the same."""
    digest = hashlib.sha256()
    for part in (dataset.train, dataset.val):
        for sample in part:
            digest.update(f"{sample.label} {sample.name}\n".encode())
        digest.update(b"\n")
    return digest.hexdigest()


class CheckpointWriter:
    """Writes checkpoints beside the training, one at a time; training only waits for the copy.

    A checkpoint that cannot be written (a full disk) is told in the log and leaves the older ones
    whole; training goes on, and the next one is tried again.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._failure: OSError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What is being written must be whole unless something else went wrong.
        self.close(must_be_written=kind is None)

    def save(self, state: TrainState, epoch: int, evaluation: Evaluation | None) -> None:
        """Copy the state after whole epochs, or within one if there is no evaluation; write it."""
        self.wait()
        values = state.to_dict()
        self._pending = self._thread.submit(self._write, values, epoch, evaluation)

    def wait(self) -> None:
        """Wait for what is being written."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
            self._failure = None
        except OSError as error:
            self._failure = error
            kept = self._run.checkpoint
            log.error(
                "the checkpoint could not be written: %s; %s; training goes on and tries again at "
                "the next one: free some space",
                error,
                f"the older one is whole: {kept.resolve()}" if kept.exists() else "there is none",
            )

    def close(self, must_be_written: bool) -> None:
        """Wait, and end the thread; OSError if the last checkpoint could not be written."""
        self.wait()
        self._thread.shutdown()
        if must_be_written and self._failure is not None:
            raise self._failure

    def _write(self, values: dict[str, Any], epoch: int, evaluation: Evaluation | None) -> None:
        run, step = self._run, values["step"]
        record = CheckpointRecord(
            variant=run.config.variant,
            architecture=run.config.architecture,
            num_classes=len(run.dataset.class_names),
            class_names=run.dataset.class_names,
            network=run.network,
            preprocess=run.preprocess,
            data=run.dataset.source,
            weights_sha256="",
            epoch=epoch,
            step=step,
            top1=evaluation.top1 if evaluation else None,
            top5=evaluation.top5 if evaluation else None,
            num_images_evaluated=evaluation.num_images if evaluation else 0,
            recipe=f"{run.config.recipe}-{run.config.variant}",
            train_config=config_to_json(run.config),
            environment=current_environment(),
        )
        saved = {
            "data_fingerprint": run.data_fingerprint,
            "left_out": list(run.dataset.broken),
            "state": values,
        }
        name = _folder_of(step)
        save_checkpoint(
            run.directory / CHECKPOINTS / name, values["average"]["tensors"], record, saved
        )
        # Each link is exchanged in one step: whenever the process is killed, it names a checkpoint
        # that is whole.
        point_link(run.checkpoint, Path(CHECKPOINTS) / name)
        publish(run, values["best"], values["history"] if evaluation else [])


def publish(run: Run, best: dict[str, float] | None, history: Sequence[dict[str, Any]]) -> None:
    """Bring a run's links, kept checkpoints, metrics and curves up to a saved state.

    Done again when a run is gone on with: it may have been killed just before. Without a history,
    metrics and curves stay as they are.
    """
    name = _folder_of(int(best["step"])) if best else None
    if name and (run.directory / CHECKPOINTS / name).is_dir():
        point_link(run.directory / BEST, Path(CHECKPOINTS) / name)
    remove_checkpoints(run.directory, run.config.keep_checkpoints)
    if history:
        epochs = [EpochMetrics(**epoch) for epoch in history]
        write_metrics(run.directory, epochs)
        title = f"{run.config.variant} on {data_name(run.dataset.source)}"
        draw_curves(run.directory, epochs, title, len(run.dataset.class_names))


def _folder_of(step: int) -> str:
    return f"{STEP_PREFIX}{step:07d}"


def remove_checkpoints(run: Path, keep: int) -> None:
    """Remove all checkpoints but the last ones and the best."""
    found = sorted((run / CHECKPOINTS).glob(f"{STEP_PREFIX}*"))
    links = {(run / link).resolve() for link in (CHECKPOINT, BEST)}
    for path in found[:-keep]:
        if path.resolve() not in links:
            shutil.rmtree(path)


def remove_unfinished(run: Path, step: int) -> None:
    """Remove what a killed run left behind: half-written checkpoints, and those after `step`."""
    kept = _folder_of(step)
    if (run / CHECKPOINTS / kept).is_dir():
        # Before the later ones go: it must never name a checkpoint that is no more.
        point_link(run / CHECKPOINT, Path(CHECKPOINTS) / kept)
    for path in (run / CHECKPOINTS).glob(".step-*"):
        shutil.rmtree(path)
    for path in sorted((run / CHECKPOINTS).glob(f"{STEP_PREFIX}*")):
        if int(path.name.removeprefix(STEP_PREFIX)) > step:
            log.info("remove %s, which is later than step %d", path, step)
            shutil.rmtree(path)
    best = run / BEST
    if best.is_symlink() and not best.exists():
        best.unlink()


@dataclass(frozen=True)
class SavedRun:
    """What a run needs to go on."""

    directory: Path
    config: TrainConfig
    record: CheckpointRecord
    state: dict[str, Any]
    """What TrainState.to_dict made."""
    data_fingerprint: str
    left_out: tuple[str, ...]
    """Names of the images that cannot be decoded."""

    def require_dataset(self, dataset: Dataset) -> None:
        """Raise a CheckpointError unless the images and classes are those the run began with."""
        begun, found = self.record.class_names, dataset.class_names
        if found != begun:
            first = next(
                (
                    f"{new!r} in the place of {old!r}"
                    for old, new in zip(begun, found, strict=False)
                    if old != new
                ),
                "one list ends before the other",
            )
            raise CheckpointError(
                f"{dataset.source} has {len(found)} classes that are not the {len(begun)} that "
                f"{self.directory} was started with ({first}); put the data back, or start a new "
                "run with --weights"
            )
        if self.data_fingerprint != fingerprint_of(dataset):
            raise CheckpointError(
                f"the images of {dataset.source} are not those that {self.directory} was started "
                "with; put the data back, say by --data where it is now, or start a new run"
            )


def run_of(directory: Path) -> tuple[Path, Path]:
    """Return a run and its newest checkpoint, or that of the run's checkpoints which is given."""
    if (directory / RECORD_FILE).is_file():
        checkpoint = directory.resolve()
        return checkpoint.parent.parent, checkpoint
    return directory, (directory / CHECKPOINT).resolve()


def read_recipe(directory: Path) -> TrainConfig:
    """Read what a run was begun with, or last gone on with."""
    _, checkpoint = run_of(directory)
    values = read_checkpoint(checkpoint).train_config
    try:
        return config_from_json(values)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint} has a recipe of another version: {error}") from None


def read_run(directory: Path, variant: str | None = None) -> SavedRun:
    """Read what a run, or one of its checkpoints, needs to go on; it must train the variant given.

    Raises:
        CheckpointError: no whole checkpoint, nothing left to train, or another variant.
    """
    run, checkpoint = run_of(directory)
    try:
        record = read_checkpoint(checkpoint)
    except CheckpointError as error:
        others = sorted(path for path in (run / CHECKPOINTS).glob("step-*") if path != checkpoint)
        hint = dangling_link_hint(directory) or dangling_link_hint(run / CHECKPOINT)
        hint += f"; an older one is there: --resume {others[-1]}" if others else ""
        raise CheckpointError(f"{error}{hint}") from None
    if variant is not None and variant != record.variant:
        raise CheckpointError(f"{run} trains {record.variant}, not {variant}")
    path = checkpoint / TRAIN_STATE_FILE
    if not path.is_file():
        raise CheckpointError(f"{checkpoint} has no {TRAIN_STATE_FILE}: it cannot be resumed")
    try:
        config = config_from_json(record.train_config)
        saved = torch.load(path, map_location="cpu", weights_only=True)
        state, fingerprint = saved["state"], saved["data_fingerprint"]
        left_out = tuple(saved["left_out"])
    # torch.load has no exception class of its own.
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged or of an older version of this project: {error}"
        ) from error
    if is_complete(run):
        raise CheckpointError(f"{run} is complete ({record.epoch} epochs): nothing to train")
    return SavedRun(run, config, record, state, fingerprint, left_out)


def is_complete(run: Path) -> bool:
    """Tell whether a run has come to its end: its report is written last."""
    return (run / REPORT_FILE).is_file()


def point_latest_to(run: Path) -> None:
    """Make `latest` beside a complete run point to it."""
    point_link(run.parent / "latest", Path(run.name))
