"""A runtime and labelled images -> the probabilities of every class for each of them."""

import json
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from efficientnet.formats.artifact import ArtifactError
from efficientnet.images.datasets import MAX_BROKEN_FRACTION, DatasetError, Sample
from efficientnet.images.preprocess import ImageError, preprocess
from efficientnet.machine.environment import num_usable_cores
from efficientnet.measuring.progress import Progress
from efficientnet.runtimes import Runtime
from efficientnet.runtimes.probabilities import softmax


@dataclass(frozen=True)
class Predictions:
    """What a program answered."""

    samples: tuple[Sample, ...]
    """The images that were classified, in their order."""
    probabilities: NDArray[np.float64]
    """[N, num_classes], a row for each sample."""
    broken: tuple[str, ...]
    """Images that were left out because they cannot be decoded."""


def predict(runtime: Runtime, samples: Sequence[Sample], batch_size: int) -> Predictions:
    """Classify all samples; images are decoded by threads while the program computes."""
    kept: list[Sample] = []
    broken: list[str] = []
    probabilities: list[NDArray[np.float64]] = []
    with Progress(len(samples), unit="images") as progress:
        for batch in _load_batches(runtime, samples, batch_size):
            progress.begin("classifying")
            broken += [image for _, image in batch if isinstance(image, str)]
            if broken and len(broken) >= MAX_BROKEN_FRACTION * len(samples):
                shown = "; ".join(broken[:5]) + ("; ..." if len(broken) > 5 else "")
                raise DatasetError(
                    f"{len(broken)} of {len(samples)} held-out images cannot be decoded so far, "
                    f"and {MAX_BROKEN_FRACTION:.0%} or more is an error: {shown}"
                )
            good = [(sample, image) for sample, image in batch if not isinstance(image, str)]
            if good:
                logits = runtime.infer(np.stack([image for _, image in good]))
                if not np.isfinite(logits).all():
                    raise ArtifactError(
                        f"the {runtime.info.runtime} program answers NaN or infinity, expected "
                        f"numbers, for an image among {good[0][0].name} to {good[-1][0].name}; "
                        "export it again in a wider precision"
                    )
                kept += [sample for sample, _ in good]
                probabilities.append(softmax(logits))
            progress.done(len(batch))
    return Predictions(tuple(kept), np.concatenate(probabilities), tuple(broken))


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write one JSON line per image: name, label, probabilities; all lines or no file."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for sample, row in zip(predictions.samples, predictions.probabilities, strict=True):
                line = {"name": sample.name, "label": sample.label, "probabilities": row.tolist()}
                file.write(json.dumps(line) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _load_batches(
    runtime: Runtime, samples: Sequence[Sample], batch_size: int
) -> Iterator[list[tuple[Sample, NDArray[np.float32] | str]]]:
    """Give preprocessed images, or why there is none, with two batches ahead of the one in use."""
    spec = runtime.info.preprocess

    def load(sample: Sample) -> tuple[Sample, NDArray[np.float32] | str]:
        try:
            return sample, preprocess(sample.read(), spec)
        except (ImageError, OSError) as error:
            return sample, f"{sample.name}: {error}"

    waiting: deque[list[Future[tuple[Sample, NDArray[np.float32] | str]]]] = deque()
    with ThreadPoolExecutor(num_usable_cores()) as pool:
        for start in range(0, len(samples), batch_size):
            chunk = samples[start : start + batch_size]
            waiting.append([pool.submit(load, sample) for sample in chunk])
            if len(waiting) > 2:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
