"""Addresses below /v2 -> KServe's open inference protocol: what the model is, and its logits.

The answers are those of https://github.com/kserve/open-inference-protocol; config and stats are
extensions of Triton's, without which its perf_analyzer does not measure.
"""

import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, get_args

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict

from efficientnet.formats.artifact import ArtifactManifest
from serving.api_description import problems
from serving.batching import Images
from serving.pictures import read_body
from serving.refusals import Refusal
from serving.settings import VERSION
from serving.stages import StageTimes
from serving.tensors import (
    DATATYPE,
    HEADER_LENGTH,
    InferRequest,
    InferResponse,
    OutputTensor,
    parse,
    read_images,
    split_body,
    write_response,
)
from serving.work import IsWanted

# Versions are numbers to Triton's clients; which artifact it is, the headers and /info say.
MODEL_VERSION = "1"
EXTENSIONS = ("binary_tensor_data", "model_configuration", "statistics")

T = TypeVar("T")

TimedPiece = Callable[[IsWanted, StageTimes], Future[T]]


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class Live(_Answer):
    """Whether the service answers."""

    live: bool


class Ready(_Answer):
    """Whether the service, or a model, takes requests."""

    ready: bool


class ModelReady(Ready):
    """Whether a model takes requests."""

    name: str


class ServerMetadata(_Answer):
    """What the service is."""

    name: str
    version: str
    extensions: tuple[str, ...]


class TensorMetadata(_Answer):
    """A tensor of the network; -1 is any number of images."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ModelMetadata(_Answer):
    """What the network takes and gives."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


class TensorConfig(_Answer):
    """A tensor, without the images' axis."""

    name: str
    data_type: str
    dims: tuple[int, ...]


class ModelConfig(_Answer):
    """What Triton's clients ask for before they send tensors."""

    name: str
    platform: str
    max_batch_size: int
    input: tuple[TensorConfig, ...]
    output: tuple[TensorConfig, ...]


class Duration(_Answer):
    """How often, and how long together."""

    count: int = 0
    ns: int = 0


class InferenceStatistics(_Answer):
    """Stages of the requests so far."""

    success: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration = Duration()
    fail: Duration = Duration()
    cache_hit: Duration = Duration()
    cache_miss: Duration = Duration()


class ModelStatistics(_Answer):
    """What a model has done since this worker was started."""

    name: str
    version: str
    inference_count: int
    """Images."""
    execution_count: int
    """Calls of the network."""
    inference_stats: InferenceStatistics


class Statistics(_Answer):
    """What all models have done, of which there is one."""

    model_stats: tuple[ModelStatistics, ...]


_Counted = Literal["success", "queue", "compute_input", "compute_infer"]


class Counters:
    """What a worker has done."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_requests = self._num_images = self._num_calls = 0
        self._seconds = dict.fromkeys(get_args(_Counted), 0.0)

    def count_call(self, num_images: int) -> None:
        """Count a call of the network."""
        with self._lock:
            self._num_calls += 1
            self._num_images += num_images

    def count_request(self, times: StageTimes) -> None:
        """Count a request that was answered."""
        seconds: dict[_Counted, float] = {
            "success": times.total_s,
            "queue": times.seconds["queue"],
            "compute_input": times.seconds["decode"] + times.seconds["preprocess"],
            "compute_infer": times.seconds["infer"],
        }
        with self._lock:
            self._num_requests += 1
            for name, value in seconds.items():
                self._seconds[name] += value

    def statistics(self, name: str) -> Statistics:
        """Return all in the protocol's form."""
        with self._lock:
            durations = {
                key: Duration(count=self._num_requests, ns=int(value * 1e9))
                for key, value in self._seconds.items()
            }
            stats = ModelStatistics(
                name=name,
                version=MODEL_VERSION,
                inference_count=self._num_images,
                execution_count=self._num_calls,
                inference_stats=InferenceStatistics(**durations),
            )
        return Statistics(model_stats=(stats,))


