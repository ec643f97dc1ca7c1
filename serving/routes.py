"""HTTP requests -> answers: pictures classified, the page, the model's facts, /docs."""

import errno
import logging
import re
import time
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import bentoml
from fastapi import FastAPI, File, Form, Query, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from efficientnet.images.preprocess import ImageError, ImageTooLargeError
from serving.answers import (
    ClassifiedPicture,
    ErrorAnswer,
    ModelFacts,
    Prediction,
    RefusedPicture,
)
from serving.refusals import Refusal, error_response, in_one_line, printable, too_large
from serving.settings import Settings
from serving.stages import HEADER, StageTimes
from serving.uploads import CLASSIFY, CLASSIFY_BATCH, HOW_TO_SEND
from serving.work import AbandonedError, IsWanted, WorkQueue

PAGE = Path(__file__).with_name("page") / "index.html"

# Swagger UI as BentoML bundles it: FastAPI's own /docs would load it from another host.
SWAGGER_DIR = Path(bentoml.__file__).parent / "_internal" / "server" / "static_content"
ASSETS = "/docs/assets"
SWAGGER_FILES = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon-light-32x32.png")

# nginx's, which others have taken over.
CLIENT_IS_GONE = 499

T = TypeVar("T")

TopK = Annotated[int | None, Form(ge=1, description="Number of classes to return.")]
TopKOfUrl = Annotated[
    int | None, Query(alias="top_k", ge=1, description="The same, in the address.")
]

log = logging.getLogger("bentoml.service")


class PictureClassifier(Protocol):
    """What the routes need of the service."""

    settings: Settings
    work: WorkQueue
    """Where decoding and the network run; its size bounds the memory of decoded pictures."""
    facts: ModelFacts

    def classify(
        self, data: bytes, top_k: int, is_wanted: IsWanted, times: StageTimes
    ) -> list[Prediction]:
        """Return the `top_k` best classes of an encoded picture."""
        ...


def content_policy(html: str, *more: str) -> str:
    """Allow a page what it holds itself, and nothing of another host."""
    hashes = {
        tag: " ".join(
            f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)
        )
        for tag in ("script", "style")
    }
    return "; ".join(
        (
            "default-src 'none'",
            "connect-src 'self'",
            "img-src 'self' blob: data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            f"script-src 'self' {hashes['script']}",
            *(more or (f"style-src 'self' {hashes['style']}",)),
        )
    )


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": description}
    for status, description in {
        400: "The form cannot be read, or holds several pictures; or the Host is not allowed",
        408: "The upload came too slowly",
        413: "Too many bytes or pixels, or a picture that takes too much work",
        415: "The body is no form",
        422: "No picture, or a wrong field",
        429: "Too many pictures at once; Retry-After says when to send this one again",
        500: "A fault of the service",
        503: "The service is stuck or has no artifact; Retry-After says when to ask again",
        504: "The picture was not classified in time",
        507: "The disk of the service is full",
    }.items()
}


PAGE_POLICY = content_policy(PAGE.read_text())

app = FastAPI(
    title="EfficientNet image classifier",
    description="Send a picture, get its most probable classes.",
    docs_url=None,
    redoc_url=None,
)
app.mount(ASSETS, StaticFiles(directory=SWAGGER_DIR))


@app.post(CLASSIFY, responses=ERRORS)
async def classify(
    request: Request,
    response: Response,
    image: Annotated[UploadFile, File(description="A picture file, of any kind Pillow reads.")],
    top_k: TopK = None,
    top_k_of_url: TopKOfUrl = None,
) -> list[Prediction]:
    """Classify a picture: its best classes, the most probable first.

    A `top_k` above the number of classes returns all of them.
    """
    classifier: PictureClassifier = request.app.state.classifier
    num_pictures = len((await request.form()).getlist("image"))
    if num_pictures > 1:
        raise Refusal(
            400,
            f"the form holds {num_pictures} pictures, expected one; send several to "
            f"{CLASSIFY_BATCH}",
        )
    number = top_k or top_k_of_url or classifier.settings.default_top_k

    def work(is_wanted: IsWanted, times: StageTimes) -> list[Prediction]:
        return _classify_file(classifier, image, number, is_wanted, times)

    return await _run(work, request, response)


@app.post(CLASSIFY_BATCH, responses=ERRORS)
async def classify_batch(
    request: Request,
    response: Response,
    images: Annotated[list[UploadFile], File(description="Picture files, of any kinds.")],
    top_k: TopK = None,
    top_k_of_url: TopKOfUrl = None,
) -> list[ClassifiedPicture | RefusedPicture]:
    """Classify several pictures: an answer for each, in their order.

    The limits are those of one picture: all of them together are no larger and take no longer.
    """
    classifier: PictureClassifier = request.app.state.classifier
    settings = classifier.settings
    if len(images) > settings.max_batch:
        raise Refusal(
            413,
            f"the form holds {len(images)} pictures, expected at most {settings.max_batch}; "
            "send the others in another request",
        )
    number = top_k or top_k_of_url or settings.default_top_k

    def work(is_wanted: IsWanted, times: StageTimes) -> list[ClassifiedPicture | RefusedPicture]:
        answers: list[ClassifiedPicture | RefusedPicture] = []
        for image in images:
            try:
                best = _classify_file(classifier, image, number, is_wanted, times)
                answers.append(ClassifiedPicture(predictions=tuple(best)))
            except HTTPException as error:
                answers.append(RefusedPicture(status=error.status_code, error=str(error.detail)))
            except AbandonedError:
                raise
            except Exception as error:
                answers.append(RefusedPicture(status=500, error=_fault(request)))
                log.error("request %s failed: %s", _number_of(request), in_one_line(error))
        return answers

    return await _run(work, request, response)


