"""Artifact and eager float32 model on the same held-out images -> ParityRecord, or a refusal."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from efficientnet.artifact import ParityRecord, ParityTolerances
from efficientnet.datasets import Sample
from efficientnet.errors import PipelineError
from efficientnet.preprocess import PreprocessSpec, preprocess
from efficientnet.runtimes import Runtime

# float32 against float32: only the order of additions differs, about 1e-5 for logits around 10.
FP32_TOLERANCES = ParityTolerances(max_abs_logit_error=1e-3, min_top1_agreement=1.0)

BATCH_SIZE = 16


class ParityError(PipelineError):
    """An artifact that does not answer like the model it was made of."""


def choose_images(
    samples: Sequence[Sample], num_images: int, spec: PreprocessSpec
) -> NDArray[np.float32]:
    """Preprocess `num_images` held-out images, evenly spread over the samples.

    Raises:
        ValueError: there are fewer samples.
    """
    if len(samples) < num_images:
        raise ValueError(
            f"there are {len(samples)} held-out images, the parity check needs {num_images}; "
            "add images to val, or lower --num-parity-images (at least 64)"
        )
    chosen = [samples[i * len(samples) // num_images] for i in range(num_images)]
    return np.stack([preprocess(sample.read(), spec) for sample in chosen])


def measure_parity(
    model: nn.Module, runtime: Runtime, images: NDArray[np.float32], tolerances: ParityTolerances
) -> ParityRecord:
    """Compare the runtime's logits with those of the eager model.

    The first image is given to the runtime alone and the others in batches, so that both ways of
    calling it are checked.

    Raises:
        ParityError: the difference exceeds the tolerances.
    """
    with torch.inference_mode():
        batches = torch.from_numpy(images).split(BATCH_SIZE)
        expected = torch.cat([model(batch) for batch in batches]).numpy()
    step = min(BATCH_SIZE, runtime.info.max_batch_size or BATCH_SIZE)
    starts = [0, *range(1, len(images), step)]
    parts = [images[a:b] for a, b in zip(starts, [*starts[1:], len(images)], strict=True)]
    found = np.concatenate([runtime.infer(part) for part in parts])
    errors = np.abs(found.astype(np.float64) - expected)
    # A NaN would pass every comparison below; it counts as an infinite error.
    errors = np.where(np.isfinite(errors), errors, np.inf)
    agreement = found.argmax(axis=1) == expected.argmax(axis=1)
    record = ParityRecord(
        num_images=len(images),
        max_abs_logit_error=float(errors.max()),
        mean_abs_logit_error=float(errors.mean()),
        top1_agreement=float(agreement.mean()),
        tolerances=tolerances,
    )
    if record.max_abs_logit_error > tolerances.max_abs_logit_error:
        raise ParityError(
            f"the artifact is refused: its largest logit error is {record.max_abs_logit_error:.2e} "
            f"on {len(images)} images, at most {tolerances.max_abs_logit_error:.0e} is allowed"
        )
    if record.top1_agreement < tolerances.min_top1_agreement:
        raise ParityError(
            f"the artifact is refused: {int((~agreement).sum())} of {len(images)} images have "
            f"another top-1 class than with the eager model, "
            f"at least {tolerances.min_top1_agreement:.1%} must agree"
        )
    return record
