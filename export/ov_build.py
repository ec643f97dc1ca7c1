"""Checkpoint -> OpenVINO's files: batch norm folded, SiLU fused, quantised by NNCF."""

import errno
import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import nncf
import onnx
import openvino as ov
from nncf.quantization.range_estimator import RangeEstimatorParametersSet
from openvino._offline_transformations import apply_moc_transformations

from efficientnet.artifact import QuantizationRecord
from efficientnet.atomic import sha256_of_file
from efficientnet.devices import has_vnni
from efficientnet.runtimes.openvino_runtime import own_precision, require_capability
from export.calibration import choose_samples, images_of, write_calibration
from export.config import Activations, OpenVinoConfig
from export.graph import INPUT_NAME, OPSET, count_weight_bytes, export_onnx
from export.search import fastest_within_drop
from export.source import Source, load_source
from export.streams import choose_streams
from export.writing import Built, default_output, vnni_binding, write_checked_artifact

PROGRAM_FILE = "model.xml"
WEIGHTS_FILE = "model.bin"

# Of one pixel: they take no time, and decide about whole channels.
SQUEEZE_EXCITE = r".*[.](gate[.]|pool/).*"

# With less than that left after a failed write, the disk is full.
LEAST_FREE_BYTES = 1_000_000

# It would list every layer that is left out.
logging.getLogger("nncf").setLevel(logging.WARNING)

log = logging.getLogger(__name__)


def export_openvino(config: OpenVinoConfig) -> Path:
    """Export, check and write the artifact; return its directory.

    Raises:
        ArtifactError: the processor does not compute in the precision.
        CheckpointError, GraphError, CalibrationError, GateError, ParityError: see load_source,
            export_onnx, choose_samples and write_checked_artifact.
    """
    core = ov.Core()
    if config.precision != "int8":
        require_capability(core, config.precision, "the artifact")
    source = load_source(config)
    write = search_openvino if config.search else write_openvino
    artifact = write(source, config)
    choose_streams(source, artifact, config.static_batches)
    return artifact


def search_openvino(source: Source, config: OpenVinoConfig) -> Path:
    """Write the fastest mixture of int8 and float layers; return its directory."""
    every = [config.activations] if config.activations else get_args(Activations)
    kinds = {f"{kind} int8": replace(config, activations=kind) for kind in every}
    output = default_output(config, source, "openvino")
    return fastest_within_drop(source, kinds, own_precision(ov.Core()), output, write_openvino)


def write_openvino(source: Source, config: OpenVinoConfig) -> Path:
    """Export, check and write one artifact; return its directory."""
    output = default_output(config, source, "openvino")
    graph = graph_of(source)

    def build(directory: Path, kept: tuple[str, ...]) -> Built:
        model, quantization = read_fused(graph), None
        if config.precision == "int8":
            model, quantization = quantize(model, source, config, kept, directory)
        save(model, directory)
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
            binding=vnni_binding("openvino", "python export/ov.py")
            if quantization and has_vnni()
            else None,
        )

    return write_checked_artifact(source, config, output, "openvino", build)


# A search makes several artifacts of one graph.
@lru_cache(maxsize=1)
def graph_of(source: Source) -> onnx.ModelProto:
    """Export the network to ONNX in float32; not to be changed."""
    log.info("export %s at %d px to ONNX, opset %d", source.variant, source.image_size, OPSET)
    return export_onnx(source.model, source.image_size)


def read_fused(graph: onnx.ModelProto) -> ov.Model:
    """Read an ONNX graph with Sigmoid and Mul joined to Swish.

    OpenVINO does that by itself when it compiles, but NNCF would have put quantisers in between by
    then: SiLU stays a pass of its own over each map instead of a part of the convolution (133
    nodes of V2-S, 0.57 of the time without them on a CPU with AVX2).
    """
    model = ov.Core().read_model(graph.SerializeToString())
    apply_moc_transformations(model, cf=False)
    return model


def save(model: ov.Model, directory: Path) -> None:
    """Write model.bin, and model.xml with the hash of model.bin in it.

    The weights alone tell two networks of one architecture apart; with their hash the program file
    has a hash of its own, by which records find each other.
    """
    program = directory / PROGRAM_FILE
    try:
        # float32 weights stay float32: by default they would be stored in 16 bits.
        ov.save_model(model, program, compress_to_fp16=False)
        model.set_rt_info(sha256_of_file(directory / WEIGHTS_FILE), ["weights_sha256"])
        ov.save_model(model, program, compress_to_fp16=False)
    except RuntimeError as error:
        # OpenVINO says "iostream error" only.
        is_full = shutil.disk_usage(directory).free < LEAST_FREE_BYTES
        raise OSError(errno.ENOSPC if is_full else errno.EIO, str(error)) from error


def quantize(
    model: ov.Model,
    source: Source,
    config: OpenVinoConfig,
    kept: Sequence[str],
    directory: Path,
) -> tuple[ov.Model, QuantizationRecord]:
    """Quantise to int8 with NNCF, all but squeeze-excite, `kept` and the config's float layers."""
    samples = choose_samples(source, config)
    activations = config.activations or "asymmetric"
    method = f"nncf {nncf.__version__}, {activations} activations"
    sha256 = write_calibration(directory, samples, config, method)
    preset = "mixed" if activations == "asymmetric" else "performance"
    in_float = (*kept, *config.float_layers)
    patterns = [SQUEEZE_EXCITE, *(rf"{re.escape(name)}([./].*)?" for name in in_float)]
    images = [batch[i : i + 1] for batch in images_of(source, samples) for i in range(len(batch))]
    quantized: Any = nncf.quantize(
        model,
        nncf.Dataset([{INPUT_NAME: image} for image in images]),
        preset=nncf.QuantizationPreset(preset),
        subset_size=len(samples),
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            # Without VNNI two products are added up in 16 bits, where weights of 8 bits overflow.
            overflow_fix=nncf.OverflowFix.FIRST_LAYER if has_vnni() else nncf.OverflowFix.ENABLE,
            # The default, the mean of each image's smallest and largest value, cuts off what is
            # above it in every second image: b0 on CIFAR-10 changed the class of 10 of 128 images,
            # with the smallest and largest of all 7, and its largest logit error was 4.2, not 2.6.
            activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
        ),
        ignored_scope=nncf.IgnoredScope(
            patterns=patterns,
            validate=False,
        ),
    )
    return quantized, QuantizationRecord(
        method=method,
        num_calibration_images=len(samples),
        calibration_sha256=sha256,
        kept_precision=own_precision(ov.Core()),
        kept_blocks=tuple(kept),
        float_layers=config.float_layers,
    )
