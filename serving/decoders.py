"""Pictures -> network inputs, decoded in processes that are ended when one takes too much.

A fault in a C library, or a picture that takes minutes, ends a decoder and not the worker. Pictures
go to a decoder and their pixels, resized to the network's size, come back through shared memory:
copying them takes less than what is decoded, and less than the floats that become of them.
"""

import io
import logging
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from numpy.typing import NDArray
from PIL import Image

from efficientnet import PROJECT_ROOT
from efficientnet.errors import PipelineError
from efficientnet.images.preprocess import ImageError, ImageTooLargeError, normalize_pixels
from serving.decoding_process import (
    COMMAND,
    END,
    FORK,
    MAX_SENTENCE_BYTES,
    READY,
    REPLY,
    REQUEST,
    RESULT,
    DecodingJob,
    Outcome,
)
from serving.settings import PREFIX, PROCESS_ENVIRONMENT
from serving.stages import StageTimes
from serving.work import AbandonedError, IsWanted, require_wanted

# Why a decoder was ended, or ended by itself, as /metrics tells it.
EndReason = Literal["time", "memory", "unwanted", "killed", "crash"]

COMMAND_LINE = (sys.executable, "-m", "serving.decoding_process")

# For the imports, on a machine that has much else to do.
START_S = 60.0
# For a fork, the end of a process, and a picture of a few pixels.
ANSWER_S = 10.0

# Between two looks at whether a client is still there.
POLL_S = 0.1

LONGEST_PAUSE_S = 60.0

# Shared memory that is larger after a picture is given back.
KEPT_BYTES = 1_000_000

log = logging.getLogger("bentoml.decoders")


class DecoderError(PipelineError):
    """No process that decodes can be started."""


