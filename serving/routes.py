"""HTTP requests -> answers: pictures classified, and what the service is."""

import errno
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from efficientnet.images.preprocess import ImageError, ImageTooLargeError
from serving import open_inference
from serving.admission import OWN_PATHS
from serving.answers import (
    ClassifiedPicture,
    ModelFacts,
    Prediction,
    RefusedPicture,
    ServiceInfo,
)
from serving.api_description import describe, problems
from serving.batching import Images
from serving.open_inference import ServedModel, TimedPiece
from serving.pictures import DESCRIPTIONS, read_picture, read_pictures
from serving.refusals import Refusal, in_one_line, problem_response, refusal_response, too_large
from serving.settings import VERSION, Settings
from serving.stages import HEADER, StageTimes
from serving.tracing import SPAN
from serving.uploads import CLASSIFY, CLASSIFY_BATCH, how_to_send
from serving.website import ASSETS, SAMPLE_NAMES, SWAGGER_FILES, swagger_files, website
from serving.work import AbandonedError, IsWanted, Piece, WorkQueue, require_wanted

T = TypeVar("T")

PREDICTIONS = TypeAdapter(list[Prediction])

OF_CLASSIFICATION = problems(
    "invalid_request",
    "upload_too_slow",
    "upload_too_large",
    "unsupported_type",
    "invalid_field",
    "overloaded",
    "stuck",
    "no_model",
    "timeout",
    "disk_full",
)
OF_ONE = problems("several_pictures", "picture_too_large", "no_picture", also=OF_CLASSIFICATION)
OF_BATCH = problems("too_many_pictures", also=OF_CLASSIFICATION)

log = logging.getLogger("bentoml.service")


class PictureClassifier(Protocol):
    """What the routes need of the service."""

    settings: Settings
    work: WorkQueue
    """Where decoding and the network run; its size bounds the memory of decoded pictures."""
    facts: ModelFacts
    info: ServiceInfo
    served: ServedModel
    identity: dict[str, str]
    """Headers of every classification: which model gave it."""

    def prepare(self, data: bytes, is_wanted: IsWanted, times: StageTimes) -> Images:
        """Return an encoded picture as the network's input; stop when it is not wanted."""
        ...

    def infer(self, images: Images, is_wanted: IsWanted, times: StageTimes) -> Future[Images]:
        """Return what becomes the logits of preprocessed images."""
        ...

    def predictions(self, logits: Images, top_k: int) -> list[Prediction]:
        """Return the `top_k` best classes of one picture's logits."""
        ...


app = FastAPI(
    title="EfficientNet image classifier",
    description="Send a picture, get its most probable classes.",
    version=VERSION,
    docs_url=None,
    redoc_url=None,
)
app.mount(ASSETS, swagger_files)
app.include_router(website)


@app.post(
    CLASSIFY,
    response_model=list[Prediction],
    responses=OF_ONE,
    openapi_extra=DESCRIPTIONS[CLASSIFY],
)
async def classify(request: Request) -> Response:
    """Classify a picture: its best classes, the most probable first."""
    classifier: PictureClassifier = request.app.state.classifier
    response = Response(media_type="application/json")
    async with read_picture(request) as found:
        (logits,) = await run([_piece(classifier, found.files[0])], request, response)
    if isinstance(logits, BaseException):
        raise logits
    top_k = found.top_k or classifier.settings.default_top_k
    # What is no response FastAPI would check and copy, which takes longer than to write it.
    response.body = PREDICTIONS.dump_json(classifier.predictions(logits, top_k))
    response.headers["Content-Length"] = str(len(response.body))
    return response


@app.post(CLASSIFY_BATCH, responses=OF_BATCH, openapi_extra=DESCRIPTIONS[CLASSIFY_BATCH])
async def classify_batch(
    request: Request, response: Response
) -> list[ClassifiedPicture | RefusedPicture]:
    """Classify several pictures: an answer for each, in their order.

    The limits are those of one picture: all of them together are no larger and take no longer.
    """
    classifier: PictureClassifier = request.app.state.classifier
    async with read_pictures(request, classifier.settings.max_batch) as found:
        pieces = [_piece(classifier, file) for file in found.files]
        results = await run(pieces, request, response)

    top_k = found.top_k or classifier.settings.default_top_k
    answers: list[ClassifiedPicture | RefusedPicture] = []
    for logits in results:
        if not isinstance(logits, BaseException):
            best = classifier.predictions(logits, top_k)
            answers.append(ClassifiedPicture(predictions=tuple(best)))
        elif isinstance(logits, Refusal):
            answers.append(_refused(logits))
        elif isinstance(logits, Exception) and not isinstance(logits, AbandonedError):
            answers.append(_refused(Refusal("internal_error", _fault(request))))
            log.error("request %s failed: %s", _number_of(request), in_one_line(logits))
        else:
            raise logits
    return answers


@app.get("/info", responses=problems("no_model"))
async def info(request: Request) -> ServiceInfo:
    """Say what answers: the model, how its pictures are prepared, and what runs it."""
    classifier: PictureClassifier = request.app.state.classifier
    classifier.work.require_no_problem()
    return classifier.info


@app.get("/model", responses=problems("no_model"))
async def model(request: Request) -> ModelFacts:
    """Say in short which model is served, as the web page shows it; /info says more."""
    classifier: PictureClassifier = request.app.state.classifier
    classifier.work.require_no_problem()
    return classifier.facts


