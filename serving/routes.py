"""HTTP requests -> answers: pictures classified, and what the service is."""

import errno
import logging
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from numpy.typing import NDArray
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from efficientnet.images.preprocess import ImageError, ImageTooLargeError
from serving import open_inference
from serving.answers import (
    ClassifiedPicture,
    ModelFacts,
    Prediction,
    RefusedPicture,
    ServiceInfo,
)
from serving.api_description import describe, problems
from serving.open_inference import ServedModel
from serving.pictures import DESCRIPTIONS, read_picture, read_pictures
from serving.refusals import Refusal, in_one_line, problem_response, refusal_response, too_large
from serving.settings import VERSION, Settings
from serving.stages import HEADER, StageTimes
from serving.uploads import CLASSIFY, CLASSIFY_BATCH, how_to_send
from serving.website import ASSETS, SWAGGER_FILES, swagger_files, website
from serving.work import AbandonedError, IsWanted, WorkQueue

T = TypeVar("T")

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

    def classify(
        self, data: bytes, top_k: int, is_wanted: IsWanted, times: StageTimes
    ) -> list[Prediction]:
        """Return the `top_k` best classes of an encoded picture."""
        ...

    def infer(
        self, images: NDArray[np.float32], is_wanted: IsWanted, times: StageTimes
    ) -> NDArray[np.float32]:
        """Return the logits of preprocessed images."""
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


@app.post(CLASSIFY, responses=OF_ONE, openapi_extra=DESCRIPTIONS[CLASSIFY])
async def classify(request: Request, response: Response) -> list[Prediction]:
    """Classify a picture: its best classes, the most probable first."""
    classifier: PictureClassifier = request.app.state.classifier
    found = await read_picture(request)
    number = found.top_k or classifier.settings.default_top_k

    def work(is_wanted: IsWanted, times: StageTimes) -> list[Prediction]:
        return _classify_file(classifier, found.files[0], number, is_wanted, times)

    return await run(work, request, response)


@app.post(CLASSIFY_BATCH, responses=OF_BATCH, openapi_extra=DESCRIPTIONS[CLASSIFY_BATCH])
async def classify_batch(
    request: Request, response: Response
) -> list[ClassifiedPicture | RefusedPicture]:
    """Classify several pictures: an answer for each, in their order.

    The limits are those of one picture: all of them together are no larger and take no longer.
    """
    classifier: PictureClassifier = request.app.state.classifier
    found = await read_pictures(request, classifier.settings.max_batch)
    number = found.top_k or classifier.settings.default_top_k

    def work(is_wanted: IsWanted, times: StageTimes) -> list[ClassifiedPicture | RefusedPicture]:
        answers: list[ClassifiedPicture | RefusedPicture] = []
        for image in found.files:
            try:
                best = _classify_file(classifier, image, number, is_wanted, times)
                answers.append(ClassifiedPicture(predictions=tuple(best)))
            except Refusal as refusal:
                answers.append(_refused(refusal))
            except AbandonedError:
                raise
            except Exception as error:
                answers.append(_refused(Refusal("internal_error", _fault(request))))
                log.error("request %s failed: %s", _number_of(request), in_one_line(error))
        return answers

    return await run(work, request, response)


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
async def answer_http_error(request: Request, error: HTTPException) -> JSONResponse:
    """Give every refusal the same form."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
        return _disk_is_full()
    if isinstance(error, Refusal):
        return refusal_response(error)
    path = request.scope.get("asked_path", request.url.path)
    if error.status_code == 404:
        sentence = f"there is nothing at {path}; see /docs"
        return problem_response("not_found", sentence, error.headers)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        sentence = f"{path} does not take {request.scope.get('asked_method')}, use {allowed}"
        return problem_response("method_not_allowed", sentence, error.headers)
    sentence = f"the form cannot be read ({error.detail}); {how_to_send(path)}"
    return problem_response("invalid_request", sentence, error.headers)


@app.exception_handler(OSError)
async def answer_os_error(request: Request, error: OSError) -> JSONResponse:
    """Answer a full disk in its own way."""
    # Uploads above 1 MB are buffered in the temporary folder while they arrive.
    if error.errno == errno.ENOSPC:
        return _disk_is_full()
    raise error


@app.exception_handler(AbandonedError)
async def answer_nobody(_: Request, __: AbandonedError) -> JSONResponse:
    """End a request whose client is gone; the status is for metrics and the log."""
    return problem_response("client_gone", "the client is gone")


@app.exception_handler(Exception)
async def answer_bug(request: Request, _: Exception) -> JSONResponse:
    """Answer what nobody expected; the gate logs it."""
    return problem_response("internal_error", _fault(request))


async def run(work: Callable[[IsWanted, StageTimes], T], request: Request, response: Response) -> T:
    """Work in the pool of threads; say how long that took, and which model it was."""
    times = StageTimes()

    def measured(is_wanted: IsWanted) -> T:
        times.end("queue")
        return work(is_wanted, times)

    started = request.scope.get("started", time.monotonic())
    classifier: PictureClassifier = request.app.state.classifier
    result = await classifier.work.run(measured, request.receive, started)
    response.headers[HEADER] = times.header()
    response.headers.update(classifier.identity)
    return result


def _disk_is_full() -> JSONResponse:
    return problem_response(
        "disk_full", "the disk of the service is full, so it cannot take the upload"
    )


def _number_of(request: Request) -> str:
    return request.scope.get("gate.request_id", "-")


def _fault(request: Request) -> str:
    return f"the service failed on this request; its log says why, at request {_number_of(request)}"


def _refused(refusal: Refusal) -> RefusedPicture:
    return RefusedPicture(status=refusal.status_code, code=refusal.code, error=refusal.detail)


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
        is_too_large = isinstance(error, ImageTooLargeError)
        raise Refusal("picture_too_large" if is_too_large else "no_picture", str(error)) from error


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
    }
)


def is_path(path: str) -> bool:
    """Whether an address exists; of the open inference protocol only those of the served model."""
    if path in _PATHS:
        return True
    classifier = getattr(app.state, "classifier", None)
    served: ServedModel | None = getattr(classifier, "served", None)
    return served is not None and path in served.paths
