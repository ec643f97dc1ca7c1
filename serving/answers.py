"""What the service answers, as pydantic models: predictions, facts, problems and their codes."""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from efficientnet.errors import require_names
from efficientnet.formats.artifact import AccuracyGate
from efficientnet.images.preprocess_spec import PreprocessSpec
from efficientnet.runtimes.probabilities import softmax, top_classes

BAR_WIDTH = 40


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


Code = Literal[
    "invalid_request",
    "several_pictures",
    "host_not_allowed",
    "unauthorized",
    "not_found",
    "method_not_allowed",
    "upload_too_slow",
    "upload_too_large",
    "picture_too_large",
    "too_many_pictures",
    "address_too_long",
    "unsupported_type",
    "no_picture",
    "invalid_field",
    "overloaded",
    "client_gone",
    "internal_error",
    "stuck",
    "no_model",
    "timeout",
    "disk_full",
]

# nginx's, which others have taken over.
CLIENT_IS_GONE = 499

# A code keeps its meaning and its status for ever; clients decide by it.
PROBLEMS: dict[Code, tuple[int, str]] = {
    "invalid_request": (400, "The form or the JSON cannot be read, or ends early"),
    "several_pictures": (400, "The form holds several pictures where one is expected"),
    "host_not_allowed": (400, "The Host header is no name of this service"),
    "unauthorized": (401, "The service has a key, and the request has none or another"),
    "not_found": (404, "There is nothing at this address"),
    "method_not_allowed": (405, "The address takes another method; Allow says which"),
    "upload_too_slow": (408, "The body came too slowly"),
    "upload_too_large": (413, "Too many bytes"),
    "picture_too_large": (413, "Too many pixels, or a picture made of too many parts"),
    "too_many_pictures": (413, "More pictures than a request may hold"),
    "address_too_long": (414, "The address is too long"),
    "unsupported_type": (415, "The body is of another type than the address takes"),
    "no_picture": (422, "The file is no picture, or damaged"),
    "invalid_field": (422, "A field is missing or wrong"),
    "overloaded": (429, "Too much at once; Retry-After says when to send it again"),
    "client_gone": (CLIENT_IS_GONE, "The client left before the answer; in metrics and log only"),
    "internal_error": (500, "A fault of the service"),
    "stuck": (503, "All threads are at pictures that take too long; Retry-After says when to ask"),
    "no_model": (503, "The artifact cannot be served; Retry-After says when to ask again"),
    "timeout": (504, "Not classified in time"),
    "disk_full": (507, "The disk of the service is full"),
}
assert set(PROBLEMS) == set(get_args(Code))


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
    code: Code
    """What kind of problem it is; keeps its meaning."""
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


class Limits(_Answer):
    """What the service takes."""

    max_upload_bytes: int
    """Largest body, and largest picture file."""
    max_pixels: int
    """Of a picture, height times width."""
    picture_kinds: tuple[str, ...]
    """That are read."""
    max_pictures: int
    """In a request to /classify/batch, or images in one to the open inference protocol."""
    network_batch: int
    """Most images in one call of the network."""
    batch_wait_ms: int
    """Longest time for which an image waits for others that are being decoded."""
    max_concurrency: int
    """Requests that are worked on or wait for it, in each worker."""
    timeout_s: int
    """Longest time for a request, upload included."""
    default_top_k: int
    """Classes in an answer when the request does not say."""


class ServiceInfo(_Answer):
    """What answers: the model, how its pictures are prepared, and what runs it."""

    model: str
    """Variant of the network, and name of the model in the open inference protocol."""
    artifact_sha256: str
    """Of manifest.json, which holds the hashes of the artifact's other files."""
    program_sha256: str
    checkpoint_sha256: str
    """Of the weights that the program was made of."""
    preprocess: PreprocessSpec
    preprocess_sha256: str
    runtime: str
    precision: str
    num_classes: int
    class_names: tuple[str, ...]
    """In the order of the network's outputs."""
    trained_on: str
    """Data set, or name of the folder."""
    gate: AccuracyGate | None
    """What quantising lost of the network's answers, and what it might; null where nothing was
    quantised."""
    workers: int
    """Processes, each with the network in memory."""
    threads: int
    """CPU threads of one call of the network, in each worker."""
    limits: Limits
    versions: dict[str, str]
    """Of Python, of this program, and of the packages that a picture goes through."""


class Problem(_Answer):
    """Why a request was refused, or failed: problem details of RFC 9457."""

    type: Literal["about:blank"] = "about:blank"
    """No page describes the problem; the code tells what it is."""
    title: str
    """The status in words."""
    status: int
    """Of the answer."""
    detail: str
    """What was found, what was expected, what to do, in one sentence."""
    code: Code
    """What kind of problem it is; keeps its meaning when the sentence changes."""
    error: str
    """The detail again, where clients of the open inference protocol look for it."""

    @classmethod
    def of(cls, code: Code, sentence: str) -> Self:
        """Make the problem of a code."""
        status = PROBLEMS[code][0]
        title = "Client Closed Request" if status == CLIENT_IS_GONE else HTTPStatus(status).phrase
        return cls(title=title, status=status, detail=sentence, code=code, error=sentence)


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
