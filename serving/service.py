"""An artifact -> the BentoML service: loads, warms up, classifies; BentoML does the rest.

BentoML answers /livez, /readyz and /metrics; all other addresses are `serving.routes`. What runs
the worker processes is `serving.supervisor`, or BentoML's master after `bentoml serve`.
`POST /classify` is a route of our own and not a BentoML API because BentoML's file inputs also take
an address, which the server then fetches, and its errors are lists.
"""

import gc
import io
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import lru_cache
from importlib import metadata
from pathlib import PurePath
from typing import Any

import bentoml
from bentoml._internal.context import server_context
from bentoml.exceptions import BentoMLException
from PIL import Image
from starlette.types import ASGIApp, Receive, Scope, Send

from efficientnet.formats.artifact import ArtifactError, ArtifactManifest, read_artifact
from efficientnet.images.datasets import SAMPLE_PHOTOS
from efficientnet.images.decoding import IMAGE_FORMATS, MAX_PIXELS
from efficientnet.runtimes import open_runtime
from efficientnet.runtimes.protocol import infer_beside, takes_pixels
from serving.admission import Gate, with_cors
from serving.answers import Limits, ModelFacts, Prediction, ServiceInfo, best_classes
from serving.batching import Batcher, Images, be_less_urgent
from serving.decoders import DecoderError, Decoders
from serving.decoding_process import DecodingJob
from serving.metrics import of_this_process
from serving.open_inference import Counters, ServedModel
from serving.routes import app, is_one_picture, is_path, short_lane
from serving.settings import (
    ARTIFACT_SHA256_VARIABLE,
    ARTIFACT_VARIABLE,
    DEFAULT_ARTIFACT,
    PROCESS_ENVIRONMENT,
    VERSION,
    artifact_sha256,
    read_settings,
)
from serving.stages import StageTimes
from serving.tracing import TracingError, is_traced, traced
from serving.uploads import HOW_TO_SEND, Uploads
from serving.work import AbandonedError, IsWanted, WorkQueue

SETTINGS = read_settings(os.environ)

