"""Prepared images of many requests -> their logits, several in one call of the network.

A call begins as soon as the network is free and an image is there; what comes meanwhile goes into
the next one. Only while others are being decoded does an image wait for them, and not for long: a
single client never waits.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.stages import StageTimes
from serving.work import AbandonedError, IsWanted, all_of

# float32 [N, 3, H, W], or pixels where the network takes them: uint8 [N, H, W, 3]; or logits.
Images = NDArray[Any]

# Of the threads that compute: less urgent than to take requests and to refuse them, more than to
# decode what then waits for the network.
NICENESS = 5

# Prepared images that wait, in calls; threads that have more wait with them, so that memory is
# bounded.
CALLS_AHEAD = 2

# A network that takes longer for an image is not held up much by pictures that are decoded, and
# would be by having one thread for it.
SHORT_CALL_S = 0.01


def be_less_urgent() -> None:
    """Have this thread, and those that it starts, wait for a core when the event loop wants it."""
    if sys.platform == "linux":  # where it is not the whole process
        os.nice(NICENESS)


@dataclass(frozen=True)
class _Job:
    images: Images
    is_wanted: IsWanted
    times: StageTimes
    answer: Future[Images] = field(default_factory=Future[Images])
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Calls a network from one thread.

    Args:
        infer: maps images to logits [N, classes]; those of a call are of one type.
        infer_beside: the same, while other work wants the cores; see runtimes.protocol.
        max_images: in a call.
        max_wait_s: for which an image waits for others that are being prepared.
        on_call: told the number of images of each call.
    """

    def __init__(
        self,
        infer: Callable[[Images], Images],
        infer_beside: Callable[[Images], Images],
        max_images: int,
        max_wait_s: float,
        on_call: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._infer = infer
        self._infer_beside = infer_beside
        self._is_short = False
        self._max_images = max_images
        self._max_wait_s = max_wait_s
        self._on_call = on_call
        self._changed = threading.Condition()
        self._jobs = deque[_Job]()
        self._num_waiting = self._num_coming = 0
        self._is_closed = False
        self._call_since: float | None = None
        self._thread = threading.Thread(target=self._work, name="network", daemon=True)
        self._thread.start()

    def warm_up(self, image_shape: tuple[int, ...]) -> None:
        """Call the network with every number of images that a call may have.

        Raises:
            ValueError: the network does not take such images.
        """
        for num_images in range(1, self._max_images + 1):
            self._infer(np.zeros((num_images, *image_shape), np.float32))
        started = time.monotonic()
        self._infer_beside(np.zeros((1, *image_shape), np.float32))
        self._is_short = time.monotonic() - started < SHORT_CALL_S

    @contextmanager
    def coming(self) -> Generator[None]:
        """Tell that an image is being prepared, for which others may wait."""
        with self._changed:
            self._num_coming += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_coming -= 1
                self._changed.notify_all()

    def submit(self, images: Images, is_wanted: IsWanted, times: StageTimes) -> Future[Images]:
        """Hand images over; returns when there is room for them.

        Args:
            images: more than fit into a call are divided.
            is_wanted: asked before the call.
            times: told how long they waited, and how long the call took.

        Returns:
            What becomes their logits [N, classes], or an AbandonedError, or what the call raised.
        """
        if len(images) <= self._max_images:
            return self._put(images, is_wanted, times)
        parts = [
            self._put(images[start : start + self._max_images], is_wanted, times)
            for start in range(0, len(images), self._max_images)
        ]
        return _joined(parts)

    def is_stuck(self, longest_s: float) -> bool:
        """Whether a call has taken longer."""
        since = self._call_since
        return since is not None and time.monotonic() - since > longest_s

    def close(self) -> None:
        """End the thread after the call that it is at."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _put(self, images: Images, is_wanted: IsWanted, times: StageTimes) -> Future[Images]:
        with self._changed:
            limit = CALLS_AHEAD * self._max_images
            while self._num_waiting >= limit and not self._is_closed:
                self._changed.wait()
            job = _Job(images, is_wanted, times)
            if self._is_closed:
                job.answer.set_exception(AbandonedError())
                return job.answer
            self._jobs.append(job)
            self._num_waiting += len(images)
            self._changed.notify_all()
        return job.answer

    def _work(self) -> None:
        be_less_urgent()
        while (jobs := self._next()) is not None:
            self._call_since = time.monotonic()
            self._call(jobs)
            self._call_since = None

    def _next(self) -> list[_Job] | None:
        with self._changed:
            while not self._jobs and not self._is_closed:
                self._changed.wait()
            if self._is_closed:
                for job in self._jobs:
                    job.answer.set_exception(AbandonedError())
                return None
            deadline = self._jobs[0].since + self._max_wait_s
            while self._num_waiting < self._max_images and self._num_coming:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or self._is_closed:
                    break
                self._changed.wait(remaining)
            jobs: list[_Job] = []
            num_images = 0
            kind = self._jobs[0].images.dtype
            while self._jobs and self._jobs[0].images.dtype == kind:
                if num_images + len(self._jobs[0].images) > self._max_images:
                    break
                job = self._jobs.popleft()
                self._num_waiting -= len(job.images)
                if job.is_wanted():
                    num_images += len(job.images)
                    jobs.append(job)
                else:
                    job.answer.set_exception(AbandonedError())
            self._changed.notify_all()
            return jobs

    def _call(self, jobs: list[_Job]) -> None:
        if not jobs:
            return
        for job in jobs:
            job.times.end("queue")
        images = jobs[0].images
        if len(jobs) > 1:
            images = np.concatenate([job.images for job in jobs])
        is_alone = not self._num_coming or (len(images) == 1 and not self._is_short)
        try:
            logits = (self._infer if is_alone else self._infer_beside)(images)
        except Exception as error:
            if len(jobs) > 1:  # whose image it is shows when each has a call of its own
                for job in jobs:
                    self._call([job])
            else:
                jobs[0].answer.set_exception(error)
            return
        self._on_call(len(images))
        start = 0
        for job in jobs:
            job.times.end("infer")
            job.answer.set_result(logits[start : start + len(job.images)])
            start += len(job.images)


def _joined(parts: list[Future[Images]]) -> Future[Images]:
    whole: Future[Images] = Future()

    def join(_: Future[None]) -> None:
        errors = [error for part in parts if (error := part.exception())]
        if errors:
            whole.set_exception(errors[0])
        else:
            whole.set_result(np.concatenate([part.result() for part in parts]))

    all_of(parts).add_done_callback(join)
    return whole
