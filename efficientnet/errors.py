"""The base of the project's own errors, and how a file's problems are told in one line."""

import re
from collections.abc import Sized

from pydantic import ValidationError


class PipelineError(Exception):
    """A broken contract between stages: what was found, what was expected, what to do."""


def first_problem(error: ValidationError) -> str:
    """Tell the first of pydantic's findings, and how many more there are."""
    first, *others = error.errors(include_url=False, include_context=False, include_input=False)
    place = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(others)} more problems)" if others else ""
    return f"{place + ': ' if place else ''}{first['msg']}{more}"


def found_version(text: str) -> int | None:
    """Return the format version that a file of ours names, before the rest of it is read."""
    found = re.search(r'"format_version"\s*:\s*(-?\d+)', text)
    return int(found.group(1)) if found else None


def require_names(class_names: Sized, num_classes: int) -> None:
    """Raise a ValueError unless every output of a network has a name, and nothing else has one."""
    if len(class_names) != num_classes:
        raise ValueError(
            f"class_names has {len(class_names)} names for {num_classes} outputs, expected one each"
        )