# Packages that a picture goes through; no other is anybody's business.
PACKAGES = ("bentoml", "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "pillow", "tensorrt")

NUM_IMAGENET_CLASSES = 1000

# Backstop for what our own time limit does not reach.
TIMEOUT_MARGIN_S = 30

# Room for a picture of our own, where hardly any bytes may be sent.
LEAST_SHARED_BYTES = 1_000_000

log = logging.getLogger("bentoml.service")

# What is wrong with a picture is answered; Pillow also writes some of it into the log, as an error.
logging.getLogger("PIL").setLevel(logging.CRITICAL)


class GatedService(bentoml.Service[Any]):
    """A service of BentoML behind the gate: BentoML's own middlewares see what it lets through."""

    def inject_config(self) -> None:
        """Take the configuration, which BentoML does before it builds or serves.

        Raises:
            BentoMLException: `bentoml build` finds no artifact, or is asked for another than the
                one that it packs.
        """
        if {"serve", "serve-http"} & set(sys.argv):
            _close_control_ports()
        if sys.argv[1:2] in (["build"], ["deploy"]):
            if SETTINGS.artifact != DEFAULT_ARTIFACT:
                raise BentoMLException(
                    f"'bentoml build' packs {DEFAULT_ARTIFACT} only, and {ARTIFACT_VARIABLE} is "
                    f"{SETTINGS.artifact}: use 'python serving/pack.py', which packs that one"
                )
            _require_artifact()
        super().inject_config()

    def to_asgi(self, is_main: bool = True) -> Any:
        """Make what the worker serves."""
        super().inject_config()
        gate = Gate(
            traced(_application(self, is_main)),
            is_path,
            SETTINGS.allowed_hosts,
            SETTINGS.api_key,
            lambda: app.state.classifier.is_draining or app.state.classifier.is_leaving,
        )
        # What is traced, and what pages of other sites are to read, goes the whole way.
        app.state.gate = None if is_traced() or SETTINGS.cors_origins else gate
        return with_cors(gate, SETTINGS.cors_origins)


def refuse_early(scope: Scope) -> bytes | None:
    """Return the answer to a picture that the worker has no place for: see connections.limited.

    The way through the application takes half as long again, and waits its turn in the loop.
    """
    gate: Gate | None = app.state.gate
    if gate is None or scope["method"] != "POST" or scope["path"] not in HOW_TO_SEND:
        return None
    refusal = app.state.classifier.work.refusal()
    if refusal is None:
        return None
    app.state.count(scope["path"], refusal.status_code)
    return gate.refuse(scope, refusal)


def _application(service: bentoml.Service[Any], is_main: bool) -> Any:
    """Make BentoML's application, without what opens a span for each message of each request.

    Nothing reads those spans, nor BentoML's context: `traced` sends spans of its own. The two took
    half of what a request costs beside its picture.
    """
    from _bentoml_impl.server.app import ContextMiddleware, ServiceAppFactory
    from bentoml._internal.server.http.instruments import RunnerTrafficMetricsMiddleware
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
    from starlette.middleware import Middleware

    class Counted(RunnerTrafficMetricsMiddleware):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            app.state.count = self.count

        def count(self, path: str, status: int) -> None:
            """Count a request that was answered at once."""
            total, durations = self._series(path, status)
            total.inc()
            durations.observe(0.0)

        @lru_cache(maxsize=16)  # noqa: B019
        def _series(self, path: str, status: int) -> tuple[Any, Any]:
            if not self._is_setup:
                self._setup()
            labels = {
                "endpoint": path,
                "service_name": server_context.bento_name,
                "service_version": server_context.bento_version,
                "http_response_code": status,
                "runner_name": server_context.service_name,
            }
            metrics = (self.metrics_request_total, self.metrics_request_duration)
            return metrics[0].labels(**labels), metrics[1].labels(**labels)

    class LeanAppFactory(ServiceAppFactory):
        @property
        def middlewares(self) -> list[Middleware]:
            unread = (ContextMiddleware, OpenTelemetryMiddleware)
            counted, *others = (found for found in super().middlewares if found.cls not in unread)
            assert counted.cls is RunnerTrafficMetricsMiddleware
            counted = Middleware(Counted, **counted.kwargs)
            return [counted, Middleware(PastRouters), *others]

    return LeanAppFactory(service, is_main=is_main)()


class PastRouters:
    """ASGI middleware: a picture goes where BentoML's routers would send it, sooner.

    Past BentoML's own time limit, too, which has a task and a timer of 90 s for each request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        is_picture = scope["type"] == "http" and is_one_picture(scope)
        await (uploads if is_picture else self._app)(scope, receive, send)


def _require_artifact() -> None:
    try:
        read_artifact(SETTINGS.artifact)
        _require_same(SETTINGS.artifact_sha256)
    except ArtifactError as error:
        raise BentoMLException(str(error)) from None


def _require_same(sha256: str) -> None:
    found = artifact_sha256(SETTINGS.artifact)
    if sha256 and found != sha256:
        raise ArtifactError(
            f"the artifact there now, {found[:12]}, is another than {sha256[:12]}, which "
            "CLASSIFIER_ARTIFACT_SHA256 names or the service was given; put that one back, "
            "or start the service again to serve the new one"
        )


def trained_on(manifest: ArtifactManifest) -> str:
    """Name what the network was trained on: published weights come with none of their images."""
    if manifest.data != SAMPLE_PHOTOS:
        return PurePath(manifest.data).name
    return "ImageNet" if len(manifest.class_names) == NUM_IMAGENET_CLASSES else "data of others"


def service_info(manifest: ArtifactManifest, sha256: str) -> ServiceInfo:
    """Say what answers.

    Args:
        manifest: of the artifact.
        sha256: of the manifest.
    """
    return ServiceInfo(
        model=manifest.variant,
        artifact_sha256=sha256,
        program_sha256=manifest.program_sha256,
        checkpoint_sha256=manifest.checkpoint_sha256,
        preprocess=manifest.preprocess,
        preprocess_sha256=manifest.preprocess.sha256,
        runtime=manifest.runtime,
        precision=manifest.precision,
        num_classes=len(manifest.class_names),
        class_names=manifest.class_names,
        trained_on=trained_on(manifest),
        gate=manifest.gate,
        workers=SETTINGS.workers,
        threads=SETTINGS.threads_per_worker,
        limits=Limits(
            max_upload_bytes=SETTINGS.max_upload_bytes,
            max_pixels=MAX_PIXELS,
            picture_kinds=IMAGE_FORMATS,
            max_pictures=SETTINGS.max_batch,
            network_batch=SETTINGS.network_batch,
            batch_wait_ms=SETTINGS.batch_wait_ms,
            max_concurrency=SETTINGS.max_concurrency,
            timeout_s=SETTINGS.timeout_s,
            default_top_k=SETTINGS.default_top_k,
        ),
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    versions = {"efficientnet-pipeline": VERSION, "python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _close_control_ports() -> None:
    # BentoML's master lets circus listen on two ports of 127.0.0.1, where every user of the machine
    # can have commands run as this one. Sockets in a folder of this user alone do the same.
    def create_arbiter(watchers: list[Any], *, threaded: bool = False, **options: Any) -> Any:
        folder = tempfile.mkdtemp(prefix="efficientnet-control-")  # mode 0700
        arbiter_class = circus.ThreadedArbiter if threaded else circus.Arbiter
        arbiter = arbiter_class(
            watchers,
            endpoint=f"ipc://{folder}/control",
            pubsub_endpoint=f"ipc://{folder}/events",
            check_delay=options.pop("check_delay", 10),
            **options,
        )
        arbiter.exit_stack.callback(shutil.rmtree, folder, ignore_errors=True)
        return arbiter

    from bentoml._internal.utils import circus

    assert callable(circus.create_standalone_arbiter)  # what `bentoml serve` calls
    circus.create_standalone_arbiter = create_arbiter


# The limit is wrapped around the application, and not added to it, so that BentoML mounts the whole
# as one unit that also answers unknown addresses; of a bare FastAPI it would take the routes only.
uploads = Uploads(short_lane, SETTINGS, lambda: app.state.classifier.work)


@bentoml.asgi_app(uploads)
@bentoml.service(
    name="efficientnet",
    workers=SETTINGS.workers,
    # BentoML's limit of requests counts the page and bodies that are still on their way.
    traffic={"timeout": SETTINGS.timeout_s + TIMEOUT_MARGIN_S},
    # The gate writes one.
    logging={"access": {"enabled": False}},
    envs=[{"name": name, "value": value} for name, value in PROCESS_ENVIRONMENT.items()],
    service_class=GatedService,
)
class Classifier:
    """Classifies pictures with one exported EfficientNet."""

    def __init__(self) -> None:
        self.is_warm = self.is_draining = self.is_leaving = False
        self.settings = SETTINGS
        self._metrics = of_this_process()
        self.work = WorkQueue(
            SETTINGS.num_decoders,
            SETTINGS.max_concurrency,
            SETTINGS.timeout_s,
            self._metrics.set_in_flight,
        )
        self._at_end = ExitStack()
        self._at_end.callback(self.work.close)
        app.state.classifier = self
        try:
            self._open()
        except (ArtifactError, DecoderError) as error:
            # A worker that fails here would be started again and again by BentoML's master.
            self.work.problem = str(error)
            log.error("no picture can be classified: %s", error)

    def _open(self) -> None:
        # Read first: open_runtime takes checkpoints too, and would import torch for one.
        manifest = read_artifact(SETTINGS.artifact)
        _require_same(SETTINGS.artifact_sha256)
        # They get ready while the network does.
        self._decoders = Decoders(
            DecodingJob(
                spec=manifest.preprocess,
                max_cpu_s=SETTINGS.decode_cpu_s,
                max_memory_bytes=SETTINGS.decode_memory_bytes,
                max_picture_bytes=max(SETTINGS.max_upload_bytes, LEAST_SHARED_BYTES),
            ),
            SETTINGS.num_decoders,
            self._metrics.count_ended_decoder,
        )
        self._at_end.callback(self._decoders.close)
        with ThreadPoolExecutor(1, initializer=be_less_urgent) as opening:
            runtime = opening.submit(
                open_runtime, SETTINGS.artifact, SETTINGS.threads_per_worker, may_spin=False
            ).result()
        self._takes_pixels = takes_pixels(runtime)
        info = runtime.info
        self._class_names = info.class_names
        self.facts = ModelFacts(
            variant=info.variant,
            runtime=info.runtime,
            precision=info.precision,
            image_size=info.preprocess.image_size,
            num_classes=len(info.class_names),
            program_sha256=info.program_sha256,
            max_upload_bytes=SETTINGS.max_upload_bytes,
        )
        self.info = service_info(manifest, artifact_sha256(SETTINGS.artifact))
        self.identity = {
            "X-Model": self.info.model,
            "X-Artifact-SHA256": self.info.artifact_sha256,
            "X-Preprocess-SHA256": self.info.preprocess_sha256,
        }
        self._counters = Counters()
        # One call at a time is what every runtime promises; a call uses all threads anyway.
        self._batcher = Batcher(
            runtime.infer,
            infer_beside(runtime),
            min(SETTINGS.network_batch, info.max_batch_size or SETTINGS.network_batch),
            SETTINGS.batch_wait_ms / 1000,
            self._count_call,
        )
        self._at_end.callback(self._batcher.close)
        self.work.is_stuck_beyond = lambda: (
            self._decoders.is_stuck or self._batcher.is_stuck(SETTINGS.timeout_s)
        )
        self._warm_up()
        self.served = ServedModel.of(manifest, SETTINGS.max_batch, self._counters)

    @bentoml.on_deployment
    @staticmethod
    def check_artifact() -> None:
        """Stop before any worker starts when there is no artifact, and have all serve this one.

        Raises:
            BentoMLException: missing, damaged, or not ours; or a collector for traces is named that
                cannot be sent to.
        """
        _require_artifact()
        try:
            is_traced()
        except TracingError as error:
            raise BentoMLException(str(error)) from None
        os.environ.setdefault(ARTIFACT_SHA256_VARIABLE, artifact_sha256(SETTINGS.artifact))

    @bentoml.on_shutdown
    def stop_pool(self) -> None:
        """Let go of the threads, and end the decoders."""
        self._at_end.close()

    # async: BentoML would call anything else in a thread of the pool that uploads use, too.
    async def __is_ready__(self) -> bool:
        return self.is_warm and not self.is_draining and not self.work.is_stuck

    def prepare(self, data: bytes, is_wanted: IsWanted, times: StageTimes) -> Images:
        """Return an encoded picture as the network's input, float32 [1, 3, H, W] or its pixels.

        Raises:
            ImageError, AbandonedError: see Decoders.preprocess.
        """
        with self._batcher.coming():
            return self._decoders.preprocess(data, is_wanted, times, self._takes_pixels)[None]

    def infer(self, images: Images, is_wanted: IsWanted, times: StageTimes) -> Future[Images]:
        """Return what becomes the logits [N, classes] of preprocessed images [N, 3, H, W]."""
        logits = self._batcher.submit(images, is_wanted, times)
        logits.add_done_callback(
            lambda done: None if done.exception() else self._count_answer(times)
        )
        return logits

    def predictions(self, logits: Images, top_k: int) -> list[Prediction]:
        """Return the `top_k` best classes of one picture's logits, the most probable first."""
        return best_classes(logits, self._class_names, top_k)

    def classify(self, data: bytes, top_k: int) -> list[Prediction]:
        """Return the `top_k` best classes of an encoded picture.

        Raises:
            ImageError, AbandonedError: see prepare; it took longer than a request may.
        """
        times, deadline = StageTimes(), time.monotonic() + SETTINGS.timeout_s

        def is_wanted() -> bool:
            return time.monotonic() < deadline

        logits = self.infer(self.prepare(data, is_wanted, times), is_wanted, times)
        return self.predictions(logits.result(), top_k)

    def _count_call(self, num_images: int) -> None:
        self._counters.count_call(num_images)
        if self.is_warm:
            self._metrics.count_call(num_images)

    def _count_answer(self, times: StageTimes) -> None:
        self._counters.count_request(times)
        if self.is_warm:
            self._metrics.count_picture(times)

    def _warm_up(self) -> None:
        # Every size that a call may have; and the whole path, as the first picture also makes
        # Pillow load its decoders.
        size = self.facts.image_size
        buffer = io.BytesIO()
        Image.new("RGB", (size, size)).save(buffer, format="PNG")
        try:
            self._batcher.warm_up((3, size, size))
            self.classify(buffer.getvalue(), top_k=1)
        except ValueError as error:
            raise ArtifactError(f"the manifest does not fit its program: {error}") from None
        except AbandonedError:
            raise DecoderError(
                f"no picture could be decoded within {SETTINGS.timeout_s} s; the log says why"
            ) from None
        self._counters = Counters()
        self._metrics.tell_model(self.info)
        # All that is there stays: looked through again and again by the garbage collector, it was a
        # third of what the event loop did.
        gc.collect()
        gc.freeze()
        self.is_warm = True
