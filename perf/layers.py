"""Artifacts -> where the time of a call goes, layer by layer, as the runtime's own profile tells.

ONNX Runtime on the CPU, OpenVINO and the native engine tell. Measuring each layer takes time
itself, so the sum over the layers stands beside a call without a profile. Several artifacts are
measured one after the other, and their kinds of layers are set side by side.

    python perf/layers.py artifacts/v2-s/openvino-int8
    python perf/layers.py artifacts/v2-s/onnxruntime-fp32 artifacts/v2-s/openvino-fp32 --threads 1
"""

import logging
import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import tyro
from pydantic import AwareDatetime, BaseModel, ConfigDict

from efficientnet.command import parse_flags, run_command
from efficientnet.formats.artifact import ArtifactError, read_artifact
from efficientnet.machine.environment import (
    EnvironmentRecord,
    current_environment,
    num_usable_cores,
)
from efficientnet.measuring.inputs import map_inputs, prepare_inputs, rotate
from efficientnet.measuring.peaks import CPU_PRECISION, cpu_peak, describe_peak
from efficientnet.measuring.programs import (
    Program,
    images_for,
    read_program,
    require_different_paths,
)
from efficientnet.network.cost import layer_costs, total_cost
from efficientnet.network.variants import get_variant
from efficientnet.reporting.tables import format_percent
from efficientnet.runtimes import open_runtime
from perf.measurements.layer_profile import (
    NUM_WARM_UP_CALLS,
    PROFILERS,
    Batches,
    layer_times,
    time_calls,
)
from perf.pages.layer_tables import ProgramLayers, kind_times, log_tables, side_by_side_table

MAX_CALLS = 200
SEED = 0

WHO_TELLS = (
    "the runtimes that tell the times of layers are onnxruntime on the CPU, openvino and native"
)

log = logging.getLogger(__name__)


