"""Checkpoint -> OpenVINO's files: batch norm folded, SiLU fused, quantised by NNCF."""

import errno
import itertools
import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import nncf
import onnx
import openvino as ov
from nncf.quantization.range_estimator import RangeEstimatorParametersSet
from openvino._offline_transformations import apply_moc_transformations

from efficientnet.artifact import QuantizationRecord, read_artifact
from efficientnet.atomic import replaced_directory, sha256_of_file
from efficientnet.devices import has_vnni
from efficientnet.runtimes.openvino_runtime import DEVICE, require_capability
from export.calibration import choose_samples, images_of, write_calibration
from export.config import Activations, Depthwise, OpenVinoConfig
from export.gate import GateError
from export.graph import INPUT_NAME, OPSET, count_weight_bytes, export_onnx
from export.measuring import measure
from export.source import Source, load_source
from export.writing import Built, default_output, vnni_binding, write_checked_artifact

PROGRAM_FILE = "model.xml"
WEIGHTS_FILE = "model.bin"

ACTIVATIONS: tuple[Activations, ...] = get_args(Activations)
DEPTHWISE: tuple[Depthwise, ...] = get_args(Depthwise)

# Of one pixel: they take no time, and decide about whole channels.
SQUEEZE_EXCITE = r".*[.](gate[.]|pool/).*"

# With less than that left after a failed write, the disk is full.
LEAST_FREE_BYTES = 1_000_000

SEARCH_SECONDS = 4.0
SEARCH_TURNS = 8

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
    if config.search:
        return fastest_within_drop(config)
    float_precision = config.precision
    if config.precision == "int8":
        has_bf16 = "BF16" in ov.Core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
        float_precision = "bf16" if has_bf16 else "fp32"
    require_capability(ov.Core(), float_precision, "the artifact")
    source = load_source(config)
    output = default_output(config, source, "openvino")
    log.info("export %s at %d px to ONNX, opset %d", source.variant, source.image_size, OPSET)
    graph = export_onnx(source.model, source.image_size)

    def build(directory: Path, kept: tuple[str, ...]) -> Built:
        model, quantization = read_fused(graph), None
        if config.precision == "int8":
            model, quantization = quantize(model, source, config, kept, directory)
            quantization = quantization.model_copy(update={"kept_precision": float_precision})
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


def fastest_within_drop(config: OpenVinoConfig) -> Path:
    """Build every kind of int8 artifact, measure them in turns, and write the fastest.

    Raises:
        GateError: all of them lose more than --max-drop.
    """
    source = load_source(config)
    output = default_output(config, source, "openvino")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".search-") as folder:
        found: list[Path] = []
        for activations, depthwise in itertools.product(ACTIVATIONS, DEPTHWISE):
            log.info("%s activations, depthwise convolutions in %s", activations, depthwise)
            variant = replace(
                config,
                search=False,
                activations=activations,
                depthwise=depthwise,
                output=Path(folder) / f"{activations}-{depthwise}",
            )
            try:
                found.append(export_openvino(variant))
            except GateError as error:
                log.info("left out: %s", error)
        if not found:
            raise GateError("no kind of int8 artifact is within --max-drop; export in fp32")
        records = measure(found, SEARCH_SECONDS, SEARCH_TURNS, config.batch[1], config.data)
        times = {path: records[read_artifact(path).program_sha256].mean_ms for path in found}
        for path in sorted(found, key=lambda path: times[path]):
            log.info("%8.2f ms  %s", times[path], path.name)
        best = min(found, key=lambda path: times[path])
        with replaced_directory(output) as fresh:
            for file in best.iterdir():
                file.rename(fresh / file.name)
    return output


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
    """Quantise to int8 with NNCF, all but squeeze-excite's layers and the blocks in `kept`."""
    samples = choose_samples(source, config)
    method = (
        f"nncf {nncf.__version__}, {config.activations} activations, "
        f"depthwise convolutions in {config.depthwise}"
    )
    sha256 = write_calibration(directory, samples, config, method)
    preset = "mixed" if config.activations == "asymmetric" else "performance"
    patterns = [SQUEEZE_EXCITE, *(rf"{block.replace('.', '[.]')}([./].*)?" for block in kept)]
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
            types=["GroupConvolution"] if config.depthwise == "float" else [],
            validate=False,
        ),
    )
    return quantized, QuantizationRecord(
        method=method,
        num_calibration_images=len(samples),
        calibration_sha256=sha256,
        kept_precision="fp32",
        kept_blocks=tuple(kept),
    )
