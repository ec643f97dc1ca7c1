"""What the service answers, as pydantic models: predictions, the model's facts, errors."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from efficientnet.errors import require_names
from efficientnet.runtimes.probabilities import softmax, top_classes

BAR_WIDTH = 40


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Prediction(_Answer):
    """One class and how probable it is."""

    label: str
    """Name of the class."""
    class_index: int = Field(ge=0)
    """Position of the class in the network's output."""
    probability: float = Field(ge=0, le=1)
    """Softmax over all classes, so that the probabilities of all classes add up to 1."""


class PictureAnswer(_Answer):
    """A picture and its classes."""

    picture: str
    """Path, or - for standard input."""
    predictions: tuple[Prediction, ...]
    """The most probable first."""


class ClassifiedPicture(_Answer):
    """A picture of a batch, and its classes."""

    predictions: tuple[Prediction, ...]
    """The most probable first."""


class RefusedPicture(_Answer):
    """A picture of a batch that was not classified."""

    status: int
    """What it would have been answered with by itself, such as 422."""
    error: str
    """One sentence."""


class ModelFacts(_Answer):
    """What is being served."""

    variant: str
    runtime: str
    precision: str
    image_size: int
    """Height and width of the network's input, pixels."""
    num_classes: int
    program_sha256: str
    max_upload_bytes: int
    """Largest picture file that the service takes."""


class ErrorAnswer(_Answer):
    """Why a request was refused, or failed."""

    error: str
    """One sentence."""


def best_classes(
    logits: NDArray[np.float32], class_names: Sequence[str], top_k: int
) -> list[Prediction]:
    """Return the most probable classes of one picture's logits [1, num_classes], best first.

    Raises:
        ValueError: there is not one name for each logit.
    """
    require_names(class_names, logits.shape[1])
    probabilities = softmax(logits)
    (best,) = top_classes(probabilities, top_k)
    indices: list[int] = best.tolist()
    return [
        Prediction(label=class_names[i], class_index=i, probability=probabilities[0, i])
        for i in indices
    ]


def bars_of(predictions: Sequence[Prediction]) -> str:
    """Lay predictions out for a terminal, a line with a bar for each."""
    width = max(len(prediction.label) for prediction in predictions)
    return "\n".join(
        f"  {p.label:{width}}  {100 * p.probability:6.2f} %  "
        f"{'#' * round(p.probability * BAR_WIDTH)}".rstrip()
        for p in predictions
    )