@app.exception_handler(HTTPException)
async def answer_http_error(request: Request, error: HTTPException) -> Response:
    """Give every refusal the same form."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
        return _disk_is_full()
    if isinstance(error, Refusal):
        return refusal_response(error)
    path = request.scope.get("asked_path", request.url.path)
    headers, status = error.headers, error.status_code
    if status == 404 and path in OWN_PATHS:  # of BentoML, which passes other methods on
        headers, status = {"Allow": "GET, HEAD"}, 405
    if status == 404:
        sentence = f"there is nothing at {path}; see /docs"
        return problem_response("not_found", sentence, error.headers)
    if status == 405:
        allowed = (headers or {}).get("Allow", "another method")
        sentence = f"{path} does not take {request.scope.get('asked_method')}, use {allowed}"
        return problem_response("method_not_allowed", sentence, headers)
    sentence = f"the form cannot be read ({error.detail}); {how_to_send(path)}"
    return problem_response("invalid_request", sentence, error.headers)


@app.exception_handler(OSError)
async def answer_os_error(request: Request, error: OSError) -> Response:
    """Answer a full disk in its own way."""
    # Uploads above 1 MB are buffered in the temporary folder while they arrive.
    if error.errno == errno.ENOSPC:
        return _disk_is_full()
    raise error


@app.exception_handler(AbandonedError)
@app.exception_handler(ClientDisconnect)
async def answer_nobody(_: Request, __: AbandonedError | ClientDisconnect) -> Response:
    """End a request whose client is gone; the status is for metrics and the log."""
    return problem_response("client_gone", "the client is gone")


@app.exception_handler(Exception)
async def answer_bug(request: Request, _: Exception) -> Response:
    """Answer what nobody expected; the gate logs it."""
    return problem_response("internal_error", _fault(request))


def is_one_picture(scope: Scope) -> bool:
    """Whether a request has a lane of its own."""
    return scope["method"] == "POST" and scope["path"] == CLASSIFY


async def short_lane(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer as `app` does, and `POST /classify` without looking for its route.

    The layers of two frameworks take as long as the rest of what a picture costs the event loop.
    """
    if scope["type"] != "http" or not is_one_picture(scope):
        await app(scope, receive, send)
        return
    request = Request({**scope, "app": app}, receive, send)
    bug: Exception | None = None
    try:
        response = await classify(request)
    except Exception as error:
        kind = next(kind for kind in type(error).__mro__ if kind in app.exception_handlers)
        bug = error if kind is Exception else None
        handler: Any = app.exception_handlers[kind]
        response = await handler(request, error)
    await response(scope, receive, send)
    if bug:
        raise bug


async def run(
    pieces: Sequence[TimedPiece[T]], request: Request, response: Response
) -> list[T | BaseException]:
    """Have the pieces done; say how long that took, and which model it was."""
    all_times = [StageTimes() for _ in pieces]

    def timed(piece: TimedPiece[T], times: StageTimes) -> Piece[T]:
        def begin(is_wanted: IsWanted) -> Future[T]:
            times.end("queue")
            return piece(is_wanted, times)

        return begin

    started = request.scope.get("started", time.monotonic())
    classifier: PictureClassifier = request.app.state.classifier
    results = await classifier.work.run(
        list(map(timed, pieces, all_times)), request.receive, started
    )
    if span := request.scope.get(SPAN):
        span.add(all_times)
    for times in all_times[1:]:
        all_times[0].add(times)
    response.headers[HEADER] = all_times[0].header()
    response.headers.update(classifier.identity)
    return results


def _disk_is_full() -> Response:
    return problem_response(
        "disk_full", "the disk of the service is full, so it cannot take the upload"
    )


def _number_of(request: Request) -> str:
    return request.scope.get("gate.request_id", "-")


def _fault(request: Request) -> str:
    return f"the service failed on this request; its log says why, at request {_number_of(request)}"


def _refused(refusal: Refusal) -> RefusedPicture:
    return RefusedPicture(status=refusal.status_code, code=refusal.code, error=refusal.detail)


def _piece(classifier: PictureClassifier, image: UploadFile) -> TimedPiece[Images]:
    max_bytes = classifier.settings.max_upload_bytes

    def begin(is_wanted: IsWanted, times: StageTimes) -> Future[Images]:
        if image.size is not None and image.size > max_bytes:
            raise too_large(max_bytes)
        try:
            images = classifier.prepare(image.file.read(), is_wanted, times)
        except ImageError as error:
            code = "picture_too_large" if isinstance(error, ImageTooLargeError) else "no_picture"
            raise Refusal(code, str(error)) from error
        require_wanted(is_wanted)
        return classifier.infer(images, is_wanted, times)

    return begin


tensor_routes = open_inference.routes(run)
app.include_router(tensor_routes)
describe(app)

# The label of each in the metrics; all other paths have one label together.
_PATHS = frozenset(
    {
        *(
            route.path
            for route in (*app.routes, *website.routes, *tensor_routes.routes)
            if isinstance(route, APIRoute) and "{" not in route.path
        ),
        str(app.openapi_url),
        *(f"{ASSETS}/{name}" for name in SWAGGER_FILES),
        *(f"/samples/{name}" for name in SAMPLE_NAMES),
    }
)


def is_path(path: str) -> bool:
    """Whether an address exists; of the open inference protocol only those of the served model."""
    if path in _PATHS:
        return True
    classifier = getattr(app.state, "classifier", None)
    served: ServedModel | None = getattr(classifier, "served", None)
    return served is not None and path in served.paths
