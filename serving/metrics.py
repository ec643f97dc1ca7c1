"""Pictures, calls and places of a worker -> what /metrics tells beside BentoML's requests."""

from functools import cache
from typing import Any

from serving.answers import ServiceInfo
from serving.decoders import EndReason
from serving.stages import StageTimes

# Decoding a small picture takes a millisecond, a call of the network 5 to 500; beyond are queues.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
IMAGES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """Counts into the files that all workers share.

    To be made in the worker, by `of_this_process`: prometheus_client looks for the folder of these
    files when it is first imported, and refuses a name that it has.
    """

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        self._stages = Histogram(
            "classifier_stage_seconds",
            "Time of a picture in a stage: decode, preprocess, queue, infer.",
            ["stage"],
            buckets=SECONDS,
        )
        self._calls = Histogram(
            "classifier_batch_images", "Images in a call of the network.", buckets=IMAGES
        )
        self._in_flight: Any = Gauge(
            "classifier_in_flight",
            "Requests that are worked on or wait for it.",
            multiprocess_mode="livesum",
        )
        self._ended_decoders = Counter(
            "classifier_decoders_ended",
            "Processes that decoded a picture and were ended, or ended, by why: time, memory, "
            "unwanted, killed, crash.",
            ["reason"],
        )
        self._model = Gauge(
            "classifier_model_info",
            "1 for the artifact that is served.",
            ["model", "runtime", "precision", "artifact_sha256"],
            multiprocess_mode="livemax",
        )

    def tell_model(self, info: ServiceInfo) -> None:
        """Name the artifact that is served."""
        self._model.labels(info.model, info.runtime, info.precision, info.artifact_sha256).set(1)

    def count_picture(self, times: StageTimes) -> None:
        """Count a picture that was classified."""
        for stage, seconds in times.seconds.items():
            self._stages.labels(stage).observe(seconds)

    def count_call(self, num_images: int) -> None:
        """Count a call of the network."""
        self._calls.observe(num_images)

    def count_ended_decoder(self, reason: EndReason) -> None:
        """Count a process that decodes and has ended."""
        self._ended_decoders.labels(reason).inc()

    def set_in_flight(self, num_requests: int) -> None:
        """Tell how many places are taken."""
        self._in_flight.set(num_requests)


@cache
def of_this_process() -> Metrics:
    """Return the only one that there may be."""
    return Metrics()