@dataclass(frozen=True)
class ServedModel:
    """The one model that a service has."""

    name: str
    platform: str
    input_name: str
    output_name: str
    image_shape: tuple[int, ...]
    """Channels, height, width."""
    num_classes: int
    max_images: int
    """In a request."""
    counters: Counters

    @classmethod
    def of(cls, manifest: ArtifactManifest, max_pictures: int, counters: Counters) -> "ServedModel":
        """Take from a manifest what clients are told."""
        return cls(
            name=manifest.variant,
            platform=f"{manifest.runtime}_{manifest.precision}",
            input_name=manifest.input.name,
            output_name=manifest.output.name,
            image_shape=manifest.input.shape,
            num_classes=manifest.output.shape[0],
            max_images=max_pictures,
            counters=counters,
        )

    @property
    def paths(self) -> frozenset[str]:
        """All addresses that it has."""
        models = (f"/v2/models/{self.name}", f"/v2/models/{self.name}/versions/{MODEL_VERSION}")
        ends = ("", "/ready", "/infer", "/config", "/stats")
        return frozenset(model + end for model in models for end in ends) | {"/v2/models/stats"}

    def response(self, request: InferRequest, num_images: int) -> InferResponse:
        """Begin the answer to a request, without the values of its output."""
        shape = (num_images, self.num_classes)
        output = OutputTensor(name=self.output_name, datatype=DATATYPE, shape=shape)
        return InferResponse(
            model_name=self.name, model_version=MODEL_VERSION, id=request.id, outputs=(output,)
        )

    def metadata(self) -> ModelMetadata:
        """Describe its tensors."""
        return ModelMetadata(
            name=self.name,
            versions=(MODEL_VERSION,),
            platform=self.platform,
            inputs=(
                TensorMetadata(
                    name=self.input_name, datatype=DATATYPE, shape=(-1, *self.image_shape)
                ),
            ),
            outputs=(
                TensorMetadata(
                    name=self.output_name, datatype=DATATYPE, shape=(-1, self.num_classes)
                ),
            ),
        )

    def config(self) -> ModelConfig:
        """Describe it as Triton does."""
        return ModelConfig(
            name=self.name,
            platform=self.platform,
            max_batch_size=self.max_images,
            input=(
                TensorConfig(name=self.input_name, data_type="TYPE_FP32", dims=self.image_shape),
            ),
            output=(
                TensorConfig(
                    name=self.output_name, data_type="TYPE_FP32", dims=(self.num_classes,)
                ),
            ),
        )


class Inferrer(Protocol):
    """What the routes need of the service."""

    served: ServedModel

    def infer(self, images: Images, is_wanted: IsWanted, times: StageTimes) -> Future[Images]:
        """Return what becomes the logits of preprocessed images."""
        ...


Run = Callable[[list[TimedPiece[Any]], Request, Response], Awaitable[list[Any]]]

OF_MODEL = problems("not_found", "no_model")
OF_INFER = problems(
    "invalid_request",
    "upload_too_slow",
    "upload_too_large",
    "too_many_pictures",
    "unsupported_type",
    "overloaded",
    "stuck",
    "timeout",
    "disk_full",
    also=OF_MODEL,
)
INFER_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/InferRequest"}},
            "application/octet-stream": {
                "schema": {
                    "type": "string",
                    "format": "binary",
                    "description": f"JSON of the length in {HEADER_LENGTH}, then the tensor.",
                }
            },
        },
    }
}
NOT_READY: dict[int | str, dict[str, Any]] = {503: {"model": Ready, "description": "Not ready"}}


