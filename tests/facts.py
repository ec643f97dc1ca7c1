"""Errors are held to the facts that they name (found, expected, to be done), not to their words."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def raises_naming(
    error: type[BaseException] | tuple[type[BaseException], ...], *facts: object
) -> Iterator[pytest.ExceptionInfo[BaseException]]:
    """Expect an error whose message names each of the facts, as `require_named` has it."""
    __tracebackhide__ = True
    with pytest.raises(error) as caught:
        yield caught
    require_named(str(caught.value), *facts)


def require_named(text: str, *facts: object) -> None:
    """Fail unless a text names each fact as it is written, and not as part of a word or number."""
    __tracebackhide__ = True
    assert facts, "no fact is named: any text would pass"
    for fact in facts:
        pattern = rf"(?<!\w)(?<!\d[.,]){re.escape(str(fact))}(?!\w|[.,]\d)"
        if not re.search(pattern, text):
            pytest.fail(f"{str(fact)!r} is not named in: {text}")
