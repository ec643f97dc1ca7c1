"""What the service answers, as pydantic models: predictions, the model's facts, errors."""

from pydantic import BaseModel, ConfigDict, Field


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
