"""Training images -> ranges of a graph's activations; calibration.json, which names the images."""

import hashlib
import json
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper
from tqdm import tqdm

from efficientnet.errors import PipelineError
from efficientnet.formats.artifact import QuantizationRecord
from efficientnet.images.datasets import SAMPLE_PHOTOS, Sample, sample_photos_to_calibrate
from efficientnet.machine.atomic import write_text
from efficientnet.machine.environment import num_usable_cores
from efficientnet.precision import Precision
from export.graphs.folding import INPUT_NAME
from export.inputs.config import MIN_CALIBRATION_IMAGES, ExportConfig, MixedConfig
from export.inputs.reference import Reference, batches_of

CALIBRATION_FILE = "calibration.json"

METHOD = "mean over batches of the smallest and largest value of each map"

Ranges = dict[str, tuple[float, float]]

log = logging.getLogger(__name__)


class CalibrationError(PipelineError):
    """Too few images to choose ranges by, or ranges that are no numbers."""


def choose_samples(reference: Reference, config: ExportConfig) -> list[Sample]:
    """Draw the calibration images from the training images; held-out ones have no part in it.

    Weights that were trained elsewhere come without: they get crops of two photographs.
    """
    train = reference.dataset.train
    if has_two_photographs_only(reference):
        log.info("calibration on crops of two photographs, as there are no training images")
        return list(sample_photos_to_calibrate(config.num_calibration_images))
    if len(train) < config.num_calibration_images:
        raise CalibrationError(
            f"there are {len(train)} training images in {reference.dataset.source}, calibration "
            f"needs {config.num_calibration_images}; give the training data with --data, or lower "
            f"--num-calibration-images (at least {MIN_CALIBRATION_IMAGES})"
        )
    return random.Random(config.seed).sample(list(train), config.num_calibration_images)


def has_two_photographs_only(reference: Reference) -> bool:
    """Whether ranges are chosen by crops of the sample photographs: weights trained elsewhere."""
    return not reference.dataset.train and reference.record.data == SAMPLE_PHOTOS


def images_of(reference: Reference, samples: Sequence[Sample]) -> Iterator[NDArray[np.float32]]:
    """Give the samples' preprocessed images in batches, with a progress bar."""
    with tqdm(total=len(samples), desc="calibrating", unit="img", disable=None, leave=False) as bar:
        for images in batches_of(samples, reference.preprocess):
            yield images
            bar.update(len(images))


def record_calibration(
    directory: Path,
    samples: Sequence[Sample],
    config: ExportConfig,
    method: str,
    kept_precision: Precision,
    kept: Sequence[str] = (),
    scheme: str = "",
) -> QuantizationRecord:
    """Write calibration.json, which names the images; return what the manifest tells of them."""
    content = {
        "method": method,
        "num_images": len(samples),
        "seed": config.seed,
        "images": {s.name: hashlib.sha256(s.read()).hexdigest() for s in samples},
    }
    text = json.dumps(content, indent=1) + "\n"
    write_text(directory / CALIBRATION_FILE, text)
    return QuantizationRecord(
        method=f"{scheme}: {method}" if scheme else method,
        num_calibration_images=len(samples),
        calibration_sha256=hashlib.sha256(text.encode()).hexdigest(),
        kept_precision=kept_precision,
        kept_blocks=tuple(kept),
        float_layers=config.float_layers if isinstance(config, MixedConfig) else (),
    )


def collect_ranges(
    graph: onnx.ModelProto, tensors: Sequence[str], batches: Iterable[NDArray[np.float32]]
) -> Ranges:
    """Run a float32 graph and return the smallest and largest value of each tensor.

    The mean over batches of a batch's smallest and largest: one odd image does not widen the range
    for all others. Zero is always inside, since padding adds zeros.
    """
    if not tensors:
        return {}
    # Reduced inside the graph and image by image: all activations of 16 images of V2-S are 24 GB.
    probe = onnx.ModelProto()
    probe.CopyFrom(graph)
    del probe.graph.output[:]
    for name in tensors:
        for op, output in (("ReduceMin", f"{name}/low"), ("ReduceMax", f"{name}/high")):
            probe.graph.node.append(helper.make_node(op, [name], [output], keepdims=0))
            probe.graph.output.append(
                helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, ())
            )
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_usable_cores()
    session = ort.InferenceSession(
        probe.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: list[NDArray[np.float32]] = []
    for images in batches:
        each = np.asarray([session.run(None, {INPUT_NAME: image[None]}) for image in images])
        found.append(np.stack([each[:, 0::2].min(axis=0), each[:, 1::2].max(axis=0)], axis=1))
    means = np.mean(np.stack(found).astype(np.float64), axis=0)
    ranges: Ranges = {}
    for name, (low, high) in zip(tensors, means, strict=True):
        bounds = float(low), float(high)
        if not np.isfinite(bounds).all():
            raise CalibrationError(
                f"the values of {name} are not finite ({bounds[0]} to {bounds[1]}): "
                "the checkpoint's weights are damaged, or its preprocessing is not the network's"
            )
        ranges[name] = min(0.0, bounds[0]), max(0.0, bounds[1])
    return ranges
