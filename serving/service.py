"""An artifact -> the BentoML service: loads, warms up, classifies; BentoML does the rest.

BentoML runs the worker and answers /livez, /readyz and /metrics; all other addresses are
`serving.routes`. `POST /classify` is a route of our own and not a BentoML API because BentoML's
file inputs also take an address, which the server then fetches, and its errors are lists.
"""

import io
import os
import sys
import threading
from typing import Any

import bentoml
from bentoml.exceptions import BentoMLException
from PIL import Image

from efficientnet.formats.artifact import ArtifactError, read_artifact
from efficientnet.images.preprocess import preprocess
from efficientnet.machine.environment import num_usable_cores
from efficientnet.runtimes import open_runtime
from serving.answers import ModelFacts, Prediction, best_classes
from serving.gate import Gate
from serving.routes import PATHS, app
from serving.settings import ARTIFACT_VARIABLE, DEFAULT_ARTIFACT, read_settings
from serving.uploads import Uploads
from serving.work import IsWanted, WorkQueue, require_wanted

SETTINGS = read_settings(os.environ)

WORKER_ENVIRONMENT: list[Any] = [
    # Left alone, glibc keeps what a picture of 50 megapixels took, for each thread: measured 850 MB
    # of resident memory instead of 140 MB after four such pictures. Setting this threshold, to
    # whatever value, is what makes it give large blocks back at once.
    {"name": "MALLOC_TRIM_THRESHOLD_", "value": "1000000"},
]


# Backstop for what our own time limit does not reach.
TIMEOUT_MARGIN_S = 30


class GatedService(bentoml.Service[Any]):
    """A service of BentoML behind the gate: BentoML's own middlewares see what it lets through."""

    def inject_config(self) -> None:
        """Take the configuration, which BentoML does before it builds or serves.

        Raises:
            BentoMLException: there is no artifact; or another than the one that `bentoml build`
                packs is asked for.
        """
        if sys.argv[1:2] in (["build"], ["deploy"]) and SETTINGS.artifact != DEFAULT_ARTIFACT:
            raise BentoMLException(
                f"'bentoml build' packs {DEFAULT_ARTIFACT} only, and {ARTIFACT_VARIABLE} is "
                f"{SETTINGS.artifact}: use 'python serving/pack.py', which packs that one"
            )
        try:
            read_artifact(SETTINGS.artifact)
        except ArtifactError as error:
            raise BentoMLException(str(error)) from None
        super().inject_config()

    def to_asgi(self, is_main: bool = True) -> Any:
        """Make what the worker serves."""
        return Gate(super().to_asgi(is_main), PATHS, SETTINGS.allowed_hosts)


# The limit is wrapped around the application, and not added to it, so that BentoML mounts the whole
# as one unit that also answers unknown addresses; of a bare FastAPI it would take the routes only.
@bentoml.asgi_app(Uploads(app, SETTINGS, lambda: app.state.classifier.work))
@bentoml.service(
    name="efficientnet",
    workers=1,
    # BentoML's limit of requests counts the page and bodies that are still on their way.
    traffic={"timeout": SETTINGS.timeout_s + TIMEOUT_MARGIN_S},
    # The gate writes one.
    logging={"access": {"enabled": False}},
    envs=WORKER_ENVIRONMENT,
    service_class=GatedService,
)
class Classifier:
    """Classifies pictures with one exported EfficientNet."""

    def __init__(self) -> None:
        self.is_warm = False
        self.settings = SETTINGS
        # Read first: open_runtime takes checkpoints too, and would import torch for one.
        read_artifact(SETTINGS.artifact)
        self._runtime = open_runtime(SETTINGS.artifact, SETTINGS.num_threads)
        # One call at a time is what every runtime promises; a call uses all threads anyway.
        self._runtime_lock = threading.Lock()
        info = self._runtime.info
        self.facts = ModelFacts(
            variant=info.variant,
            runtime=info.runtime,
            precision=info.precision,
            image_size=info.preprocess.image_size,
            num_classes=len(info.class_names),
            program_sha256=info.program_sha256,
            max_upload_bytes=SETTINGS.max_upload_bytes,
        )
        self.work = WorkQueue(num_usable_cores(), SETTINGS.max_concurrency, SETTINGS.timeout_s)
        app.state.classifier = self
        self._warm_up()

    @bentoml.on_deployment
    @staticmethod
    def check_artifact() -> None:
        """Stop before any worker starts when there is no artifact to serve.

        A worker that fails in its constructor would be started again and again.

        Raises:
            ArtifactError: missing, damaged, or not ours.
        """
        read_artifact(SETTINGS.artifact)

    @bentoml.on_shutdown
    def stop_pool(self) -> None:
        """Let go of the threads."""
        self.work.close()

    # async: BentoML would call anything else in a thread of the pool that uploads use, too.
    async def __is_ready__(self) -> bool:
        return self.is_warm and not self.work.is_stuck

    def classify(
        self, data: bytes, top_k: int, is_wanted: IsWanted = lambda: True
    ) -> list[Prediction]:
        """Return the `top_k` best classes of an encoded picture, the most probable first.

        May be called from several threads at once.

        Raises:
            ImageError: no picture, damaged, or too many pixels.
            AbandonedError: between two steps, the answer was found to be wanted no more.
        """
        info = self._runtime.info
        require_wanted(is_wanted)
        images = preprocess(data, info.preprocess)[None]
        with self._runtime_lock:
            require_wanted(is_wanted)
            logits = self._runtime.infer(images)
        return best_classes(logits, info.class_names, top_k)

    def _warm_up(self) -> None:
        # The whole path with a batch of one, the only size the service runs. The first picture also
        # makes Pillow load its decoders.
        size = self.facts.image_size
        buffer = io.BytesIO()
        Image.new("RGB", (size, size)).save(buffer, format="PNG")
        self.classify(buffer.getvalue(), top_k=1)
        self.is_warm = True