@app.get("/model")
async def model(request: Request) -> ModelFacts:
    """Say which model is served."""
    classifier: PictureClassifier = request.app.state.classifier
    classifier.work.require_no_problem()
    return classifier.facts


@app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def page() -> FileResponse:
    """Return the web page."""
    headers = {"Cache-Control": "no-cache", "Content-Security-Policy": PAGE_POLICY}
    return FileResponse(PAGE, headers=headers)


@app.get("/docs", include_in_schema=False)
async def docs() -> HTMLResponse:
    """Return Swagger UI, with assets of this service only."""
    script, style, icon = (f"{ASSETS}/{name}" for name in SWAGGER_FILES)
    html = get_swagger_ui_html(
        openapi_url=str(app.openapi_url),
        title=app.title,
        swagger_js_url=script,
        swagger_css_url=style,
        swagger_favicon_url=icon,
    )
    # Swagger UI writes styles into its elements.
    styles = "style-src 'self' 'unsafe-inline'"
    html.headers["Content-Security-Policy"] = content_policy(bytes(html.body).decode(), styles)
    return html


@app.exception_handler(RequestValidationError)
async def answer_wrong_field(request: Request, error: RequestValidationError) -> JSONResponse:
    """Say in one sentence what is wrong with each field."""
    how = _how_to_send(request.url.path)
    sentences = dict.fromkeys(_what_is_wrong(problem, how) for problem in error.errors())
    return error_response(422, "; ".join(sentences))


@app.exception_handler(HTTPException)
async def answer_http_error(request: Request, error: HTTPException) -> JSONResponse:
    """Give every refusal the same form."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
        # Uploads above 1 MB are buffered in the temporary folder while they arrive.
        return error_response(507, "the disk of the service is full, so it cannot take the upload")
    text = str(error.detail)
    path = request.scope.get("asked_path", request.url.path)
    if isinstance(error, Refusal):
        pass
    elif error.status_code == 404:
        text = f"there is nothing at {path}; see /docs"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        text = f"{path} does not take {request.scope.get('asked_method')}, use {allowed}"
    elif error.status_code == 400:
        text = f"the form cannot be read ({text}); {_how_to_send(path)}"
    return error_response(error.status_code, text, error.headers)


@app.exception_handler(AbandonedError)
async def answer_nobody(_: Request, __: AbandonedError) -> JSONResponse:
    """End a request whose client is gone; the status is for metrics and the log."""
    return error_response(CLIENT_IS_GONE, "the client is gone")


@app.exception_handler(Exception)
async def answer_bug(request: Request, _: Exception) -> JSONResponse:
    """Answer what nobody expected; the gate logs it."""
    return error_response(500, _fault(request))


async def _run(
    work: Callable[[IsWanted, StageTimes], T], request: Request, response: Response
) -> T:
    """Work in the pool of threads, and say how long that took."""
    times = StageTimes()

    def measured(is_wanted: IsWanted) -> T:
        times.end("queue")
        return work(is_wanted, times)

    started = request.scope.get("started", time.monotonic())
    queue: WorkQueue = request.app.state.classifier.work
    result = await queue.run(measured, request.receive, started)
    response.headers[HEADER] = times.header()
    return result


def _number_of(request: Request) -> str:
    return request.scope.get("gate.request_id", "-")


def _fault(request: Request) -> str:
    return f"the service failed on this request; its log says why, at request {_number_of(request)}"


def _classify_file(
    classifier: PictureClassifier,
    image: UploadFile,
    top_k: int,
    is_wanted: IsWanted,
    times: StageTimes,
) -> list[Prediction]:
    max_bytes = classifier.settings.max_upload_bytes
    if image.size is not None and image.size > max_bytes:
        raise too_large(max_bytes)
    try:
        return classifier.classify(image.file.read(), top_k, is_wanted, times)
    except ImageError as error:
        status = 413 if isinstance(error, ImageTooLargeError) else 422
        raise HTTPException(status, str(error)) from error


def _how_to_send(path: str) -> str:
    how = HOW_TO_SEND.get(path, HOW_TO_SEND[CLASSIFY])
    return f"send it as a form field with a file, like: {how}"


def _what_is_wrong(problem: dict[str, Any], how_to_send: str) -> str:
    field = str(problem["loc"][1])  # after where it was looked for, before its place in a list
    if problem["type"] == "missing":
        return f"the field '{field}' is missing; {how_to_send}"
    if field in ("image", "images"):
        return f"the field '{field}' is text, expected a picture file; {how_to_send}"
    found = printable(str(problem["input"]), 40)
    return f"{field} is '{found}', expected a whole number of at least 1"


# The label of each in the metrics; all other paths have one label together.
PATHS = frozenset(
    {
        *(route.path for route in app.routes if isinstance(route, APIRoute)),
        str(app.openapi_url),
        *(f"{ASSETS}/{name}" for name in SWAGGER_FILES),
    }
)
