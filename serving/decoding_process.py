"""Pictures in shared memory -> their pixels there, resized: the processes that decode for a worker.

A worker starts `python -m serving.decoding_process` once. It imports what decoding takes, and
nothing of the network or of HTTP, and forks a decoder in milliseconds whenever it is told to. A
decoder has limits of processor time and memory and can open neither files nor sockets; whatever a
picture makes of it, `serving.decoders` ends it and has another one forked.
"""

import gc
import io
import mmap
import os
import resource
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features
from pydantic import BaseModel, ConfigDict

from efficientnet.images.decoding import IMAGE_FORMATS
from efficientnet.images.preprocess import (
    ImageError,
    ImageTooLargeError,
    PreprocessSpec,
    decode_and_resize,
)
from efficientnet.machine.children import obey_parent

READY = b"\1"

# To the process that forks: a command, and the process id that it is about.
COMMAND = struct.Struct("<cI")
FORK, END = b"F", b"E"
# From it: the id of a forked decoder, or an errno below 0; how an ended one ended, as subprocess
# tells it.
RESULT = struct.Struct("<i")

# To a decoder: the bytes of the picture that lies in the shared memory.
REQUEST = struct.Struct("<Q")
# From it: an Outcome, the seconds that resizing took, and the bytes of the sentence that follows.
REPLY = struct.Struct("<BdI")
MAX_SENTENCE_BYTES = 4000

# Less urgent than to take requests and to refuse them, which on a busy machine would wait for the
# time slices of several decoders.
NICENESS = 10


class Outcome(IntEnum):
    """What became of a picture."""

    EXACT = 0
    """Pixels, of the method `exact`; see PreprocessSpec."""
    FAST = 1
    NO_PICTURE = 2
    """An ImageError."""
    TOO_LARGE = 3
    """An ImageTooLargeError."""
    NO_MEMORY = 4
    """The decoder has come to its limit of memory, and ends."""
    FAULT = 5
    """An exception that nobody expected."""


class DecodingJob(BaseModel):
    """What all decoders of a worker do, and may take for it."""

    model_config = ConfigDict(frozen=True)

    spec: PreprocessSpec
    max_cpu_s: float
    """Processor time for one picture."""
    max_memory_bytes: int
    """What decoding may take beyond the memory of the process, on Linux."""
    max_picture_bytes: int

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """Of the pixels at the beginning of the shared memory."""
        return self.spec.image_size, self.spec.image_size, 3

    @property
    def picture_start(self) -> int:
        """Where the picture lies in the shared memory, behind the pixels, on a page of its own."""
        return -(-int(np.prod(self.pixel_shape)) // mmap.PAGESIZE) * mmap.PAGESIZE

    @property
    def shared_bytes(self) -> int:
        """Size of the shared memory."""
        return self.picture_start + self.max_picture_bytes

    def pixels_in(self, memory: mmap.mmap) -> NDArray[np.uint8]:
        """Give the pixels in the shared memory, without a copy."""
        count = int(np.prod(self.pixel_shape))
        return np.frombuffer(memory, np.uint8, count).reshape(self.pixel_shape)


def main() -> None:
    """Fork and end decoders until the worker is gone."""
    control, job = socket.socket(fileno=int(sys.argv[1])), _job(sys.argv[2])
    # Ctrl-C and SIGTERM may reach all processes; the worker decides what they mean.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _load_decoders(job.spec)
    gc.collect()
    gc.freeze()  # a collection in a decoder copies no pages that are shared
    control.sendall(READY)
    children: set[int] = set()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, COMMAND.size, 2)
        if not message:
            break
        command, pid = COMMAND.unpack(message)
        if command == FORK:
            try:
                result = os.fork()
            except OSError as error:  # too many processes, or no memory
                result = -(error.errno or 1)
            if not result:
                control.close()
                _decode_until_end(descriptors[0], descriptors[1], job)
            for descriptor in descriptors:
                os.close(descriptor)
            if result > 0:
                children.add(result)
        else:
            children.remove(pid)
            result = _end(pid)
        control.sendall(RESULT.pack(result))
    for pid in children:
        _end(pid)


def _job(text: str) -> DecodingJob:
    return DecodingJob.model_validate_json(text)


def _end(pid: int) -> int:
    # Nobody else waits for it, so that the number is that of no other process.
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _load_decoders(spec: PreprocessSpec) -> None:
    """Decode one of each kind: a decoder cannot open the files of a module any more."""
    Image.init()
    image = Image.new("RGB", (32, 32))
    for kind in IMAGE_FORMATS:
        if kind == "AVIF" and not features.check("avif"):
            continue
        buffer = io.BytesIO()
        image.save(buffer, kind)
        decode_and_resize(buffer.getvalue(), spec)


def _decode_until_end(connection_fd: int, memory_fd: int, job: DecodingJob) -> NoReturn:
    try:
        obey_parent()
        connection = socket.socket(fileno=connection_fd)
        memory = mmap.mmap(memory_fd, job.shared_bytes)
        _limit_this_process(job.max_memory_bytes)
        connection.sendall(READY)
        while request := connection.recv(REQUEST.size):
            (num_bytes,) = REQUEST.unpack(request)
            start = job.picture_start
            with _limited_time(job.max_cpu_s):
                reply = _decode(memory[start : start + num_bytes], memory, job)
            connection.sendall(reply)
            if reply[0] == Outcome.NO_MEMORY:  # what is left of it may be in pieces
                break
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)  # nothing of the process that it was forked from is its to clean up


def _limit_this_process(max_memory_bytes: int) -> None:
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):  # when the machine's memory is used up, this is the process to end
        Path("/proc/self/oom_score_adj").write_text("1000")
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * mmap.PAGESIZE + max_memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))  # of new ones: neither files nor sockets


@contextmanager
def _limited_time(max_cpu_s: float) -> Iterator[None]:
    # SIGPROF ends the process, as no handler is set; also while C code runs.
    signal.setitimer(signal.ITIMER_PROF, max_cpu_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _decode(picture: bytes, memory: mmap.mmap, job: DecodingJob) -> bytes:
    decoded = time.perf_counter()

    def on_decoded() -> None:
        nonlocal decoded
        decoded = time.perf_counter()

    try:
        pixels, is_fast = decode_and_resize(picture, job.spec, on_decoded)
        np.copyto(job.pixels_in(memory), pixels)
    except ImageTooLargeError as error:
        return _reply(Outcome.TOO_LARGE, str(error))
    except ImageError as error:
        return _reply(Outcome.NO_PICTURE, str(error))
    except MemoryError:
        return _reply(Outcome.NO_MEMORY, "")
    except Exception as error:
        frames = list(traceback.walk_tb(error.__traceback__))
        code, line = frames[-1][0].f_code, frames[-1][1]
        place = f"{code.co_name} ({code.co_filename}:{line})"
        return _reply(Outcome.FAULT, f"{type(error).__name__}: {error} in {place}")
    resized_s = time.perf_counter() - decoded
    return _reply(Outcome.FAST if is_fast else Outcome.EXACT, "", resized_s)


def _reply(outcome: Outcome, sentence: str, resized_s: float = 0.0) -> bytes:
    text = sentence.encode(errors="replace")[:MAX_SENTENCE_BYTES]
    return REPLY.pack(outcome, resized_s, len(text)) + text


if __name__ == "__main__":
    main()
