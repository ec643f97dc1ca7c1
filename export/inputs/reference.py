"""Checkpoint and flags -> what exports start from: the model, its images and its answers."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from efficientnet.formats.checkpoint import (
    CheckpointError,
    CheckpointRecord,
    load_checkpoint,
    newest_checkpoint,
)
from efficientnet.images.datasets import Dataset, Sample, load_held_out
from efficientnet.images.preprocess import PreprocessSpec, preprocess
from efficientnet.machine.environment import num_usable_cores
from efficientnet.network.cost import Cost, network_cost
from efficientnet.network.model import EfficientNet
from export.inputs.config import ExportConfig, MixedConfig

BATCH_SIZE = 16

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Reference:
    """A checkpoint at one image size, with the images that its exports are checked on."""

    checkpoint: Path
    model: EfficientNet
    """Eager, float32, in evaluation mode: the reference of every comparison."""
    record: CheckpointRecord
    preprocess: PreprocessSpec
    """The checkpoint's, at the size that is exported."""
    dataset: Dataset
    num_parity_images: int

    @property
    def variant(self) -> str:
        """Name of the architecture."""
        return self.record.variant

    @property
    def image_size(self) -> int:
        """Pixels."""
        return self.preprocess.image_size

    @cached_property
    def cost(self) -> Cost:
        """Operations and bytes for one image."""
        return network_cost(self.record.spec, self.image_size, num_classes=self.record.num_classes)

    @cached_property
    def parity_images(self) -> NDArray[np.float32]:
        """Held-out images [num_parity_images, 3, H, W], evenly spread over val."""
        chosen = spread(self.dataset.val, self.num_parity_images)
        return np.concatenate(list(batches_of(chosen, self.preprocess)))

    @cached_property
    def parity_logits(self) -> NDArray[np.float32]:
        """What the eager model answers to parity_images.

        Raises:
            CheckpointError: some of it is NaN or infinite.
        """
        logits = self.answer(self.parity_images)
        num_broken = int((~np.isfinite(logits).all(axis=1)).sum())
        if num_broken:
            raise CheckpointError(
                f"the network in {self.checkpoint} is broken itself, before any export: it answers "
                f"{num_broken} of {len(logits)} held-out images with NaN or infinity; take an "
                "earlier checkpoint of the run, or train again"
            )
        return logits

    def answer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the eager model's logits for images [N, 3, H, W]."""
        return answer_of(self.model, images)


def answer_of(model: EfficientNet, images: NDArray[Any]) -> NDArray[Any]:
    """Return a model's logits for images [N, 3, H, W] of its own float type."""
    with torch.inference_mode():
        batches = torch.from_numpy(images).split(BATCH_SIZE)
        return torch.cat([model(batch) for batch in batches]).numpy()


def load_reference(config: ExportConfig, images_flag: str = "--num-parity-images") -> Reference:
    """Load the checkpoint and its data; everything is checked that can be before work starts.

    `images_flag` is what sets the number of held-out images, for the error message.
    """
    checkpoint = config.checkpoint or newest_checkpoint()
    chosen = "" if config.checkpoint else " (of the newest complete run)"
    log.info("checkpoint %s%s", checkpoint, chosen)
    model, record = load_checkpoint(checkpoint)
    if isinstance(config, MixedConfig):
        _require_layers(model, config.float_layers)
    dataset = load_held_out(record.data, config.data, record.class_names)
    if len(dataset.val) < config.num_parity_images:
        raise ValueError(
            f"there are {len(dataset.val)} held-out images, the parity check needs "
            f"{config.num_parity_images}; add images to val, or lower {images_flag} (at least 64)"
        )
    spec = record.preprocess
    if config.size is not None and config.size != spec.image_size:
        log.info("images of %d px; the checkpoint's are of %d px", config.size, spec.image_size)
        spec = PreprocessSpec.model_validate(spec.model_dump() | {"image_size": config.size})
    return Reference(checkpoint, model, record, spec, dataset, config.num_parity_images)


def spread(samples: Sequence[Sample], num_images: int) -> list[Sample]:
    """Take `num_images` samples, or all when there are fewer, evenly spread."""
    num_images = min(num_images, len(samples))
    return [samples[i * len(samples) // num_images] for i in range(num_images)]


def batches_of(
    samples: Sequence[Sample], spec: PreprocessSpec, batch_size: int = BATCH_SIZE
) -> Iterator[NDArray[np.float32]]:
    """Give preprocessed images [up to batch_size, 3, H, W] in order; threads decode ahead."""
    chunks = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]

    def load(sample: Sample) -> NDArray[np.float32]:
        return preprocess(sample.read(), spec)

    with ThreadPoolExecutor(num_usable_cores()) as pool:
        ahead = [pool.submit(load, sample) for sample in chunks[0]] if chunks else []
        for following in [*chunks[1:], []]:
            current, ahead = ahead, [pool.submit(load, sample) for sample in following]
            yield np.stack([future.result() for future in current])


def _require_layers(model: EfficientNet, names: Sequence[str]) -> None:
    known = {name for name, _ in model.named_modules() if name.startswith("features.")}
    for name in names:
        if name not in known:
            raise ValueError(
                f"--float-layers names {name}, which the network has not got; expected names like "
                "features.1 (a stage), features.4.0 (a block) or features.4.0.block.1 (a layer)"
            )
