"""An artifact -> the BentoML service: loads, warms up, classifies; BentoML does the rest.

BentoML runs the worker and answers /livez, /readyz and /metrics; all other addresses are
`serving.routes`. `POST /classify` is a route of our own and not a BentoML API because BentoML's
file inputs also take an address, which the server then fetches, and its errors are lists.
"""

import io
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import bentoml
from PIL import Image

from efficientnet.formats.artifact import read_artifact
from efficientnet.images.preprocess import preprocess
from efficientnet.machine.environment import num_usable_cores
from efficientnet.runtimes import open_runtime
from serving.answers import ModelFacts, Prediction, best_classes
from serving.routes import app
from serving.settings import read_settings
from serving.uploads import UploadLimit

SETTINGS = read_settings(os.environ)

WORKER_ENVIRONMENT: list[Any] = [
    # Left alone, glibc keeps what a picture of 50 megapixels took, for each thread: measured 850 MB
    # of resident memory instead of 140 MB after four such pictures. Setting this threshold, to
    # whatever value, is what makes it give large blocks back at once.
    {"name": "MALLOC_TRIM_THRESHOLD_", "value": "1000000"},
]


# The limit is wrapped around the application, and not added to it, so that BentoML mounts the whole
# as one unit that also answers unknown addresses; of a bare FastAPI it would take the routes only.
@bentoml.asgi_app(UploadLimit(app, SETTINGS.max_upload_bytes))
@bentoml.service(
    name="efficientnet",
    workers=1,
    traffic={"timeout": SETTINGS.timeout_s, "max_concurrency": SETTINGS.max_concurrency},
    envs=WORKER_ENVIRONMENT,
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
        self.pool = ThreadPoolExecutor(num_usable_cores(), thread_name_prefix="classify")
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
        self.pool.shutdown(wait=False, cancel_futures=True)

    def __is_ready__(self) -> bool:
        return self.is_warm

    def classify(self, data: bytes, top_k: int) -> list[Prediction]:
        """Return the `top_k` best classes of an encoded picture, the most probable first.

        May be called from several threads at once.

        Raises:
            ImageError: no picture, damaged, or too many pixels.
        """
        info = self._runtime.info
        images = preprocess(data, info.preprocess)[None]
        with self._runtime_lock:
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
