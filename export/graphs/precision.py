"""A model and a precision -> the ONNX graph that computes in it: cast, or with Q/DQ nodes."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

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
from export.inputs.config import ExportConfig, MixedConfig
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

    Args:
        reference: the model and its images.
        config: precision, number of calibration images, seed.
        kept: blocks that stay in the scheme's float precision, besides the config's float layers.
        scheme: a key of SCHEMES; for float precisions not used.
        directory: where calibration.json is written.

    Raises:
        GraphError: the graph has not the form it must have.
        CalibrationError: too few training images.
    """
    if config.precision in ("int8", "fp8"):
        chosen = SCHEMES[scheme]
        # Of all settings, only these change the ranges.
        choice = ExportConfig(
            num_calibration_images=config.num_calibration_images, seed=config.seed
        )
        calibrated = _calibrate(reference, choice, scheme)
        sha256 = calibration.write_calibration(
            directory, calibrated.samples, config, calibration.METHOD
        )
        graph = onnx.ModelProto()
        graph.CopyFrom(calibrated.graph)
        float_layers = config.float_layers if isinstance(config, MixedConfig) else ()
        in_float = (*kept, *float_layers, *layers_without_kernel(graph, chosen))
        tensors = tensors_to_quantize(graph, in_float, chosen)
        ranges = {tensor: calibrated.ranges[tensor] for tensor in tensors}
        insert_quantization(graph, ranges, in_float, chosen)
        folding.check_graph(graph)
        if chosen.has_channels_last:
            pool_channels_last(graph.graph)
        quantization = QuantizationRecord(
            method=f"{scheme}: {calibration.METHOD}",
            num_calibration_images=len(calibrated.samples),
            calibration_sha256=sha256,
            kept_precision=chosen.float_precision,
            kept_blocks=tuple(kept),
            float_layers=float_layers,
        )
        return TypedGraph(graph, folding.OPSETS["fp32"], quantization)
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


class _Calibrated(NamedTuple):
    graph: onnx.ModelProto
    samples: tuple[Sample, ...]
    ranges: calibration.Ranges


# The gate and the search ask for several graphs that differ in what stays in float.
@lru_cache(maxsize=1)
def _calibrate(reference: Reference, config: ExportConfig, scheme: str) -> _Calibrated:
    chosen = SCHEMES[scheme]
    samples = calibration.choose_samples(reference, config)
    graph = graph_of(reference, chosen.float_precision)
    # Ranges are those of the float32 model, whose activations have the same names; but for the
    # input, which a graph of 16 bits casts first.
    is_plain = chosen.float_precision == "fp32"
    plain = graph if is_plain else graph_of(reference, "fp32")
    tensors = tensors_to_quantize(graph, (), chosen)
    names = [
        folding.INPUT_NAME if tensor == folding.CAST_INPUT_NAME else tensor for tensor in tensors
    ]
    found = calibration.collect_ranges(plain, names, calibration.images_of(reference, samples))
    ranges = {tensor: found[name] for tensor, name in zip(tensors, names, strict=True)}
    return _Calibrated(graph, tuple(samples), ranges)
