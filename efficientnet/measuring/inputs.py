"""Held-out images -> preprocessed float32 inputs in one file, which all measured processes map."""

import itertools
import logging
import mmap
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

from efficientnet.images.datasets import DatasetError, Sample
from efficientnet.images.preprocess import ImageError, PreprocessSpec, preprocess
from efficientnet.machine.environment import num_usable_cores
from efficientnet.machine.threads import map_in_threads

# Enough that an input is not found in a cache because the same one was just used.
MIN_IMAGES = 256

# Taken in case that some of the first cannot be decoded; how many may be broken, accuracy.py says.
NUM_SPARE = 8

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """A file of float32 [rows, 3, size, size] that has no name: it ends with its last user."""

    file: IO[bytes]
    num_images: int
    """Different images; the rows after them repeat them."""
    image_size: int


def prepare_inputs(
    samples: Sequence[Sample], spec: PreprocessSpec, largest_batch: int, seed: int
) -> Inputs:
    """Preprocess 256 images drawn by `seed`, or all when there are fewer.

    The file has room for two of the largest batch, so that no call sees the images of the call
    before it.

    Raises:
        DatasetError: none of them can be decoded.
    """
    drawn = random.Random(seed).sample(list(samples), min(MIN_IMAGES + NUM_SPARE, len(samples)))
    num_rows = max(len(drawn), 2 * largest_batch)
    size = spec.image_size
    file = tempfile.TemporaryFile(prefix="latency-inputs-")  # noqa: SIM115 (the caller closes it)
    _reserve(file.fileno(), num_rows * 3 * size * size * 4)
    images = _map(file.fileno(), size, mmap.ACCESS_WRITE)

    def fill(row: int) -> str | None:
        try:
            images[row] = preprocess(drawn[row].read(), spec)
        except (ImageError, OSError) as error:
            return f"{drawn[row].name}: {error}"
        return None

    problems = map_in_threads(fill, range(len(drawn)), num_usable_cores(), "preparing images")
    good = [row for row, problem in enumerate(problems) if problem is None][:MIN_IMAGES]
    for problem in filter(None, problems):
        log.warning("left out, cannot be decoded: %s", problem)
    if not good:
        file.close()
        raise DatasetError(f"none of {len(drawn)} held-out images can be decoded")
    for row, source in enumerate(good):
        if row != source:
            images[row] = images[source]
    for row in range(len(good), num_rows):
        images[row] = images[row - len(good)]
    return Inputs(file, len(good), size)


def map_inputs(descriptor: int, image_size: int) -> NDArray[np.float32]:
    """Map the file of prepare_inputs as float32 [rows, 3, size, size].

    The memory is shared with the other processes until someone writes to it. Every page is touched
    here: a page fault in a call would be measured as part of it.
    """
    # Writable for this process only: torch warns of arrays that are not.
    images = _map(descriptor, image_size, mmap.ACCESS_COPY)
    images.reshape(-1)[:: mmap.PAGESIZE // images.itemsize].sum()
    return images


def rotate(images: NDArray[np.float32], batch_size: int) -> Iterator[NDArray[np.float32]]:
    """Give one batch of the images after the other, for ever."""
    starts = range(0, len(images) - batch_size + 1, batch_size)
    assert starts
    return itertools.cycle([images[start : start + batch_size] for start in starts])


def _reserve(descriptor: int, num_bytes: int) -> None:
    # Writing to a mapped file on a full disk ends a process with SIGBUS, without a word.
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, num_bytes)
    else:
        os.ftruncate(descriptor, num_bytes)


def _map(descriptor: int, image_size: int, access: int) -> NDArray[np.float32]:
    memory = mmap.mmap(descriptor, 0, access=access)
    return np.frombuffer(memory, dtype=np.float32).reshape(-1, 3, image_size, image_size)
