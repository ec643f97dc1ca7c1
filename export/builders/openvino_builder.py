"""Checkpoint -> OpenVINO's files: batch norm folded, SiLU fused, quantised by NNCF."""

import errno
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import nncf
import onnx
import openvino as ov
from nncf.quantization.advanced_parameters import QuantizationParameters
from nncf.quantization.range_estimator import (
    AggregatorType,
    RangeEstimatorParameters,
    StatisticsCollectorParameters,
    StatisticsType,
)
from openvino._offline_transformations import apply_moc_transformations

from efficientnet.formats.artifact import QuantizationRecord
from efficientnet.machine.atomic import sha256_of_file
from efficientnet.machine.processor import has_vnni
from efficientnet.precision import Precision
from efficientnet.runtimes.openvino_runtime import openvino_core, own_precision, require_capability
from export.builders.batch_splitting import choose_streams
from export.builders.search import fastest_within_drop
from export.builders.writing import Built, default_output, vnni_binding, write_checked_artifact
from export.graphs import calibration
from export.graphs.folding import INPUT_NAME, OPSET, count_weight_bytes
from export.graphs.precision import graph_of
from export.inputs.config import Activations, OpenVinoConfig, rebuild_command
from export.inputs.reference import Reference, load_reference

PROGRAM_FILE = "model.xml"
WEIGHTS_FILE = "model.bin"

# Of one pixel: squeeze-excite and classifier take no time, and decide about whole channels and
# about the answer.
ALWAYS_FLOAT = (r".*[.](gate[.]|pool/).*", r"avgpool/.*", r"classifier[.].*")

# NNCF's default, the mean over single images, cuts off what is above it in every second image; the
# smallest and largest of all is as wide as the oddest image: 654 and 95 of 2,000 images of CIFAR-10
# change their class so with V2-B0, and 62 by the mean over batches of 16.
BATCH_MEAN = RangeEstimatorParameters(
    min=StatisticsCollectorParameters(
        statistics_type=StatisticsType.MIN, aggregator_type=AggregatorType.MEAN
    ),
    max=StatisticsCollectorParameters(
        statistics_type=StatisticsType.MAX, aggregator_type=AggregatorType.MEAN
    ),
)

# By itself NNCF gives each channel of a depthwise convolution's input a range of its own. Channels
# that are quiet in crops of two photographs are cut off in all others: lite0 had 91 of 128
# photographs of ImageNet right in place of 114, and with one range for the map 115.
ONE_RANGE = QuantizationParameters(per_channel=False)

# With less than that left after a failed write, the disk is full.
LEAST_FREE_BYTES = 1_000_000

# It would list every layer that is left out.
logging.getLogger("nncf").setLevel(logging.WARNING)

log = logging.getLogger(__name__)


def main(config: OpenVinoConfig) -> Path:
    """Export, check and write the artifact; return its directory."""
    if config.precision != "int8":
        require_capability(config.precision, "the artifact")
    reference = load_reference(config)
    finish = partial(choose_streams, reference, sizes=config.static_batches)
    # Also in the artifacts of a search, whose own settings are results.
    rebuild = rebuild_command("export/ov.py", config, reference.checkpoint)
    write = partial(write_openvino, rebuild=rebuild)
    if config.search:
        return search_openvino(reference, config, finish, write)
    return write(reference, config, finish)


def search_openvino(
    reference: Reference,
    config: OpenVinoConfig,
    finish: Callable[[Path], None],
    write: Callable[[Reference, OpenVinoConfig], Path],
) -> Path:
    """Write the fastest mixture of int8 and float layers; return its directory."""
    every = [config.activations] if config.activations else get_args(Activations)
    kinds = {f"{kind} int8": replace(config, activations=kind) for kind in every}
    output = default_output(config, reference, "openvino")
    in_float = replace(config, precision=own_precision(), activations=None, search=False)
    return fastest_within_drop(reference, kinds, in_float, output, write, finish)


