"""What is refused, or went wrong -> problem details in JSON; text that is safe in a log."""

import traceback
from collections.abc import Iterable, Mapping
from functools import lru_cache
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.responses import Response

from serving.answers import PROBLEMS, Code, Problem

PROBLEM_TYPE = "application/problem+json"

MAX_QUOTED = 200
NUM_FRAMES = 4


class Refusal(HTTPException):
    """A request that is not served, with the sentence that the client reads."""

    def __init__(self, code: Code, sentence: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(PROBLEMS[code][0], sentence, headers)
        self.code: Code = code


def too_large(max_upload_bytes: int) -> Refusal:
    """Make the 413 that says what the limit is."""
    return Refusal(
        "upload_too_large",
        f"the upload is larger than the {max_upload_bytes / 1e6:g} MB allowed; "
        "send a smaller picture",
    )


def cannot_classify(problem: str, retry_after_s: int) -> Refusal:
    """Make the 503 of a service that has nothing to classify pictures with."""
    again = {"Retry-After": str(retry_after_s)}
    return Refusal("no_model", f"no picture can be classified: {problem}", again)


def problem_response(
    code: Code, sentence: str, headers: Mapping[str, str] | None = None
) -> Response:
    """Give every refusal and failure the same form."""
    return Response(_body(code, sentence), PROBLEMS[code][0], headers, PROBLEM_TYPE)


@lru_cache(maxsize=64)  # in an overload it is the same one a thousand times a second
def _body(code: Code, sentence: str) -> bytes:
    return Problem.of(code, sentence).model_dump_json().encode()


def refusal_response(refusal: Refusal) -> Response:
    """Answer with a refusal."""
    return problem_response(refusal.code, refusal.detail, refusal.headers)


def as_http(response: Response, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Write an answer, with more headers, as it is sent."""
    status = HTTPStatus(response.status_code)
    lines = [b"HTTP/1.1 %d %s" % (status, status.phrase.encode())]
    lines += [b"%s: %s" % field for field in (*response.raw_headers, *headers)]
    return b"\r\n".join((*lines, b"", bytes(response.body)))


def printable(text: str, max_characters: int = MAX_QUOTED) -> str:
    """Escape what would begin a line or move a terminal's cursor, and cut off what is long."""
    cut = text if len(text) <= max_characters else text[:max_characters] + "..."
    return cut.encode("unicode_escape").decode()


def in_one_line(error: Exception) -> str:
    """Say what nobody expected, and where it happened, for the log."""
    frames = reversed(traceback.extract_tb(error.__traceback__)[-NUM_FRAMES:])
    places = " < ".join(f"{frame.name} ({frame.filename}:{frame.lineno})" for frame in frames)
    return f"{type(error).__name__}: {printable(str(error))} in {places}"
