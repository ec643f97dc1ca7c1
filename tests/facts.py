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
    for fact in map(str, facts):
        # Of facts that end in a mark, such as 'pipe:' and '<11', the mark is the border.
        before = r"(?<!\w)(?<!\d[.,])" if is_part_of_word(fact[0]) else ""
        after = r"(?!\w|[.,]\d)" if is_part_of_word(fact[-1]) else ""
        if not re.search(f"{before}{re.escape(fact)}{after}", text):
            pytest.fail(f"{fact!r} is not named in: {text}")


def is_part_of_word(character: str) -> bool:
    """Tell whether regular expressions take a character for part of a word."""
    return character.isalnum() or character == "_"
