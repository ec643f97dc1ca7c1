"""Checkpoint -> model.native: batch norm folded, quantized by ranges to int8 or cast to bf16."""

import json
import logging
from dataclasses import replace
from pathlib import Path

from efficientnet.machine.atomic import write_text
from efficientnet.machine.processor import instruction_sets
from efficientnet.runtimes.native_runtime import NAMES_FILE, require_kernels
from export.builders.writing import Built, default_output, vnni_binding, write_checked_artifact
from export.graphs.calibration import METHOD, record_calibration
from export.graphs.folding import fold_batch_norm
from export.graphs.precision import calibrate
from export.inputs.config import NativeConfig, rebuild_command
from export.inputs.reference import Reference, load_reference
from export.native_format.native_program import activation_names, make_program

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
    return write_native(load_reference(config), config)


def write_native(reference: Reference, config: NativeConfig) -> Path:
    """Export, check and write one artifact; return its directory."""
    output = default_output(config, reference, "native")
    # Another machine may have to ask for the portable kernels.
    rebuild = rebuild_command(SCRIPT, replace(config, reference=True), reference.checkpoint)
    binding = vnni_binding("efficientnet-pipeline", rebuild)

    def build(directory: Path, kept: tuple[str, ...]) -> Built:
        ranges, quantization = None, None
        if config.precision == "int8":
            samples, ranges = calibrate(
                *(reference, config.num_calibration_images, config.seed),
                tuple(activation_names(reference.model)),
            )
            quantization = record_calibration(
                directory, samples, config, METHOD, "bf16", kept, scheme="native"
            )
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
