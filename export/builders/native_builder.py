"""Checkpoint -> model.native: batch norm folded, quantized by ranges to int8 or cast to bf16."""

import json
import logging
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from efficientnet.formats.artifact import QuantizationRecord
from efficientnet.images.datasets import Sample
from efficientnet.machine.atomic import write_text
from efficientnet.machine.processor import instruction_sets
from efficientnet.runtimes.native_runtime import NAMES_FILE, require_kernels
from export.builders.native_program import activation_names, make_program
from export.builders.writing import Built, default_output, vnni_binding, write_checked_artifact
from export.graphs.calibration import (
    METHOD,
    Ranges,
    choose_samples,
    collect_ranges,
    images_of,
    write_calibration,
)
from export.graphs.folding import export_onnx, fold_batch_norm
from export.inputs.config import ExportConfig, NativeConfig
from export.inputs.rebuild import rebuild_command
from export.inputs.reference import Reference, load_reference

SCRIPT = "export/native.py"

PROGRAM_FILE = "model.native"

log = logging.getLogger(__name__)


def main(config: NativeConfig) -> Path:
    """Export, check and write the artifact; return its directory."""
    require_kernels("the artifact", config.reference)
    if config.precision == "bf16" and "bf16" not in instruction_sets():
        log.warning(
            "this processor has no instructions for bf16, which the engine computes by float "
            "products here; measure it beside OpenVINO in fp32 (python export/ov.py), or take "
            "--precision int8"
        )
    reference = load_reference(config)
    output = default_output(config, reference, "native")
    # Another machine may have to ask for the portable kernels.
    rebuild = rebuild_command(SCRIPT, replace(config, reference=True), reference.checkpoint)
    binding = vnni_binding("efficientnet-pipeline", rebuild)

    def build(directory: Path, kept: tuple[str, ...]) -> Built:
        ranges, quantization = None, None
        if config.precision == "int8":
            ranges, quantization = calibrate(reference, config, kept, directory)
        log.info(
            "write %s at %d px in %s", reference.variant, reference.image_size, config.precision
        )
        made = make_program(fold_batch_norm(reference.model), reference.preprocess, ranges, kept)
        made.program.write(directory / PROGRAM_FILE)
        names = {"layers": made.layer_names, "tensors": made.tensor_names}
        write_text(directory / NAMES_FILE, json.dumps(names, indent=1) + "\n")
        return Built(
            PROGRAM_FILE,
            made.program.array_bytes,
            other_files=(NAMES_FILE,),
            log=(f"{len(made.layer_names)} layers, {len(made.tensor_names)} maps",),
            binding=None if config.reference else binding,
            quantization=quantization,
        )

    return write_checked_artifact(reference, config, output, "native", build)


def calibrate(
    reference: Reference, config: NativeConfig, kept: tuple[str, ...], directory: Path
) -> tuple[Ranges, QuantizationRecord]:
    """Choose the ranges of all activations, and write calibration.json."""
    # Of all settings, only these change the ranges.
    choice = ExportConfig(num_calibration_images=config.num_calibration_images, seed=config.seed)
    calibrated = _calibrate(reference, choice)
    return calibrated.ranges, QuantizationRecord(
        method=f"native: {METHOD}",
        num_calibration_images=len(calibrated.samples),
        calibration_sha256=write_calibration(directory, calibrated.samples, config, METHOD),
        kept_precision="bf16",
        kept_blocks=kept,
    )


class _Calibrated(NamedTuple):
    samples: tuple[Sample, ...]
    ranges: Ranges


# The gate asks for several programs that differ in what stays in float.
@lru_cache(maxsize=1)
def _calibrate(reference: Reference, config: ExportConfig) -> _Calibrated:
    samples = choose_samples(reference, config)
    graph = export_onnx(reference.model, reference.image_size)
    found = collect_ranges(graph, activation_names(reference.model), images_of(reference, samples))
    return _Calibrated(tuple(samples), found)
