"""A file of stages, JSON -> a variant that is not built in, checked; and such a file written."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from efficientnet.errors import PipelineError, first_problem, require_version
from efficientnet.machine.atomic import write_text
from efficientnet.network.variants import VariantSpec, require_own_name

FORMAT_VERSION = 1


class VariantFileError(PipelineError):
    """A file that holds no variant, or one that cannot be built."""


class VariantFile(BaseModel):
    """What such a file holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    origin: dict[str, Any] = {}
    """Where it comes from, for whoever reads it; nothing is made of it."""
    variant: VariantSpec


def read_variant_file(path: Path) -> VariantSpec:
    """Read a variant; what is wrong with the file or its stages is a VariantFileError."""
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {path}; expected a table of stages as JSON (docs/training.md)"
        )
    text = path.read_text(encoding="utf-8", errors="replace")
    advice = "use the version of the project that wrote it"
    require_version(text, FORMAT_VERSION, path, advice, VariantFileError)
    try:
        spec = VariantFile.model_validate_json(text).variant
        if spec.published is not None:
            raise VariantFileError(f"{path}: variant.published is for built-in variants, leave it")
        require_own_name(spec)
    except ValidationError as error:
        raise VariantFileError(f"{path} holds no variant: {first_problem(error)}") from None
    except ValueError as error:
        raise VariantFileError(f"{path}: {error}") from None
    return spec


def write_variant_file(path: Path, spec: VariantSpec, origin: dict[str, Any]) -> None:
    """Write a variant, whole or not at all; `origin` is JSON that says where it comes from."""
    require_own_name(spec)
    file = VariantFile(origin=origin, variant=replace(spec, published=None))
    write_text(path, file.model_dump_json(indent=1, exclude_none=True) + "\n")
