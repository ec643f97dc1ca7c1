"""Quantised program and eager model, the same held-out images -> how much top-1 is lost.

Where it loses too much, the blocks that cost most are kept in a higher precision, as few as do.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from efficientnet.errors import PipelineError
from efficientnet.formats.artifact import AccuracyGate, ArtifactManifest, BlockCost
from efficientnet.formats.class_accuracy import is_at_chance
from efficientnet.images.datasets import SAMPLE_PHOTOS, Sample, sha256_of_samples
from efficientnet.measuring.intervals import NORMAL_QUANTILE
from efficientnet.runtimes import Runtime
from export.checks.logit_agreement import QUANTIZED_FLIP_MARGIN, problem_of, usual_batch_size
from export.inputs.config import MIN_GATE_IMAGES
from export.inputs.reference import BATCH_SIZE, Reference, batches_of, spread

log = logging.getLogger(__name__)


class GateError(PipelineError):
    """Images that the accuracy gate cannot judge by."""


class AccuracyDropError(PipelineError):
    """A quantised program that loses too much, whatever is kept in a higher precision."""


class Attempt(NamedTuple):
    """A program that was built, in a directory of its own."""

    directory: Path
    manifest: ArtifactManifest


class Gate:
    """Holds the images, and what the eager model answers to them, over several programs.

    Images without labels, as those have that come with weights trained elsewhere, have the eager
    model's answers for labels, where it is sure of them: any other answer counts as lost.

    Raises:
        GateError: there are fewer than 100, or the eager model is not clearly better on them than
            chance and not all may be lost.
    """

    def __init__(self, reference: Reference, num_images: int | None, max_drop: float) -> None:
        require_gate_images(reference)
        self._samples = _samples(reference, num_images)
        self._reference = reference
        self._max_drop = max_drop
        self._sha256 = sha256_of_samples(self._samples)
        self._eager_is_right = _eager_is_right(reference, num_images)
        if max_drop < 1:
            labels = [sample.label for sample in self._samples]
            require_better_than_chance(self._eager_is_right, labels)

    @property
    def num_images(self) -> int:
        """How many programs are asked."""
        return len(self._samples)

    def measure(self, runtime: Runtime) -> AccuracyGate:
        """Classify all images with a program."""
        who = f"{runtime.info.runtime} {runtime.info.precision}"
        size = usual_batch_size(runtime)
        right = is_right(self._reference, self._samples, runtime.infer, who, size)
        drop, low, high = paired_drop(self._eager_is_right, right)
        return AccuracyGate(
            num_images=len(right),
            reference_top1=float(self._eager_is_right.mean()),
            top1=float(right.mean()),
            drop=drop,
            drop_low=low,
            drop_high=high,
            max_drop=self._max_drop,
            dataset_sha256=self._sha256,
            is_labelled=is_labelled(self._reference),
        )


def is_labelled(reference: Reference) -> bool:
    """Whether the held-out images have labels."""
    return reference.dataset.source != SAMPLE_PHOTOS


def require_gate_images(reference: Reference) -> None:
    """Check that there are enough images to judge by.

    Raises:
        GateError: there are fewer than 100.
    """
    if len(reference.dataset.val) < MIN_GATE_IMAGES:
        raise GateError(
            f"there are {len(reference.dataset.val)} held-out images, the accuracy gate needs "
            f"{MIN_GATE_IMAGES}; add images to val, or give others with --data"
        )


def require_better_than_chance(eager_is_right: NDArray[np.bool_], labels: Sequence[int]) -> None:
    """Check that the eager model knows something that could be lost."""
    num_images, top1 = len(eager_is_right), float(eager_is_right.mean())
    chance = Counter(labels).most_common(1)[0][1] / num_images
    if is_at_chance(top1, chance, num_images):
        raise GateError(
            f"the eager model has {top1:.2%} of {num_images} held-out images right, and always "
            f"naming the largest class has {chance:.2%}: where nothing is known nothing can be "
            "lost, so the accuracy gate cannot judge; export a network that has learned these "
            "classes, at the --size it was trained for, give other images with --data, export in "
            "fp32, or for time only, with --max-drop 100"
        )


# A search asks it for several artifacts of one checkpoint.
@lru_cache(maxsize=1)
def _samples(reference: Reference, num_images: int | None) -> list[Sample]:
    samples = spread(reference.dataset.val, num_images or len(reference.dataset.val))
    if is_labelled(reference):
        return samples
    if len(samples) == len(reference.parity_images):
        logits = reference.parity_logits  # of the same images
    else:
        batches = batches_of(samples, reference.preprocess)
        logits = np.concatenate([reference.answer(images) for images in batches])
    second, first = np.sort(logits, axis=1)[:, -2:].T
    is_sure = first - second > QUANTIZED_FLIP_MARGIN * logits.std()
    answers = logits.argmax(axis=1)
    return [replace(s, label=int(answers[i])) for i, s in enumerate(samples) if is_sure[i]]


@lru_cache(maxsize=1)
def _eager_is_right(reference: Reference, num_images: int | None) -> NDArray[np.bool_]:
    samples = _samples(reference, num_images)
    if not is_labelled(reference):
        return np.ones(len(samples), bool)  # its answers are the labels
    return is_right(reference, samples, reference.answer, "the eager model")


def is_right(
    reference: Reference,
    samples: Sequence[Sample],
    infer: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    who: str,
    batch_size: int = BATCH_SIZE,
) -> NDArray[np.bool_]:
    """Classify images; return whether each answer is the label, [N]."""
    answers: list[NDArray[np.intp]] = []
    with tqdm(
        total=len(samples), desc=f"top-1 of {who}", unit="img", disable=None, leave=False
    ) as bar:
        for images in batches_of(samples, reference.preprocess, batch_size):
            answers.append(infer(images).argmax(axis=1))
            bar.update(len(images))
    return np.concatenate(answers) == np.asarray([sample.label for sample in samples])


def paired_drop(
    eager_is_right: NDArray[np.bool_], found: NDArray[np.bool_]
) -> tuple[float, float, float]:
    """Return the share of images lost, and its 95 % confidence interval.

    Both were asked the same images, so only those count that one of them has right and the other
    wrong. Interval: Agresti and Min 2005, "Simple improved confidence intervals for comparing
    matched proportions": half an image is added to each of the four cells.

    Args:
        eager_is_right: whether the eager model has each image right, [N].
        found: whether the other has, [N].
    """
    lost, won = int((eager_is_right & ~found).sum()), int((found & ~eager_is_right).sum())
    num_images = len(eager_is_right)
    b, c, n = lost + 0.5, won + 0.5, num_images + 2
    center = (b - c) / n
    half = NORMAL_QUANTILE * math.sqrt(b + c - (b - c) ** 2 / n) / n
    return (lost - won) / num_images, center - half, center + half


def keep_within_drop(
    attempt: Callable[[tuple[str, ...]], Attempt],
    judge: Callable[[Attempt], Attempt],
    rank: Callable[[], list[BlockCost]],
    keeps_blocks: bool = True,
) -> Attempt:
    """Keep the fewest blocks in a higher precision with which no more is lost than may be.

    Blocks are taken in the order of what quantising each alone does to the logits, and the number
    is found by halving, so about log2(blocks) programs are built.

    Args:
        attempt: builds a program with the blocks that are named in a higher precision.
        judge: fills in parity and gate of a program's manifest.
        rank: the blocks, the costliest first; called when something has to be kept.
        keeps_blocks: whether any may be kept.

    Raises:
        AccuracyDropError: no number of blocks is enough.
    """

    def tried(kept: tuple[str, ...]) -> Attempt:
        judged = judge(attempt(kept))
        log.info("%s%s", f"{len(kept)} blocks kept: " if kept else "", verdict_of(judged))
        return judged

    first = tried(())
    if is_passed(first):
        return first
    if not keeps_blocks:
        raise AccuracyDropError(f"the artifact is refused, it loses too much: {verdict_of(first)}")
    log.info("that is too much: which blocks cost most?")
    ranking = rank()
    log.info("%s", ranking_text(ranking))
    names = tuple(cost.block for cost in ranking)
    best = tried(names)
    if not is_passed(best):
        raise AccuracyDropError(
            f"the artifact is refused: with all {len(names)} blocks kept in a higher precision it "
            f"still loses too much: {verdict_of(best)}; export in fp32, or allow more with "
            "--max-drop"
        )
    too_few, enough = 0, len(names)
    while enough - too_few > 1:
        count = (too_few + enough) // 2
        candidate = tried(names[:count])
        if is_passed(candidate):
            best, enough = candidate, count
        else:
            too_few = count
    quantization = best.manifest.quantization
    assert quantization is not None
    quantization = quantization.model_copy(update={"ranking": tuple(ranking)})
    manifest = best.manifest.model_copy(update={"quantization": quantization})
    return Attempt(best.directory, manifest)


def is_passed(attempt: Attempt) -> bool:
    """Whether no more is lost than may be, and the logits are like the eager model's."""
    gate, parity = attempt.manifest.gate, attempt.manifest.parity
    assert gate is not None and parity is not None
    return is_allowed(gate) and problem_of(parity) is None


