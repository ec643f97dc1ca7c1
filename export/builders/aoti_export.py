"""Checkpoint -> programs compiled by AOTInductor for this CPU or GPU, checked against the model."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from efficientnet.formats.artifact import Binding
from efficientnet.machine.gpu import current_gpu, why_no_gpu
from efficientnet.runtimes.aoti_runtime import missing_extensions
from export.builders import aoti_builder
from export.builders.writing import Built, default_output, programs_for, write_checked_artifact
from export.graphs.folding import TORCH_TYPES
from export.inputs.config import AotiConfig
from export.inputs.rebuild import rebuild_command
from export.inputs.reference import load_reference

PROGRAM_FILE = "model.pt2"

# Below, Triton has no kernels.
LEAST_CAPABILITY = "7.0"
LEAST_CAPABILITY_FOR_BF16 = "8.0"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What is compiled for."""

    device: aoti_builder.Device
    name: str
    """Of the GPU, or of the processor's instruction set."""
    compute_capability: str | None
    """None for a CPU."""


def main(config: AotiConfig) -> Path:
    """Compile, check and write the artifact; return its directory."""
    target = find_target(config)
    compiler = aoti_builder.require_compiler()
    log.info("torch %s and %s for %s (%s)", torch.__version__, compiler, target.device, target.name)
    reference = load_reference(config)
    output = default_output(config, reference, "aoti" if target.device == "cpu" else "aoti-cuda")
    settings = aoti_builder.CompileSettings(
        device=target.device,
        dtype=TORCH_TYPES[config.precision],
        uses_triton_squeeze_excite=target.device == "cuda" and config.fused_squeeze_excite,
    )
    batches = aoti_builder.batches_for(config)
    static_programs = programs_for(PROGRAM_FILE, (b for b in batches if isinstance(b, int)))
    files = [program.file for program in static_programs] or [PROGRAM_FILE]

    def build(directory: Path, kept: tuple[str, ...]) -> Built:
        programs = {directory / file: batch for file, batch in zip(files, batches, strict=True)}
        lines = aoti_builder.compile_programs(
            reference.model, reference.image_size, programs, config.batch[1], settings
        )
        return Built(
            program_file=files[0],
            weight_bytes=aoti_builder.weight_bytes_of(reference.model, settings.dtype),
            other_files=tuple(files[1:]),
            static_programs=static_programs,
            log=(f"compiled by torch {torch.__version__} and {compiler} for {target.name}", *lines),
            target_device=target.name if target.device == "cuda" else "cpu",
            binding=Binding(
                library="torch",
                version=torch.__version__,
                compute_capability=target.compute_capability,
                device=target.name,
                rebuild=rebuild_command("export/aoti.py", config, reference.checkpoint),
            ),
        )

    return write_checked_artifact(reference, config, output, "aoti", build)


def find_target(config: AotiConfig) -> Target:
    """Check that the device is there and computes in the precision."""
    gpu = current_gpu()
    if config.device == "cpu" or (config.device is None and gpu is None):
        missing = missing_extensions(config.precision)
        if missing is not None:
            raise aoti_builder.AotiError(
                f"this processor has no instructions for {config.precision} ({missing}): it would "
                "compute in float32 and round; take --precision fp32, or int8 by "
                "'python export/ov.py --precision int8'"
            )
        return Target("cpu", torch.backends.cpu.get_cpu_capability(), None)
    if gpu is None:
        raise aoti_builder.AotiError(
            f"no NVIDIA GPU answers here ({why_no_gpu()}), and a program is compiled on the GPU it "
            "runs on: run this command on that machine, or take --device cpu"
        )
    least = LEAST_CAPABILITY_FOR_BF16 if config.precision == "bf16" else LEAST_CAPABILITY
    if _numbers(gpu.compute_capability) < _numbers(least):
        instead = "take --precision fp16" if config.precision == "bf16" else "take --device cpu"
        raise aoti_builder.AotiError(
            f"{gpu.name} has compute capability {gpu.compute_capability}, and {config.precision} "
            f"by AOTInductor needs {least}: {instead}"
        )
    return Target("cuda", gpu.name, gpu.compute_capability)


def _numbers(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))
