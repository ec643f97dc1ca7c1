"""The base of the project's own errors, and how a file's problems are told in one line."""

import re
from collections.abc import Sized
from pathlib import Path

from pydantic import ValidationError


class PipelineError(Exception):
    """A broken contract between stages: what was found, what was expected, what to do."""


def first_problem(error: ValidationError) -> str:
    """Tell the first of pydantic's findings, and how many more there are."""
    first, *others = error.errors(include_url=False, include_context=False, include_input=False)
    place = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(others)} more problems)" if others else ""
    return f"{place + ': ' if place else ''}{first['msg']}{more}"


def require_version(
    text: str, version: int, path: Path, advice: str, error: type[PipelineError]
) -> None:
    """Refuse a file of ours that names another format version, before the rest of it is read."""
    found = re.search(r'"format_version"\s*:\s*(-?\d+)', text)
    if found and int(found.group(1)) != version:
        raise error(
            f"{path} has format version {found.group(1)}, this program reads {version}; {advice}"
        )


def require_names(class_names: Sized, num_classes: int) -> None:
    """Raise a ValueError unless every output of a network has a name, and nothing else has one."""
    if len(class_names) != num_classes:
        raise ValueError(
            f"class_names has {len(class_names)} names for {num_classes} outputs, expected one each"
        )
