"""Labelled images -> batches of tensors, in an order that follows from the seed and the step."""

import random
import signal
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from efficientnet.datasets import Sample
from efficientnet.preprocess import PreprocessSpec, decode_image, normalize, preprocess
from training.augment import Augmentation
from training.config import TrainConfig
from training.progressive import Stage, stage_index


class SampleKey(NamedTuple):
    """One use of a training image: which, at which stage, with which random numbers."""

    image: int
    stage: int
    seed: int


class StepSampler(Sampler[list[SampleKey]]):
    """Yields the keys of one forward pass after the other, from any optimizer step on.

    Images are shuffled in each epoch; those that do not fill a last batch are left out of that
    epoch.
    """

    def __init__(self, num_images: int, config: TrainConfig, first_step: int = 0) -> None:
        self.steps_per_epoch = num_images // config.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"{num_images} training images do not fill one batch of {config.batch_size}; "
                f"give --batch-size (and --micro-batch-size) of at most {num_images}"
            )
        self.num_steps = self.steps_per_epoch * config.epochs
        self._num_images = num_images
        self._config = config
        self._first_step = first_step
        self._micro_batch_size = config.micro_batch_size or config.batch_size

    def __len__(self) -> int:
        """Count the forward passes that are left."""
        passes_per_step = self._config.batch_size // self._micro_batch_size
        return (self.num_steps - self._first_step) * passes_per_step

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Yield the keys of each forward pass."""
        config = self._config
        order: list[int] = []
        for step in range(self._first_step, self.num_steps):
            epoch, position = divmod(step, self.steps_per_epoch)
            if position == 0 or not order:
                order = list(range(self._num_images))
                random.Random(f"{config.seed} {epoch}").shuffle(order)
            stage = stage_index(step, self.num_steps, config.progressive.num_stages)
            start = position * config.batch_size
            batch = order[start : start + config.batch_size]
            keys = [
                SampleKey(i, stage, random.Random(f"{config.seed} {epoch} {i}").getrandbits(63))
                for i in batch
            ]
            for first in range(0, len(keys), self._micro_batch_size):
                yield keys[first : first + self._micro_batch_size]


class TrainImages(Dataset[Any]):
    """Decoded, augmented and normalised images; indexed by SampleKey."""

    def __init__(
        self,
        samples: Sequence[Sample],
        config: TrainConfig,
        spec: PreprocessSpec,
        stages: Sequence[Stage],
    ) -> None:
        self._samples = samples
        self._spec = spec
        self._augmentations = [Augmentation(config, stage) for stage in stages]

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, int]:
        """Return float32 [3, size, size] of the key's stage, and the label."""
        sample = self._samples[key.image]
        image = self._augmentations[key.stage](decode_image(sample.read()), key.seed)
        return torch.from_numpy(normalize(image, self._spec)), sample.label


class EvalImages(Dataset[Any]):
    """Images as deployment prepares them."""

    def __init__(self, samples: Sequence[Sample], spec: PreprocessSpec) -> None:
        self._samples = samples
        self._spec = spec

    def __len__(self) -> int:
        """Count the images."""
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return float32 [3, size, size] and the label."""
        sample = self._samples[index]
        return torch.from_numpy(preprocess(sample.read(), self._spec)), sample.label


def train_batches(
    samples: Sequence[Sample],
    config: TrainConfig,
    spec: PreprocessSpec,
    stages: Sequence[Stage],
    sampler: StepSampler,
    num_workers: int,
) -> DataLoader[Any]:
    """Return the loader of all forward passes that are left: images [N, 3, H, W], labels [N].

    Its own generator keeps it from drawing from the global one, on which dropout depends.
    """
    return DataLoader(
        TrainImages(samples, config, spec, stages),
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),
    )


def eval_batches(
    samples: Sequence[Sample], spec: PreprocessSpec, batch_size: int, num_workers: int
) -> DataLoader[Any]:
    """Return the loader of the held-out images in order: images [N, 3, H, W], labels [N]."""
    return DataLoader(
        EvalImages(samples, spec),
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),
    )


def _ignore_interrupts(_worker: int) -> None:
    # Ctrl-C reaches the whole process group; only the main process decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
