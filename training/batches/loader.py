"""Labelled images -> batches of tensors, in an order that follows from the seed and the step."""

import multiprocessing
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from efficientnet.errors import PipelineError
from efficientnet.images.datasets import Sample
from efficientnet.images.preprocess import ImageError, PreprocessSpec, preprocess
from efficientnet.machine.children import kill_children_at_exit, obey_parent
from training.batches.augmentation import Augmentation
from training.batches.sampler import SampleKey, StepSampler
from training.recipe.config import TrainConfig
from training.recipe.stages import Stage

EVAL_BATCH_SIZE = 64

# Within which a process that has died is seen to have.
SEEN_S = 5.0


class LoaderError(PipelineError):
    """A process that decodes and augments has died."""


class Batch(NamedTuple):
    """Images of one forward pass, before they are normalized."""

    images: Tensor
    """uint8 [N, 3, H, W], in memory as [N, H, W, 3] (channels_last)."""
    labels: Tensor
    """int64 [N]."""
    seeds: Tensor
    """int64 [N], of each image's random numbers."""


class TrainImages(Dataset[Any]):
    """Decoded and augmented images; indexed by SampleKey."""

    def __init__(
        self, samples: Sequence[Sample], config: TrainConfig, stages: Sequence[Stage]
    ) -> None:
        self._samples = samples
        self._augmentations = [Augmentation(config, stage) for stage in stages]

    def __getitem__(self, key: SampleKey) -> tuple[NDArray[np.uint8], int, int]:
        """Return uint8 RGB [size, size, 3] of the key's stage, the label, and the seed."""
        sample = self._samples[key.image]
        with _named_errors(sample):
            pixels = self._augmentations[key.stage](sample.read(), key.seed)
        return pixels, sample.label, key.seed


class EvalImages(Dataset[Any]):
    """Images as deployment prepares them."""

    def __init__(self, samples: Sequence[Sample], spec: PreprocessSpec) -> None:
        self._samples = samples
        self._spec = spec

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return float32 [3, size, size] and the label."""
        sample = self._samples[index]
        with _named_errors(sample):
            image = preprocess(sample.read(), self._spec)
        return torch.from_numpy(image), sample.label


def train_batches(
    samples: Sequence[Sample],
    config: TrainConfig,
    stages: Sequence[Stage],
    sampler: StepSampler,
    num_workers: int,
) -> DataLoader[Any]:
    """Return the loader of all forward passes that are left, each a Batch.

    Its own generator keeps it from drawing from the global one, on which dropout depends.
    """
    kill_children_at_exit()
    return _Loader(
        TrainImages(samples, config, stages),
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),
    )


def eval_batches(
    samples: Sequence[Sample], spec: PreprocessSpec, num_workers: int
) -> DataLoader[Any]:
    """Return the loader of the held-out images in order: images [N, 3, H, W], labels [N]."""
    kill_children_at_exit()
    return _Loader(
        EvalImages(samples, spec),
        batch_size=EVAL_BATCH_SIZE,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),
    )


@contextmanager
def explained_worker_deaths() -> Generator[None]:
    """Turn torch's RuntimeError, raised wherever the main thread is, into a LoaderError."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise _died(str(error).rstrip()) from None


class _Loader(DataLoader[Any]):
    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        others = set(multiprocessing.active_children())
        batches = super().__iter__()
        workers = set(multiprocessing.active_children()) - others
        try:
            yield from batches
        except (ImageError, PipelineError) as error:
            # torch's frame that raises it holds it, and it holds the frame: so would the loader's
            # processes be, until garbage is collected, when nothing can end them but a time limit.
            del batches
            raise error.with_traceback(None) from None
        except (ConnectionError, EOFError):
            # One that dies as it hands over a batch is first seen as a broken connection. Torch's
            # handler of the signal comes later, wherever this process then is, or never; it says
            # nothing of a process that has been joined.
            ended = wait([worker.sentinel for worker in workers], timeout=SEEN_S)
            dead = [worker for worker in workers if worker.sentinel in ended]
            if not dead:
                raise
            for worker in dead:
                worker.join()
            raise _died(f"DataLoader worker (pid {dead[0].pid}) died as it sent a batch.") from None


def _died(reason: str) -> LoaderError:
    return LoaderError(
        f"{reason} The machine may be out of memory, or /dev/shm full: give fewer --num-workers, "
        "a smaller --batch-size or --micro-batch-size, or more of both"
    )


@contextmanager
def _named_errors(sample: Sample) -> Generator[None]:
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{sample.name}: {error}") from None


def _collate(items: Sequence[tuple[NDArray[np.uint8], int, int]]) -> Batch:
    images, labels, seeds = zip(*items, strict=True)
    # In a worker, default_collate stacks in shared memory, from where nothing is copied again.
    pixels = default_collate([torch.from_numpy(image) for image in images])  # [N, H, W, 3]
    return Batch(pixels.permute(0, 3, 1, 2), torch.tensor(labels), torch.tensor(seeds))


def _begin_worker(_number: int) -> None:
    obey_parent()
