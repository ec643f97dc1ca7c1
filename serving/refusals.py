"""What is refused, or went wrong -> problem details in JSON; text that is safe in a log."""

import traceback
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

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
) -> JSONResponse:
    """Give every refusal and failure the same form."""
    problem = Problem.of(code, sentence)
    return JSONResponse(problem.model_dump(), problem.status, headers, PROBLEM_TYPE)


def refusal_response(refusal: Refusal) -> JSONResponse:
    """Answer with a refusal."""
    return problem_response(refusal.code, refusal.detail, refusal.headers)


def printable(text: str, max_characters: int = MAX_QUOTED) -> str:
    """Escape what would begin a line or move a terminal's cursor, and cut off what is long."""
    cut = text if len(text) <= max_characters else text[:max_characters] + "..."
    return cut.encode("unicode_escape").decode()


def in_one_line(error: Exception) -> str:
    """Say what nobody expected, and where it happened, for the log."""
    frames = reversed(traceback.extract_tb(error.__traceback__)[-NUM_FRAMES:])
    places = " < ".join(f"{frame.name} ({frame.filename}:{frame.lineno})" for frame in frames)
    return f"{type(error).__name__}: {printable(str(error))} in {places}"