def write_openvino(
    reference: Reference,
    config: OpenVinoConfig,
    finish: Callable[[Path], None] | None = None,
    *,
    rebuild: str,
) -> Path:
    """Export, check and write one artifact; return its directory."""
    output = default_output(config, reference, "openvino")
    graph = graph_of(reference, "fp32")

    def build(directory: Path, kept: tuple[str, ...]) -> Built:
        model, quantization = read_fused(graph), None
        if config.precision == "int8":
            model, quantization = quantize(model, reference, config, kept, directory)
        save(model, directory, config.precision)
        return Built(
            PROGRAM_FILE,
            (directory / WEIGHTS_FILE).stat().st_size
            if quantization
            else count_weight_bytes(graph),
            other_files=(WEIGHTS_FILE,),
            static_batches=config.static_batches,
            log=(f"OpenVINO {ov.__version__}, nncf {nncf.__version__}, opset {OPSET}",),
            opset=OPSET,
            quantization=quantization,
            binding=vnni_binding("openvino", rebuild) if quantization and has_vnni() else None,
        )

    return write_checked_artifact(reference, config, output, "openvino", build, finish=finish)


def read_fused(graph: onnx.ModelProto) -> ov.Model:
    """Read an ONNX graph with Sigmoid and Mul joined to Swish.

    OpenVINO does that by itself when it compiles, but NNCF would have put quantisers in between by
    then: SiLU stays a pass of its own over each map instead of a part of the convolution (133
    nodes of V2-S, 0.57 of the time without them on a CPU with AVX2).
    """
    model = openvino_core().read_model(graph.SerializeToString())
    apply_moc_transformations(model, cf=False)
    return model


def save(model: ov.Model, directory: Path, precision: Precision) -> None:
    """Write model.bin, and model.xml with the hash of model.bin and the precision in it.

    The weights alone tell two networks of one architecture apart, and the precision, which OpenVINO
    is told when it compiles, two programs of one network; with both in it the program file has a
    hash of its own, by which records find each other.
    """
    program = directory / PROGRAM_FILE
    try:
        # float32 weights stay float32: by default they would be stored in 16 bits.
        ov.save_model(model, program, compress_to_fp16=False)
        model.set_rt_info(sha256_of_file(directory / WEIGHTS_FILE), ["weights_sha256"])
        model.set_rt_info(precision, ["precision"])
        ov.save_model(model, program, compress_to_fp16=False)
    except RuntimeError as error:
        # OpenVINO says "iostream error" only.
        is_full = shutil.disk_usage(directory).free < LEAST_FREE_BYTES
        raise OSError(errno.ENOSPC if is_full else errno.EIO, str(error)) from error


def pattern_of(name: str) -> str:
    """Return the regular expression of a module's nodes; NNCF takes it from their names' start."""
    return rf"{re.escape(name)}([./].*)?$"


def quantize(
    model: ov.Model,
    reference: Reference,
    config: OpenVinoConfig,
    kept: Sequence[str],
    directory: Path,
) -> tuple[ov.Model, QuantizationRecord]:
    """Quantise to int8 with NNCF, all but squeeze-excite, `kept` and the config's float layers."""
    samples = calibration.choose_samples(reference, config)
    activations = config.activations or "asymmetric"
    method = f"nncf {nncf.__version__}, {activations} activations, {calibration.METHOD}"
    record = calibration.record_calibration(
        directory, samples, config, method, own_precision(), kept
    )
    preset = "mixed" if activations == "asymmetric" else "performance"
    patterns = [*ALWAYS_FLOAT, *map(pattern_of, (*kept, *config.float_layers))]
    batches = [{INPUT_NAME: images} for images in calibration.images_of(reference, samples)]
    quantized: Any = nncf.quantize(
        model,
        nncf.Dataset(batches),
        preset=nncf.QuantizationPreset(preset),
        subset_size=len(batches),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            # Without VNNI two products are added up in 16 bits, where weights of 8 bits overflow.
            overflow_fix=nncf.OverflowFix.FIRST_LAYER if has_vnni() else nncf.OverflowFix.ENABLE,
            activations_range_estimator_params=BATCH_MEAN,
            activations_quantization_params=ONE_RANGE
            if calibration.has_two_photographs_only(reference)
            else None,
        ),
        ignored_scope=nncf.IgnoredScope(patterns=patterns, validate=False),
    )
    return quantized, record