def is_allowed(gate: AccuracyGate) -> bool:
    """Whether no more is lost than may be: a question of images, not of rounded fractions."""
    return round(gate.drop * gate.num_images) <= gate.max_drop * gate.num_images + 1e-6


def verdict_of(attempt: Attempt) -> str:
    """Write what a program loses, and what else is wrong with it."""
    gate, parity = attempt.manifest.gate, attempt.manifest.parity
    assert gate is not None and parity is not None
    problem = problem_of(parity)
    return describe(gate) if problem is None else f"{describe(gate)}; and {problem}"


def describe(gate: AccuracyGate) -> str:
    """Write what was lost, with its interval, in one line."""
    images = "held-out images" if gate.is_labelled else "images that the eager model is sure of"
    text = (
        f"top-1 {gate.top1:.2%} on {gate.num_images} {images}, {gate.reference_top1:.2%} "
        f"of the eager model: {100 * gate.drop:+.2f} points lost (95 % interval "
        f"{100 * gate.drop_low:+.2f} to {100 * gate.drop_high:+.2f}, at most "
        f"{100 * gate.max_drop:g})"
    )
    if is_allowed(gate) and gate.max_drop < gate.drop_high:
        text += "; so many images cannot tell that no more is lost, take more: --num-gate-images"
    return text


def ranking_text(ranking: list[BlockCost]) -> str:
    """List the blocks, the costliest first, with the change of the logits."""
    lines = [f"{cost.logit_error:8.4f}  {cost.block}" for cost in ranking]
    return "\n".join(["change of the logits by quantising one block alone, in deviations:", *lines])