class LayerTimes(BaseModel):
    """What one run of the command measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    programs: tuple[ProgramLayers, ...]
    batch_size: int
    num_threads: int
    num_calls: int
    environment: EnvironmentRecord
    started_at: AwareDatetime


@dataclass(frozen=True)
class LayersConfig:
    """Settings of a measurement."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Artifact directories, of ONNX Runtime on the CPU, of OpenVINO or of the native engine."""

    calls: int = 20
    """Calls that are timed after the warm-up, 1 to 200; OpenVINO's profile takes rounds of 5."""

    threads: int | None = None
    """CPU threads of a call; None = one per usable core."""

    batch_size: int = 1
    """Images in a call, at least 1."""

    data: str | None = None
    """Held-out images, where the training data has moved: a folder or tar shards, as in
    training/run.py; None = what each program was trained on."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not self.paths:
            raise ValueError(
                "no artifact is named, expected at least one like artifacts/v2-s/openvino-int8"
            )
        if not 1 <= self.calls <= MAX_CALLS:
            raise ValueError(f"--calls is {self.calls}, expected 1 to {MAX_CALLS}")
        for flag, value in (("--threads", self.threads), ("--batch-size", self.batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{flag} is {value}, expected at least 1")
        require_different_paths(self.paths)


def main(config: LayersConfig) -> LayerTimes:
    """Measure one artifact after the other and log the tables.

    Raises:
        FileNotFoundError: a path or the data is not there.
        ArtifactError, CheckpointError: a path is not what it should be, or its runtime does not
            tell the times of layers; found before any work.
    """
    started_at = datetime.now(UTC)
    programs = [read_profiled(path, config.batch_size) for path in config.paths]
    num_threads = config.threads or num_usable_cores()
    log.info(
        "programs: %d; threads: %d; batch size: %d; calls: %d; machine: %s, %d cores",
        *(len(programs), num_threads, config.batch_size, config.calls),
        *(current_environment().cpu, num_usable_cores()),
    )
    operations_per_s = None
    if any(program.precision == CPU_PRECISION for program in programs):
        # Before the programs are opened: nothing else computes now.
        peak = cpu_peak(num_threads)
        operations_per_s = peak.operations_per_s
        log.info("the CPU's peak in float32: %s", describe_peak(peak))
    found: list[ProgramLayers] = []
    for program in programs:
        own_peak = operations_per_s if program.precision == CPU_PRECISION else None
        found.append(measure_layers(program, config, num_threads, own_peak))
        log_tables(found[-1])
    if len(found) > 1:
        log.info("\nside by side, ms\n%s", side_by_side_table(found).aligned_text())
    return LayerTimes(
        programs=tuple(found),
        batch_size=config.batch_size,
        num_threads=num_threads,
        num_calls=config.calls,
        environment=current_environment(),
        started_at=started_at,
    )


def read_profiled(path: Path, batch_size: int) -> Program:
    """Read an artifact whose runtime tells the times of its layers.

    Raises:
        FileNotFoundError: no such path.
        ArtifactError, CheckpointError: not an artifact, damaged, or of another runtime.
        ValueError: it takes fewer images in a call, or answers so many in streams.
    """
    program = read_program(path)
    if program.runtime == "torch":
        raise ArtifactError(
            f"{path} is a checkpoint, and the eager model has no profile that is read here; "
            f"{WHO_TELLS}: make an artifact of it with 'python export/ort.py' or "
            "'python export/ov.py'"
        )
    manifest = read_artifact(path)
    provider = manifest.provider
    if program.runtime not in PROFILERS or provider is not None:
        on = f" on {provider}" if provider else ""
        raise ArtifactError(
            f"{path} is for the runtime {program.runtime}{on}, whose profile is not read here; "
            f"{WHO_TELLS}"
        )
    if program.max_batch_size is not None and batch_size > program.max_batch_size:
        raise ValueError(
            f"{path} takes at most {program.max_batch_size} images in a call, --batch-size is "
            f"{batch_size}; choose a smaller one, or export with a larger --batch"
        )
    if batch_size in manifest.streamed_batches:
        raise ValueError(
            f"{path} answers {batch_size} images one by one, in streams side by side, whose layers "
            "no profile adds up; profile one image: --batch-size 1 --threads 1"
        )
    if program.runtime == "native" and batch_size != 1:
        raise ValueError(
            f"{path}: the native engine tells the times of one image's layers, --batch-size is "
            f"{batch_size}; profile one image: --batch-size 1"
        )
    return program


def measure_layers(
    program: Program, config: LayersConfig, num_threads: int, operations_per_s: float | None
) -> ProgramLayers:
    """Time calls of one artifact without a profile, then its layers with one."""
    spec, size = program.preprocess, config.batch_size
    samples = images_for(program, config.data).val
    inputs = prepare_inputs(samples, spec, size, SEED)
    with inputs.file:
        batches = rotate(map_inputs(inputs.file.fileno(), inputs.image_size), size)
        times_ms = plain_calls(program, batches, num_threads, config.calls)
        manifest = read_artifact(program.path)
        profile = PROFILERS[program.runtime](
            program.path / manifest.program_file, manifest, batches, num_threads, config.calls
        )
    costs = layer_costs(
        get_variant(program.variant),
        spec.image_size,
        size,
        program.precision,
        len(program.class_names),
    )
    layers = layer_times(profile.nodes, costs, manifest.output.name, operations_per_s)
    expected = total_cost(costs).flops
    counted = sum(layer.operations for layer in layers)
    if counted != expected:
        log.warning(
            "%s: %s of the operations are in no node that the runtime names",
            program.path,
            format_percent(1 - counted / expected),
        )
    return ProgramLayers(
        path=str(program.path),
        program_sha256=program.program_sha256,
        variant=program.variant,
        runtime=program.runtime,
        precision=program.precision,
        image_size=spec.image_size,
        kinds=kind_times(layers, operations_per_s),
        layers=layers,
        layers_ms=sum(layer.ms for layer in layers),
        call_ms=min(times_ms),
        median_call_ms=statistics.median(times_ms),
        profiled_call_ms=profile.call_ms,
        operations_per_s=operations_per_s,
    )


def plain_calls(
    program: Program, batches: Batches, num_threads: int, num_calls: int
) -> list[float]:
    """Return the milliseconds of calls after a warm-up, as latency.py measures them."""
    runtime = open_runtime(program.path, num_threads)

    def call() -> None:
        runtime.infer(next(batches))

    return time_calls(call, NUM_WARM_UP_CALLS + num_calls)[NUM_WARM_UP_CALLS:]


if __name__ == "__main__":
    run_command(lambda: parse_flags(LayersConfig, __doc__), main)
