"""An artifact for the CPU -> the batch sizes that it answers faster image by image, measured.

One call of many images works on maps that no cache holds, and its threads wait for each other after
every layer; a call of one image in each of several streams of one thread spares both. Networks that
are small, at small sizes, lose by it: their calls cost more than that.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from efficientnet.formats.artifact import ArtifactManifest, read_artifact, write_manifest
from efficientnet.measuring.turns import ratio, take_turns
from efficientnet.reporting.tables import format_ratio
from efficientnet.runtimes import Runtime
from efficientnet.runtimes.protocol import open_program
from export.builders.writing import check_parity, log_line
from export.checks.logit_agreement import ParityError
from export.inputs.reference import Reference

# Both ways take turns; what gains less is noise.
NUM_TURNS = 5
LEAST_GAIN = 0.03

log = logging.getLogger(__name__)


def choose_streams(reference: Reference, directory: Path, sizes: Sequence[int]) -> None:
    """Let an artifact answer those batch sizes in streams that are faster so, and right.

    To be called while nobody else can see the artifact: its manifest is written again.
    """
    manifest = read_artifact(directory)
    streamed = tuple(
        size
        for size in sizes
        if size > 1 and is_faster_in_streams(reference, directory, manifest, size)
    )
    if not streamed:
        return
    in_streams = manifest.model_copy(update={"streamed_batches": streamed})
    try:
        checked = check_parity(reference, directory, in_streams)
    except ParityError as error:
        # What passed without them stays.
        log_line(directory, f"left as one call, in streams it answers otherwise: {error}")
        return
    write_manifest(directory, checked)


def is_faster_in_streams(
    reference: Reference, directory: Path, manifest: ArtifactManifest, size: int
) -> bool:
    """Measure an artifact at one batch size, in one call and image by image in streams."""
    images = np.resize(reference.parity_images, (size, *reference.parity_images.shape[1:]))
    ways = {
        way: open_program(directory, manifest.model_copy(update={"streamed_batches": streamed}))
        for way, streamed in (("one call", ()), ("streams", (size,)))
    }
    for runtime in ways.values():
        runtime.infer(images)
    turns = take_turns(ways, NUM_TURNS, lambda way, _: seconds_of_call(ways[way], images))
    found = ratio(turns["streams"], turns["one call"]).median
    is_faster = found < 1 - LEAST_GAIN
    log.info(
        "batch %d, image by image in streams of one thread: %s of the time of one call; %s",
        *(size, format_ratio(found), "taken" if is_faster else "left as one call"),
    )
    return is_faster


def seconds_of_call(runtime: Runtime, images: NDArray[np.float32]) -> float:
    """Time one call."""
    started = time.perf_counter()
    runtime.infer(images)
    return time.perf_counter() - started
