"""HTTP requests -> answers: POST /classify, the page, the facts of the model, /docs."""

import asyncio
import errno
from concurrent.futures import Executor
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Protocol

import bentoml
from fastapi import FastAPI, File, Form, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from efficientnet.images.preprocess import ImageError, ImageTooLargeError
from serving.answers import ErrorAnswer, ModelFacts, Prediction
from serving.settings import Settings
from serving.uploads import too_large

PAGE = Path(__file__).with_name("page") / "index.html"

# Swagger UI as BentoML bundles it: FastAPI's own /docs would load it from another host.
SWAGGER_DIR = Path(bentoml.__file__).parent / "_internal" / "server" / "static_content"

ONE_FILE = "send it as a form field with a file, like: curl -F image=@picture.jpg .../classify"


class PictureClassifier(Protocol):
    """What the routes need of the service."""

    settings: Settings
    pool: Executor
    """Where decoding and the network run; its size bounds the memory of decoded pictures."""
    facts: ModelFacts

    def classify(self, data: bytes, top_k: int) -> list[Prediction]:
        """Return the `top_k` best classes of an encoded picture."""
        ...


app = FastAPI(
    title="EfficientNet image classifier",
    description="Send a picture, get its most probable classes.",
    docs_url=None,
    redoc_url=None,
)
app.mount("/docs/assets", StaticFiles(directory=SWAGGER_DIR))


@app.post(
    "/classify",
    responses={
        413: {"model": ErrorAnswer, "description": "Too many bytes or pixels"},
        422: {"model": ErrorAnswer, "description": "No picture, or a wrong field"},
    },
)
async def classify(
    request: Request,
    image: Annotated[UploadFile, File(description="A picture file, of any kind Pillow reads.")],
    top_k: Annotated[int | None, Form(ge=1, description="Number of classes to return.")] = None,
    top_k_of_url: Annotated[
        int | None, Query(alias="top_k", ge=1, description="The same, in the address.")
    ] = None,
) -> list[Prediction]:
    """Classify a picture: its best classes, the most probable first.

    A `top_k` above the number of classes returns all of them.
    """
    classifier: PictureClassifier = request.app.state.classifier
    settings = classifier.settings
    if image.size is not None and image.size > settings.max_upload_bytes:
        raise too_large(settings.max_upload_bytes)
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(
        classifier.pool,
        _classify_file,
        classifier,
        image.file,
        top_k or top_k_of_url or settings.default_top_k,
    )


@app.get("/model")
async def model(request: Request) -> ModelFacts:
    """Say which model is served."""
    return request.app.state.classifier.facts


@app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def page() -> FileResponse:
    """Return the web page."""
    return FileResponse(PAGE, headers={"Cache-Control": "no-cache"})


@app.get("/docs", include_in_schema=False)
async def docs() -> HTMLResponse:
    """Return Swagger UI, with assets of this service only."""
    return get_swagger_ui_html(
        openapi_url=str(app.openapi_url),
        title=app.title,
        swagger_js_url="/docs/assets/swagger-ui-bundle.js",
        swagger_css_url="/docs/assets/swagger-ui.css",
        swagger_favicon_url="/docs/assets/favicon-light-32x32.png",
    )


@app.exception_handler(RequestValidationError)
async def answer_wrong_field(_: Request, error: RequestValidationError) -> JSONResponse:
    """Say in one sentence what is wrong with each field."""
    sentences = dict.fromkeys(_what_is_wrong(problem) for problem in error.errors())
    return _error_answer(422, "; ".join(sentences))


@app.exception_handler(HTTPException)
async def answer_http_error(request: Request, error: HTTPException) -> JSONResponse:
    """Give every refusal the same form."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
        # Uploads above 1 MB are buffered in the temporary folder while they arrive.
        return _error_answer(507, "the disk of the service is full, so it cannot take the upload")
    text, path = str(error.detail), request.url.path
    if error.status_code == 404:
        text = f"there is nothing at {path}; see /docs"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        text = f"{path} does not take {request.method}, use {allowed}"
    elif error.status_code == 400:
        text = f"the form cannot be read ({text}); {ONE_FILE}"
    return _error_answer(error.status_code, text, error.headers)


@app.exception_handler(Exception)
async def answer_bug(_: Request, __: Exception) -> JSONResponse:
    """Answer what nobody expected; the server logs the traceback."""
    return _error_answer(500, "the service failed on this request; its log says why")


def _classify_file(classifier: PictureClassifier, file: BinaryIO, top_k: int) -> list[Prediction]:
    try:
        return classifier.classify(file.read(), top_k)
    except ImageError as error:
        status = 413 if isinstance(error, ImageTooLargeError) else 422
        raise HTTPException(status, str(error)) from error


def _what_is_wrong(problem: dict[str, Any]) -> str:
    field = str(problem["loc"][-1])
    if problem["type"] == "missing":
        return f"the field '{field}' is missing; {ONE_FILE}"
    if field == "image":
        return f"the field 'image' is text, expected a picture file; {ONE_FILE}"
    found = str(problem["input"])
    found = found if len(found) <= 40 else found[:40] + "..."
    return f"{field} is '{found}', expected a whole number of at least 1"


def _error_answer(status: int, sentence: str, headers: Any = None) -> JSONResponse:
    return JSONResponse(ErrorAnswer(error=sentence).model_dump(), status, headers)
