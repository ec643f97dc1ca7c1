"""Pieces of requests -> their results, by a few threads; dropped when nobody waits any more."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.types import Receive

from serving.refusals import Refusal, cannot_classify

T = TypeVar("T")

IsWanted = Callable[[], bool]

# Takes a function that it asks, from time to time, whether to go on; what it gives comes later.
Piece = Callable[[IsWanted], Future[T]]

# In Retry-After. A picture takes a few hundredths of a second, so that even a long queue is short.
RETRY_AFTER_S = 1


class AbandonedError(Exception):
    """Work whose client is gone, or was told that it takes too long."""


def require_wanted(is_wanted: IsWanted) -> None:
    """Raise an AbandonedError where a piece of work may stop."""
    if not is_wanted():
        raise AbandonedError


class WorkQueue:
    """A pool of threads with a limit to what runs and waits in it.

    A place is taken by work and by nothing else, until it has ended: neither by a request whose
    body is still on its way nor by one whose client is gone.

    Args:
        num_threads: pieces of work that run at once.
        max_places: pieces that run and wait.
        timeout_s: after this time, from a request's arrival, its client is told that it took too
            long; a thread that is at one piece for longer is stuck.
        on_change: told how many places are taken, whenever that changes.
    """

    def __init__(
        self,
        num_threads: int,
        max_places: int,
        timeout_s: float,
        on_change: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="classify")
        self._num_threads = num_threads
        self._max_places = max_places
        self._timeout_s = timeout_s
        self._on_change = on_change
        self._lock = threading.Lock()
        self._num_taken = 0
        self.problem = ""
        """What keeps all work from being done."""
        self.is_stuck_beyond: Callable[[], bool] = lambda: False
        """Whether nothing goes on behind the threads."""
        self._started: dict[int, float] = {}

    @property
    def is_stuck(self) -> bool:
        """Whether every thread has been at the same piece of work for too long, or the network."""
        with self._lock:
            oldest_allowed = time.monotonic() - self._timeout_s
            late = [start for start in self._started.values() if start < oldest_allowed]
        return len(late) >= self._num_threads or self.is_stuck_beyond()

    def require_no_problem(self) -> None:
        """Raise a Refusal, 503, when no work can be done at all."""
        if self.problem:
            raise cannot_classify(self.problem, RETRY_AFTER_S)

    def require_place(self) -> None:
        """Raise the Refusal that a request gets now, without waiting for its body.

        Raises:
            Refusal: 429, all places are taken; 503, nothing goes on, or can.
        """
        if refusal := self.refusal():
            raise refusal

    def refusal(self) -> Refusal | None:
        """Return what require_place raises."""
        if self.problem:
            return cannot_classify(self.problem, RETRY_AFTER_S)
        again = {"Retry-After": str(RETRY_AFTER_S)}
        if self.is_stuck:
            return Refusal(
                "stuck", "all threads are busy with pictures that take too long; try later", again
            )
        if self._num_taken < self._max_places:
            return None
        return Refusal(
            "overloaded",
            f"{self._max_places} pictures are being classified or wait for it, and more are not "
            "taken; send this one again in a moment",
            again,
        )

    async def run(
        self, pieces: Sequence[Piece[T]], receive: Receive, started: float
    ) -> list[T | BaseException]:
        """Do the pieces of a request, for a client that is listened to.

        Args:
            pieces: functions that are called in the pool.
            receive: ASGI's, after the whole body; tells when the client is gone.
            started: time.monotonic() when the request came.

        Returns:
            What each piece came to, or raised.

        Raises:
            Refusal: no place; 504, it took too long.
            AbandonedError: the client is gone.
        """
        self.require_place()
        is_abandoned = threading.Event()
        self._take(1)
        begun = [self._begin(piece, lambda: not is_abandoned.is_set()) for piece in pieces]
        answers = [answer for answer, _ in begun]
        all_done = all_of(answers)
        all_done.add_done_callback(lambda _: self._take(-1))
        results = asyncio.wrap_future(all_done)
        gone = asyncio.ensure_future(_wait_until_gone(receive))
        remaining = max(0.0, started + self._timeout_s - time.monotonic())
        try:
            done, _ = await asyncio.wait(
                {results, gone}, timeout=remaining, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            gone.cancel()
            if not results.done():
                is_abandoned.set()
                results.cancel()
                for _, handle in begun:
                    handle.cancel()  # which it is if no thread is at it yet
        if results in done:
            return [answer.exception() or answer.result() for answer in answers]
        if gone in done:
            raise AbandonedError
        raise Refusal("timeout", f"the picture was not classified within {self._timeout_s:g} s")

    def close(self) -> None:
        """Let go of the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, piece: Piece[T], is_wanted: IsWanted) -> tuple[Future[T], Future[None]]:
        answer: Future[T] = Future()

        def work() -> None:
            thread = threading.get_ident()
            try:
                require_wanted(is_wanted)
                with self._lock:
                    self._started[thread] = time.monotonic()
                try:
                    coming = piece(is_wanted)
                finally:
                    with self._lock:
                        del self._started[thread]
            except BaseException as error:
                answer.set_exception(error)
            else:
                coming.add_done_callback(lambda done: _copy(done, answer))

        # Nobody may cancel it: its place is given back when it is done.
        answer.set_running_or_notify_cancel()
        handle = self._pool.submit(work)

        def drop(done: Future[None]) -> None:
            if done.cancelled():
                answer.set_exception(AbandonedError())

        handle.add_done_callback(drop)
        return answer, handle

    def _take(self, num_places: int) -> None:
        with self._lock:
            self._num_taken += num_places
            self._on_change(self._num_taken)


def all_of(futures: Sequence[Future[Any]]) -> Future[None]:
    """Return what is done when all of them are, with a result or an error; nobody may cancel it."""
    all_done: Future[None] = Future()
    all_done.set_running_or_notify_cancel()
    lock = threading.Lock()
    num_open = len(futures)

    def count(_: Future[Any]) -> None:
        nonlocal num_open
        with lock:
            num_open -= 1
            is_last = not num_open
        if is_last:
            all_done.set_result(None)

    for future in futures:
        future.add_done_callback(count)
    return all_done


def _copy(done: Future[T], answer: Future[T]) -> None:
    error = done.exception()
    if error is None:
        answer.set_result(done.result())
    else:
        answer.set_exception(error)


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
