"""Logits and the eager model's logits -> ParityRecord, or a refusal; tolerances by precision."""

from collections.abc import Sequence
from itertools import count, cycle

import numpy as np
from numpy.typing import NDArray

from efficientnet.errors import PipelineError
from efficientnet.formats.artifact import ParityRecord, ParityTolerances
from efficientnet.precision import Precision
from efficientnet.runtimes import Runtime
from export.inputs.reference import BATCH_SIZE

# Largest logit error in units of `error_unit`, of int8 and fp8 in standard deviations. What a
# format rounds by is a share of a value's size, and it adds up over some hundred layers:
#   fp32  2^-24; only the order of additions differs
#   fp16  2^-11 a rounding; 2e-3 to 6e-3 seen on networks of ten classes, 1.2e-2 on lite1
#   bf16  2^-8, eight times fp16's; up to 5e-2 seen on those, 0.14 on lite1
#   int8  2^-8 of a channel's or a map's range, not of the value; and an image with larger values
#         than the calibration images is cut off: 8.4 seen, in one of 2,000 images. So this finds
#         broken programs only; the mean is limited, too, and the gate measures what is lost
#   fp8   2^-4 of a value, with a scale for each map
RELATIVE_TOLERANCE: dict[Precision, float] = {
    "fp32": 1e-3,
    "fp16": 0.05,
    "bf16": 0.25,
    "int8": 12.0,
    "fp8": 12.0,
}

# Mean error in units of the logits' standard deviation, which one logit in a hundred thousand does
# not decide: a program that is wrong is wrong in most. Eager PyTorch itself, in the precision, on
# lite0 and lite1 and photographs: 4e-3 in fp16, 3e-2 in bf16. Of int8 and fp8 neither the flips nor
# the gate would see that all logits are three times as large, and their probabilities nonsense:
# 0.04 to 0.16 seen on trained networks.
MEAN_TOLERANCE: dict[Precision, float] = {
    "fp32": 2.5e-4,
    "fp16": 0.0125,
    "bf16": 0.1,
    "int8": 0.5,
    "fp8": 0.5,
}

# Of int8 and fp8, in the same unit: the reference is unsure of images with a smaller margin.
QUANTIZED_FLIP_MARGIN = 0.5


class ParityError(PipelineError):
    """An artifact that does not answer like the model it was made of."""


def error_unit(reference: NDArray[np.float32]) -> float:
    """Return what the largest error is measured in: about the logits' standard deviation.

    Of a thousand classes the logit of the right one is up to 14 deviations away from the
    others, and what a format rounds by is a share of it: a third of the farthest logit's distance
    from the mean, which is a standard deviation where there are ten classes.
    """
    logits = reference.astype(np.float64)
    return float(max(logits.std(), np.abs(logits - logits.mean()).max() / 3))


def tolerances_for(
    precision: Precision, reference: NDArray[np.float32], is_for_time_only: bool = False
) -> ParityTolerances:
    """Return what a precision may differ by from the eager model's logits [N, num_classes].

    A different top-1 class counts when the reference prefers its own by more than the flip margin:
    the relative tolerance in standard deviations, so that both must be off by half of it. No such
    flip is allowed; of int8 and fp8 three images in a hundred are, for which half a standard
    deviation is the margin: there the accuracy gate decides. An artifact for time only may lose any
    answer, so its logits need only be finite.
    """
    std = float(reference.std())
    relative = RELATIVE_TOLERANCE[precision]
    is_quantized = precision in ("int8", "fp8")
    unit = std if is_quantized else error_unit(reference)
    flip_margin = (QUANTIZED_FLIP_MARGIN if is_quantized else relative) * std
    if is_for_time_only:
        return ParityTolerances(
            max_abs_logit_error=float(np.finfo(np.float32).max),
            min_top1_agreement=0.0,
            flip_margin=flip_margin,
        )
    return ParityTolerances(
        max_abs_logit_error=relative * unit,
        max_mean_logit_error=MEAN_TOLERANCE[precision] * std,
        min_top1_agreement=0.97 if is_quantized else 1.0,
        flip_margin=flip_margin,
    )


