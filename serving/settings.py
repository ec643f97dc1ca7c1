"""Environment variables CLASSIFIER_... -> Settings, read once when the service starts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from efficientnet import PROJECT_ROOT
from efficientnet.machine.environment import num_usable_cores

ARTIFACT_VARIABLE = "CLASSIFIER_ARTIFACT"
DEFAULT_ARTIFACT = PROJECT_ROOT / "artifacts" / "v2-s" / "onnxruntime-fp32"


@dataclass(frozen=True)
class Settings:
    """Limits of the service and the artifact that it serves."""

    artifact: Path = DEFAULT_ARTIFACT
    """Artifact directory. CLASSIFIER_ARTIFACT, where a relative path starts at the folder that
    holds serving/: the processes of a built bento do not share a working directory."""

    max_upload_bytes: int = 20_000_000
    """Largest picture file. CLASSIFIER_MAX_UPLOAD_BYTES."""

    default_top_k: int = 5
    """Classes in an answer when the request does not say. CLASSIFIER_DEFAULT_TOP_K."""

    max_concurrency: int = 64
    """Requests in progress at once; one more is answered with 429. CLASSIFIER_MAX_CONCURRENCY."""

    timeout_s: int = 60
    """Longest time for a request, upload included; then 504. CLASSIFIER_TIMEOUT_S."""

    num_threads: int = field(default_factory=num_usable_cores)
    """CPU threads of one call of the network. CLASSIFIER_NUM_THREADS."""


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Fill the settings from environment variables; what is unset or empty keeps its default.

    Raises:
        ValueError: a value is not a whole number of at least 1.
    """
    numbers: dict[str, int] = {}
    for name in Settings.__dataclass_fields__:
        variable = f"CLASSIFIER_{name.upper()}"
        text = environment.get(variable, "").strip()
        if text and variable != ARTIFACT_VARIABLE:
            numbers[name] = _positive_number(variable, text)
    artifact = environment.get(ARTIFACT_VARIABLE, "").strip()
    return Settings(artifact=PROJECT_ROOT / artifact if artifact else DEFAULT_ARTIFACT, **numbers)


def _positive_number(variable: str, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError(f"{variable} is '{text}', expected a whole number of at least 1")
    return number