def routes(run: Run) -> APIRouter:
    """Make the routes.

    Args:
        run: has work done in the pool, and puts headers into the response.
    """
    router = APIRouter(prefix="/v2", tags=["open inference protocol"])

    @router.get("", responses=problems())
    async def server_metadata() -> ServerMetadata:
        """Say what the service is."""
        return ServerMetadata(name="efficientnet", version=VERSION, extensions=EXTENSIONS)

    @router.get("/health/live", responses=problems())
    async def live() -> Live:
        """Say that the service answers."""
        return Live(live=True)

    @router.get("/health/ready", responses={**problems(), **NOT_READY})
    async def ready(request: Request, response: Response) -> Ready:
        """Say whether the service takes requests."""
        is_ready = await request.app.state.classifier.__is_ready__()
        response.status_code = 200 if is_ready else 503
        return Ready(ready=is_ready)

    @router.get("/models/stats", responses=problems("no_model"))
    async def all_statistics(request: Request) -> Statistics:
        """Say what this worker has done."""
        model = _the_model(request)
        return model.counters.statistics(model.name)

    for prefix in ("/models/{name}", "/models/{name}/versions/{version}"):
        is_listed = "version" not in prefix

        @router.get(prefix, responses=OF_MODEL, include_in_schema=is_listed)
        async def metadata(request: Request, name: str) -> ModelMetadata:
            """Say what the network takes and gives."""
            return _the_model(request).metadata()

        @router.get(f"{prefix}/config", responses=OF_MODEL, include_in_schema=is_listed)
        async def config(request: Request, name: str) -> ModelConfig:
            """Describe the network as Triton does."""
            return _the_model(request).config()

        @router.get(f"{prefix}/stats", responses=OF_MODEL, include_in_schema=is_listed)
        async def statistics(request: Request, name: str) -> Statistics:
            """Say what this worker has done."""
            model = _the_model(request)
            return model.counters.statistics(model.name)

        @router.get(
            f"{prefix}/ready",
            responses={**problems("not_found"), **NOT_READY},
            include_in_schema=is_listed,
        )
        async def model_ready(request: Request, response: Response, name: str) -> ModelReady:
            """Say whether the model takes requests."""
            is_ready = await request.app.state.classifier.__is_ready__()
            response.status_code = 200 if is_ready else 503
            return ModelReady(ready=is_ready, name=name)

        @router.post(
            f"{prefix}/infer",
            responses=OF_INFER,
            response_model=InferResponse,
            openapi_extra=INFER_BODY,
            include_in_schema=is_listed,
        )
        async def infer(request: Request, response: Response, name: str) -> Response:
            """Compute the logits of preprocessed images."""
            model = _the_model(request)
            header_length = request.headers.get(HEADER_LENGTH)

            asked: list[InferRequest] = []

            def begin(is_wanted: IsWanted, times: StageTimes) -> Future[Images]:
                text, extra = split_body(body.file.read(), header_length)
                images = _read(model, text, extra, asked)
                times.end("decode")
                return request.app.state.classifier.infer(images, is_wanted, times)

            async with read_body(request) as body:
                (logits,) = await run([begin], request, response)
            if isinstance(logits, BaseException):
                raise logits
            content, num_json_bytes = write_response(
                asked[0], logits, model.response(asked[0], len(logits))
            )
            headers = dict(response.headers)
            if num_json_bytes is None:
                return Response(content, 200, headers, "application/json")
            headers[HEADER_LENGTH] = str(num_json_bytes)
            return Response(content, 200, headers, "application/octet-stream")

    return router


def _read(model: ServedModel, text: bytes, extra: bytes, asked: list[InferRequest]) -> Images:
    asked.append(parse(text, model.max_images * int(np.prod(model.image_shape))))
    images = read_images(asked[0], extra, model.input_name, model.image_shape)
    if len(images) > model.max_images:
        raise Refusal(
            "too_many_pictures",
            f"the input has {len(images)} images, expected at most {model.max_images}; send the "
            "others in another request",
        )
    return images


def _the_model(request: Request) -> ServedModel:
    # Which one is asked for needs no look: addresses of others do not exist, see routes.is_path.
    classifier = request.app.state.classifier
    classifier.work.require_no_problem()
    return classifier.served