def usual_batch_size(runtime: Runtime) -> int:
    """Return the batch size of checks: 16, or the most that the program takes."""
    return min(BATCH_SIZE, runtime.info.max_batch_size or BATCH_SIZE)


def run_in_batches(
    runtime: Runtime,
    images: NDArray[np.float32],
    expected: NDArray[np.floating],
    sizes: Sequence[int] = (),
) -> NDArray[np.float32]:
    """Give the runtime the images [N, 3, H, W] alone, in batches of 16 and in other sizes by turns.

    `sizes` that a program is prepared for may be computed in ways of their own, and so are those
    that it is not prepared for: each is run in full at least once, with images again where there
    are not enough, and one that is not prepared.

    Returns:
        Logits [N, num_classes]; of an image that was asked several times, those that are farthest
        from the expected.
    """
    most = runtime.info.max_batch_size
    prepared = {1, usual_batch_size(runtime), *sizes}
    other = next(size for size in count(2) if size not in prepared)
    in_turn = sorted({*prepared, *([other] if most is None or other <= most else [])})
    logits = np.empty((len(images), expected.shape[1]), np.float32)
    errors = np.full(len(images), -1.0)
    start = 0
    for number, size in enumerate(cycle(in_turn)):
        is_needed = number < len(in_turn)
        if not is_needed and start >= len(images):
            break
        end = start + size if is_needed else min(start + size, len(images))
        rows = np.arange(start, end) % len(images)
        for row, found in zip(rows, runtime.infer(images[rows]), strict=True):
            error = float(logit_errors(found, expected[row]).max())
            if error > errors[row]:
                errors[row], logits[row] = error, found
        start = end
    return logits


def logit_errors(
    found: NDArray[np.floating], expected: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Return how far off each logit is."""
    errors = np.abs(found.astype(np.float64) - expected)
    # A NaN would pass every comparison; it counts as an infinite error.
    return np.where(np.isfinite(errors), errors, np.inf)


def compare_logits(
    found: NDArray[np.float32], expected: NDArray[np.float32], tolerances: ParityTolerances
) -> ParityRecord:
    """Compare logits [N, num_classes] with the eager model's."""
    errors = logit_errors(found, expected)
    best = expected.argmax(axis=1)
    flipped = found.argmax(axis=1) != best
    rows = np.arange(len(expected))
    margins = expected[rows, best] - expected[rows, found.argmax(axis=1)]
    return ParityRecord(
        num_images=len(expected),
        max_abs_logit_error=float(errors.max()),
        mean_abs_logit_error=float(errors.mean()),
        top1_agreement=1.0 - float((flipped & (margins > tolerances.flip_margin)).mean()),
        num_flips=int(flipped.sum()),
        tolerances=tolerances,
    )


def problem_of(record: ParityRecord) -> str | None:
    """Say what exceeds the tolerances; None when nothing does."""
    tolerances, n = record.tolerances, record.num_images
    if record.max_abs_logit_error > tolerances.max_abs_logit_error:
        return (
            f"its largest logit error is {record.max_abs_logit_error:.2e} on {n} images, "
            f"at most {tolerances.max_abs_logit_error:.0e} is allowed"
        )
    mean = tolerances.max_mean_logit_error
    if mean is not None and record.mean_abs_logit_error > mean:
        return (
            f"its logits are off by {record.mean_abs_logit_error:.2e} on average, on {n} images; "
            f"at most {mean:.0e} is allowed"
        )
    if record.top1_agreement < tolerances.min_top1_agreement:
        return (
            f"{round((1 - record.top1_agreement) * n)} of {n} images have another top-1 class than "
            f"with the eager model, by a margin of more than {tolerances.flip_margin:.1g}; "
            f"at least {tolerances.min_top1_agreement:.1%} must agree"
        )
    return None


def require_parity(record: ParityRecord) -> None:
    """Raise a ParityError when a record exceeds its tolerances."""
    problem = problem_of(record)
    if problem is not None:
        raise ParityError(f"the artifact is refused: {problem}")