class Decoders:
    """Processes that decode, as many as there are threads that have pictures for them.

    One that ends is replaced at once; where that fails it is tried again after a pause, which
    doubles. A new one counts when it has decoded a picture of our own.

    Args:
        job: what they do.
        num_decoders: processes.
        on_end: told of each that has ended, and why.
        command_line: starts the process that forks them.
    """

    def __init__(
        self,
        job: DecodingJob,
        num_decoders: int,
        on_end: Callable[[EndReason], None] = lambda _: None,
        command_line: Sequence[str] = COMMAND_LINE,
    ) -> None:
        self._job = job
        self._num_decoders = num_decoders
        self._on_end = on_end
        self._command_line = command_line
        lock = threading.RLock()
        self._changed = threading.Condition(lock)
        # For the keeper alone, which would wake at every picture.
        self._is_missing = threading.Condition(lock)
        self._idle: list[_Decoder] = []
        self._busy: dict[_Decoder, float] = {}
        self._num_failures = 0
        self._is_closed = False
        self._forker: _Forker | None = None
        self._keeper = threading.Thread(target=self._keep, name="decoders", daemon=True)
        self._keeper.start()

    @property
    def is_stuck(self) -> bool:
        """Whether none of them can take a picture soon.

        Each has been at one for longer than the processor time that it has for it, or cannot be
        started.
        """
        with self._changed:
            oldest_allowed = time.monotonic() - self._job.max_cpu_s
            num_usable = len(self._idle) + sum(t >= oldest_allowed for t in self._busy.values())
            is_coming = self._num_missing > 0 and self._num_failures == 0
        return num_usable == 0 and not is_coming

    def preprocess(
        self, picture: bytes, is_wanted: IsWanted, times: StageTimes, as_pixels: bool = False
    ) -> NDArray[Any]:
        """Turn a picture into float32 [3, image_size, image_size], as preprocess.preprocess does.

        Args:
            picture: an image file.
            is_wanted: asked all the time; where it says no, the decoder is ended.
            times: told how long decoding and preprocessing took.
            as_pixels: leave out the last step, which makes it float32: uint8 [H, W, 3].

        Raises:
            ImageTooLargeError: too many pixels or parts, too much time or memory.
            ImageError: no image, damaged, or one that ends its decoder.
            AbandonedError: not wanted any more.
        """
        decoder = self._take(is_wanted)
        reason: EndReason | None = "crash"
        try:
            images = decoder.preprocess(picture, is_wanted, times, as_pixels)
            reason = None
        except ImageError:
            reason = None
            raise
        except AbandonedError:
            reason = "unwanted"
            raise
        except _NoMemoryError:
            reason = "memory"
            raise ImageTooLargeError(
                f"decoding the image takes more than {self._job.max_memory_bytes / 1e6:g} MB of "
                "memory, which is all that one may take; save it with fewer pixels, or anew with "
                "another program"
            ) from None
        except (EOFError, OSError):
            reason, error = self._death(decoder)
            raise error from None
        finally:
            self._put_back(decoder, reason)
        return images

    def close(self) -> None:
        """End all of them."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            self._is_missing.notify()
        self._keeper.join(ANSWER_S)
        if self._forker:
            self._forker.close()
        for decoder in self._idle:
            decoder.connection.close()

    @property
    def _num_missing(self) -> int:
        return self._num_decoders - len(self._idle) - len(self._busy)

    def _take(self, is_wanted: IsWanted) -> "_Decoder":
        with self._changed:
            while not self._idle:
                require_wanted(is_wanted)
                self._changed.wait(POLL_S)
            decoder = self._idle.pop()  # the one whose memory is warm
            self._busy[decoder] = time.monotonic()
        if decoder.has_ended:  # while it was idle, which is no fault of this picture
            self._put_back(decoder, "killed")
            return self._take(is_wanted)
        return decoder

    def _put_back(self, decoder: "_Decoder", reason: EndReason | None) -> None:
        if reason:
            self._end(decoder)
            self._on_end(reason)
        with self._changed:
            del self._busy[decoder]
            if reason:
                self._is_missing.notify()
            else:
                self._idle.append(decoder)
                self._changed.notify()

    def _death(self, decoder: "_Decoder") -> tuple[EndReason, ImageError]:
        code = self._end(decoder)
        if code == -signal.SIGPROF:
            return "time", ImageTooLargeError(
                f"decoding the image takes more than {self._job.max_cpu_s:g} s of processor time, "
                "which is all that one may take; save it with fewer pixels, or anew with another "
                "program"
            )
        how = signal.Signals(-code).name if code < 0 else f"code {code}"
        if code == -signal.SIGKILL:
            return "killed", ImageError(
                "the process that decoded the image was killed, as happens when the machine has no "
                "memory left; save it with fewer pixels, or send it again"
            )
        return "crash", ImageError(
            f"the image is damaged: decoding it ended the process that did so ({how}); "
            "save it anew with another program"
        )

    def _end(self, decoder: "_Decoder") -> int:
        """Make sure that it has ended; return how it did, as subprocess tells it."""
        decoder.connection.close()
        if decoder.exit_code is None:
            try:
                decoder.exit_code = decoder.forker.end(decoder.pid)
            except OSError:  # whose end is theirs
                decoder.exit_code = -signal.SIGKILL
        return decoder.exit_code

    def _keep(self) -> None:
        while True:
            with self._changed:
                self._is_missing.wait_for(lambda: self._is_closed or self._num_missing)
                if self._is_closed:
                    return
            try:
                decoder = self._start()
            except Exception as error:  # of whatever kind: this thread is the only one that starts
                self._pause(error)
                continue
            with self._changed:
                self._num_failures = 0
                self._idle.append(decoder)
                self._changed.notify_all()

    def _start(self) -> "_Decoder":
        if self._forker is None:
            self._forker = _Forker(self._command_line, self._job)
        try:
            decoder = self._forker.start()
        except (ConnectionError, TimeoutError):  # it is at fault, and not what this process has
            self._forker.close()
            self._forker = None
            raise
        deadline = time.monotonic() + ANSWER_S
        try:
            decoder.preprocess(_own_picture(), lambda: time.monotonic() < deadline, StageTimes())
        except BaseException:
            self._end(decoder)
            raise
        return decoder

    def _pause(self, error: Exception) -> None:
        pause = min(LONGEST_PAUSE_S, 2.0**self._num_failures)
        how = str(error) or "it did not decode a picture of 32 pixels in time"
        log.error("no decoder could be started: %s; tried again in %.0f s", how, pause)
        with self._changed:
            self._num_failures += 1
            self._is_missing.wait_for(lambda: self._is_closed, pause)


class _NoMemoryError(Exception):
    """A decoder has come to its limit."""


class _Decoder:
    """A process, the socket that reaches it, and the memory shared with it."""

    def __init__(
        self, job: DecodingJob, forker: "_Forker", connection: socket.socket, memory: mmap.mmap
    ) -> None:
        self._job = job
        self._memory = memory
        self._pixels = job.pixels_in(memory)
        self.forker = forker
        self.connection = connection
        self.pid = 0
        self.exit_code: int | None = None

    def preprocess(
        self, picture: bytes, is_wanted: IsWanted, times: StageTimes, as_pixels: bool = False
    ) -> NDArray[Any]:
        """See Decoders.preprocess.

        Raises:
            _NoMemoryError: it has come to its limit.
            EOFError, OSError: it has ended.
        """
        start = self._job.picture_start
        self._memory[start : start + len(picture)] = picture
        try:
            self.connection.sendall(REQUEST.pack(len(picture)))
            outcome, resized_s, num_bytes = REPLY.unpack(self.receive(REPLY.size, is_wanted))
            # Believed no further than this: a picture may have taken it over.
            length = min(num_bytes, MAX_SENTENCE_BYTES)
            sentence = self.receive(length, is_wanted).decode(errors="replace")
        finally:
            if len(picture) > KEPT_BYTES and sys.platform == "linux":
                self._memory.madvise(mmap.MADV_REMOVE, start, len(picture))
        if outcome == Outcome.NO_MEMORY:
            raise _NoMemoryError
        if outcome == Outcome.TOO_LARGE:
            raise ImageTooLargeError(sentence)
        if outcome == Outcome.NO_PICTURE:
            raise ImageError(sentence)
        if outcome not in (Outcome.EXACT, Outcome.FAST):
            raise RuntimeError(f"a decoder failed: {sentence}")
        times.end("decode", resized_s)
        if as_pixels:
            images = self._pixels.copy()
        else:
            images = normalize_pixels(self._pixels, outcome == Outcome.FAST, self._job.spec)
        times.end("preprocess")
        return images

    @property
    def has_ended(self) -> bool:
        """Whether there is something to be read without a question, as is the end."""
        poll = select.poll()  # select.select takes no descriptors above 1023
        poll.register(self.connection, select.POLLIN)
        return bool(poll.poll(0))

    def receive(self, num_bytes: int, is_wanted: IsWanted) -> bytes:
        received = b""
        while len(received) < num_bytes:
            try:
                part = self.connection.recv(num_bytes - len(received))
            except TimeoutError:
                require_wanted(is_wanted)
                continue
            if not part:
                raise EOFError("a decoder has ended")
            received += part
        return received


class _Forker:
    """The process that forks decoders; see serving.decoding_process.

    Raises:
        DecoderError: it ended at its start.
        OSError: it did not get ready in time.
    """

    def __init__(self, command_line: Sequence[str], job: DecodingJob) -> None:
        self._job = job
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*command_line, str(theirs.fileno()), job.model_dump_json()],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                cwd=PROJECT_ROOT,
                env=_environment(),
            )
        self._control.settimeout(START_S)
        try:
            if self._control.recv(1) != READY:
                raise DecoderError("the process that forks them ended; the lines above say why")
        except BaseException:
            self.close()
            raise
        self._control.settimeout(ANSWER_S)

    def start(self) -> _Decoder:
        """Fork a decoder.

        Raises:
            ConnectionError, TimeoutError: this process has ended, or hangs.
            OSError: there are not enough descriptors, processes or memory.
            EOFError: the decoder ended at its start.
        """
        ours, theirs = socket.socketpair()
        shared = _unnamed_file(self._job.shared_bytes)
        try:
            with theirs:
                decoder = _Decoder(self._job, self, ours, mmap.mmap(shared, self._job.shared_bytes))
                with self._lock:
                    message = COMMAND.pack(FORK, 0)
                    socket.send_fds(self._control, [message], [theirs.fileno(), shared])
                    decoder.pid = self._result()
            if decoder.pid < 0:
                raise OSError(-decoder.pid, os.strerror(-decoder.pid))
            ours.settimeout(ANSWER_S)
            if ours.recv(1) != READY:
                self.end(decoder.pid)
                raise EOFError("a decoder ended at its start")
        except BaseException:
            ours.close()
            raise
        finally:
            os.close(shared)
        ours.settimeout(POLL_S)
        return decoder

    def end(self, pid: int) -> int:
        """Kill a decoder if it has not ended; return how it did, as subprocess tells it."""
        with self._lock:
            self._control.sendall(COMMAND.pack(END, pid))
            return self._result()

    def close(self) -> None:
        """End it, and with it all its decoders."""
        self._control.close()
        try:
            self._process.wait(ANSWER_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _result(self) -> int:
        try:
            received = self._control.recv(RESULT.size)
        except TimeoutError:
            # An answer that comes late would be taken for that to the next command.
            self._control.shutdown(socket.SHUT_RDWR)
            raise
        if len(received) < RESULT.size:
            raise ConnectionError("the process that forks decoders has ended")
        return RESULT.unpack(received)[0]


def _environment() -> dict[str, str]:
    # Not the service's key: a decoder reads what strangers send.
    own = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return {**own, **PROCESS_ENVIRONMENT}


def _unnamed_file(num_bytes: int) -> int:
    """Return a descriptor of memory that takes what is written to it and no more."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("picture")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, num_bytes)
    return descriptor


def _own_picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "JPEG")
    return buffer.getvalue()
