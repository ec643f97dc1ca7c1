"""A pattern with braces -> all that it stands for, as bash expands it."""

import re

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")


def expand_braces(pattern: str) -> list[str]:
    """Expand `{0000..0009}` and `{a,b}`, nested, as bash does; other braces stay as they are."""
    for start, letter in enumerate(pattern):
        if letter != "{" or pattern[:start].endswith("$"):
            continue
        end = _closing_brace(pattern, start)
        choices = _choices(pattern[start + 1 : end]) if end else []
        if choices:
            tails = expand_braces(pattern[end + 1 :])
            bodies = [body for choice in choices for body in expand_braces(choice)]
            return [pattern[:start] + body + tail for body in bodies for tail in tails]
    return [pattern]


def _closing_brace(pattern: str, start: int) -> int:
    depth = 0
    for position in range(start, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[position], 0)
        if depth == 0:
            return position
    return 0


def _choices(body: str) -> list[str]:
    # What stands between two braces -> its alternatives; none if bash would leave it as it is.
    if match := _RANGE.fullmatch(body):
        first, last = int(match[1]), int(match[2])
        step = abs(int(match[3] or 1)) or 1
        is_padded = any(re.match(r"-?0\d", text) for text in (match[1], match[2]))
        width = max(len(match[1]), len(match[2])) if is_padded else 0
        numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
        return [f"{number:0{width}d}" for number in numbers]
    choices, depth = [""], 0
    for letter in body:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            choices.append("")
        else:
            choices[-1] += letter
    return choices if len(choices) > 1 else []
