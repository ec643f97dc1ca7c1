"""A model and a precision -> the ONNX graph that computes in it: cast, or with Q/DQ nodes."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import onnx

from efficientnet.formats.artifact import QuantizationRecord
from efficientnet.images.datasets import Sample
from export.graphs import calibration, folding
from export.graphs.channels_last import pool_channels_last
from export.graphs.quantization import (
    SCHEMES,
    insert_quantization,
    layers_without_kernel,
    tensors_to_quantize,
)
from export.inputs.config import ExportConfig
from export.inputs.reference import Reference

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TypedGraph:
    """A graph that computes in the precision asked for, and how its ranges were chosen."""

    model: onnx.ModelProto
    opset: int
    quantization: QuantizationRecord | None = None


def typed_graph(
    reference: Reference, config: ExportConfig, kept: Sequence[str], scheme: str, directory: Path
) -> TypedGraph:
    """Export the graph of a precision; of int8 and fp8 with ranges from training images.

    `scheme` is a key of SCHEMES, for int8 and fp8. Blocks that are `kept` stay in its float
    precision, and so do the config's float layers; calibration.json is written to the directory.
    """
    if config.precision in ("int8", "fp8"):
        chosen = SCHEMES[scheme]
        source = graph_of(reference, chosen.float_precision)
        every = tuple(tensors_to_quantize(source, (), chosen))
        samples, ranges = calibrate(reference, config.num_calibration_images, config.seed, every)
        record = calibration.record_calibration(
            *(directory, samples, config, calibration.METHOD),
            kept_precision=chosen.float_precision,
            kept=kept,
            scheme=scheme,
        )
        graph = onnx.ModelProto()
        graph.CopyFrom(source)
        in_float = (*kept, *record.float_layers, *layers_without_kernel(graph, chosen))
        tensors = tensors_to_quantize(graph, in_float, chosen)
        insert_quantization(graph, {name: ranges[name] for name in tensors}, in_float, chosen)
        folding.check_graph(graph)
        if not chosen.is_tensorrt:
            pool_channels_last(graph.graph)
        return TypedGraph(graph, folding.OPSETS["fp32"], record)
    precision: folding.FloatPrecision = config.precision
    graph = onnx.ModelProto()
    graph.CopyFrom(graph_of(reference, precision))
    return TypedGraph(graph, folding.OPSETS[precision])


# Two: what is exported, and the float32 graph whose activations the ranges are of. torch's exporter
# takes most of an export's time, and several artifacts may be made of one graph.
@lru_cache(maxsize=2)
def graph_of(reference: Reference, precision: folding.FloatPrecision) -> onnx.ModelProto:
    """Export the network to ONNX; not to be changed."""
    log.info(
        "export %s at %d px to ONNX, opset %d",
        reference.variant,
        reference.image_size,
        folding.OPSETS[precision],
    )
    return folding.export_onnx(reference.model, reference.image_size, precision)


# The gate and the search ask for several programs that differ in what stays in float.
@lru_cache(maxsize=1)
def calibrate(
    reference: Reference, num_images: int, seed: int, tensors: tuple[str, ...]
) -> tuple[tuple[Sample, ...], calibration.Ranges]:
    """Choose training images, and the ranges of the float32 network's activations by them."""
    choice = ExportConfig(num_calibration_images=num_images, seed=seed)
    samples = calibration.choose_samples(reference, choice)
    # Activations have the same names in every graph; but for the input, which a graph of 16 bits
    # casts first.
    names = [
        folding.INPUT_NAME if tensor == folding.CAST_INPUT_NAME else tensor for tensor in tensors
    ]
    plain, images = graph_of(reference, "fp32"), calibration.images_of(reference, samples)
    found = calibration.collect_ranges(plain, names, images)
    return tuple(samples), {t: found[name] for t, name in zip(tensors, names, strict=True)}
