"""Logits and the eager model's logits -> ParityRecord, or a refusal; tolerances by precision."""

from collections.abc import Sequence
from itertools import cycle

import numpy as np
from numpy.typing import NDArray

from efficientnet.artifact import ParityRecord, ParityTolerances
from efficientnet.errors import PipelineError
from efficientnet.precision import Precision
from efficientnet.runtimes import Runtime

BATCH_SIZE = 16

# Largest logit error in units of the reference logits' standard deviation. What a format rounds by
# is a share of a value's size, and it adds up over some hundred layers:
#   fp16  2^-11 a rounding; 2e-3 to 6e-3 seen on trained networks
#   bf16  2^-8, eight times fp16's; up to 5e-2 seen
#   int8  2^-8 of a channel's or a map's range, not of the value; and an image with larger values
#         than the calibration images is cut off: 3.7 seen, on an image that stays in its class.
#         So this finds broken programs only; what is lost is measured in top-1, by the gate
#   fp8   2^-4 of a value, with a scale for each map
RELATIVE_TOLERANCE: dict[Precision, float] = {"fp16": 0.05, "bf16": 0.25, "int8": 6.0, "fp8": 6.0}

# Of int8 and fp8, in the same unit: the reference is unsure of images with a smaller margin.
QUANTIZED_FLIP_MARGIN = 0.5

# float32 against float32: only the order of additions differs, about 1e-5 for logits around 10.
FP32_TOLERANCE = 1e-3


class ParityError(PipelineError):
    """An artifact that does not answer like the model it was made of."""


def tolerances_for(precision: Precision, reference: NDArray[np.float32]) -> ParityTolerances:
    """Return what a precision may differ by from the eager model's logits [N, num_classes].

    A different top-1 class counts when the reference prefers its own by more than the flip margin:
    the allowed error of one logit, so that both must be off by half of it. No such flip is
    allowed; of int8 and fp8 three images in a hundred are, for which half a standard deviation is
    the margin: there the accuracy gate decides.
    """
    if precision == "fp32":
        error = FP32_TOLERANCE
    else:
        error = RELATIVE_TOLERANCE[precision] * float(reference.std())
    is_quantized = precision in ("int8", "fp8")
    return ParityTolerances(
        max_abs_logit_error=error,
        min_top1_agreement=0.97 if is_quantized else 1.0,
        flip_margin=QUANTIZED_FLIP_MARGIN * float(reference.std()) if is_quantized else error,
    )


def run_in_batches(
    runtime: Runtime, images: NDArray[np.float32], sizes: Sequence[int] = ()
) -> NDArray[np.float32]:
    """Give the runtime the images alone, in batches of 16 and in other sizes by turns.

    Sizes that a program is prepared for may be computed in ways of their own: each is checked,
    where there are images enough.
    """
    step = min(BATCH_SIZE, runtime.info.max_batch_size or BATCH_SIZE)
    in_turn = cycle(sorted({1, step, *sizes}))
    parts: list[NDArray[np.float32]] = []
    start = 0
    while start < len(images):
        part = images[start : start + next(in_turn)]
        parts.append(runtime.infer(part))
        start += len(part)
    return np.concatenate(parts)


def compare_logits(
    found: NDArray[np.float32], expected: NDArray[np.float32], tolerances: ParityTolerances
) -> ParityRecord:
    """Compare logits [N, num_classes] with the eager model's."""
    errors = np.abs(found.astype(np.float64) - expected)
    # A NaN would pass every comparison; it counts as an infinite error.
    errors = np.where(np.isfinite(errors), errors, np.inf)
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
