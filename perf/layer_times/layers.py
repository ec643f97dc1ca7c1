"""Artifacts -> where the time of a call goes, layer by layer, as the runtime tells."""

import logging
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from efficientnet.formats.artifact import ArtifactError, read_artifact
from efficientnet.machine.environment import current_environment, num_usable_cores
from efficientnet.measuring.inputs import map_inputs, prepare_inputs, rotate
from efficientnet.measuring.peaks import cpu_peaks, describe_peak
from efficientnet.measuring.programs import (
    Program,
    images_for,
    read_program,
)
from efficientnet.network.cost import layer_costs, total_cost
from efficientnet.reporting.publishing import Measured, find_section, publish_part
from efficientnet.reporting.tables import format_ms, format_percent
from efficientnet.runtimes import open_runtime
from efficientnet.runtimes.native.engine import PORTABLE, levels
from perf.layer_times import layer_profile, layer_tables
from perf.layer_times.native_limits import Rates, layer_limits, measure_rates, node_limits
from perf.measurements.config import LayersConfig

SEED = 0
SECTION = "layers"

WHO_TELLS = (
    "the runtimes that tell the times of layers are onnxruntime on the CPU, openvino and native"
)

log = logging.getLogger(__name__)


class LayerTimes(Measured):
    """What one run of the command measured."""

    format_version: Literal[1] = 1
    programs: tuple[layer_tables.ProgramLayers, ...]
    batch_size: int
    num_threads: int
    num_calls: int


def main(config: LayersConfig) -> LayerTimes:
    """Measure one artifact after the other and log the tables."""
    started_at = datetime.now(UTC)
    programs = [read_profiled(path, config.batch_size) for path in config.paths]
    native = [program for program in programs if program.runtime == "native"]
    if config.publish:
        find_section(config.readme, SECTION)
        if not native:
            raise ValueError("--publish shows native artifacts beside their limits: name one")
    num_threads = config.threads or num_usable_cores()
    log.info(
        "programs: %d; threads: %d; batch size: %d; calls: %d; machine: %s, %d cores",
        *(len(programs), num_threads, config.batch_size, config.calls),
        *(current_environment().processor, num_usable_cores()),
    )
    # Before the programs are opened: nothing else computes now.
    peaks = cpu_peaks(num_threads, [program.precision for program in programs])
    level = levels()[0] if native else PORTABLE
    rates = None
    if level != PORTABLE:
        memory_bytes_per_s = peaks[native[0].precision].bytes_per_s
        rates = measure_rates(num_threads, level, memory_bytes_per_s)
    for precision, peak in peaks.items():
        log.info("the CPU's peak in %s: %s", precision, describe_peak(peak))
    found: list[layer_tables.ProgramLayers] = []
    for program in programs:
        peak = peaks.get(program.precision)
        operations_per_s = peak.operations_per_s if peak else None
        found.append(measure_layers(program, config, num_threads, operations_per_s, rates))
        layer_tables.log_tables(found[-1])
    if len(found) > 1:
        log.info("\nside by side, ms\n%s", layer_tables.side_by_side_table(found).aligned_text())
    times = LayerTimes(
        programs=tuple(found),
        batch_size=config.batch_size,
        num_threads=num_threads,
        num_calls=config.calls,
        environment=current_environment(),
        started_at=started_at,
    )
    if config.publish:
        publish(times, config.readme)
    return times


def publish(times: LayerTimes, readme: Path) -> None:
    """Write each native program's layers to its place, and all of them into the document."""
    for program in times.programs:
        if program.runtime == "native":
            name = f"{SECTION}-{program.variant}-{program.image_size}px-{program.precision}.json"
            alone = times.model_copy(update={"programs": (program,)})
            publish_part(alone, name, readme, SECTION, section_of)


def section_of(times: LayerTimes) -> str:
    """Render one program's layers beside their limits."""
    (program,) = times.programs
    environment = times.environment
    return (
        f"**{program.variant}, {program.precision}, {program.image_size} px**\n\n"
        f"{layer_tables.limits_table(program).markdown()}\n\n"
        f"A call: {format_ms(program.call_ms)} ms. {environment.processor}, {times.num_threads} "
        f"threads, {times.started_at:%Y-%m-%d} UTC."
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
    if program.runtime not in layer_profile.PROFILERS or provider is not None:
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
    program: Program,
    config: LayersConfig,
    num_threads: int,
    operations_per_s: float | None,
    rates: Rates | None,
) -> layer_tables.ProgramLayers:
    """Time calls of one artifact without a profile, then its layers with one.

    Args:
        program: of a runtime that tells.
        config: see there.
        num_threads: of a call.
        operations_per_s: what the device does at most in the program's precision.
        rates: what the limits of the native engine's layers follow from; None = not known.
    """
    spec, size = program.preprocess, config.batch_size
    samples = images_for(program, config.data).val
    inputs = prepare_inputs(samples, spec, size, SEED)
    with inputs.file:
        batches = rotate(map_inputs(inputs.file.fileno(), inputs.image_size), size)
        times_ms = plain_calls(program, batches, num_threads, config.calls)
        manifest = read_artifact(program.path)
        file = program.path / manifest.program_file
        profile = layer_profile.PROFILERS[program.runtime](
            file, manifest, batches, num_threads, config.calls
        )
    costs = layer_costs(
        program.spec,
        spec.image_size,
        size,
        program.precision,
        len(program.class_names),
    )
    layers = layer_profile.layer_times(profile.nodes, costs, manifest.output.name, operations_per_s)
    if program.runtime == "native" and rates is not None:
        limits = layer_limits(file, profile.nodes[0].kernel, rates)
        layers = tuple(
            layer.model_copy(update={"limits_ms": node_limits(node, limits)})
            for layer, node in zip(layers, profile.nodes, strict=True)
        )
    expected = total_cost(costs).flops
    counted = sum(layer.operations for layer in layers)
    if counted != expected:
        log.warning(
            "%s: %s of the operations are in no node that the runtime names",
            program.path,
            format_percent(1 - counted / expected),
        )
    return layer_tables.ProgramLayers(
        path=str(program.path),
        program_sha256=program.program_sha256,
        variant=program.variant,
        runtime=program.runtime,
        precision=program.precision,
        image_size=spec.image_size,
        kinds=layer_tables.kind_times(layers, operations_per_s),
        layers=layers,
        layers_ms=sum(layer.ms for layer in layers),
        call_ms=min(times_ms),
        median_call_ms=statistics.median(times_ms),
        profiled_call_ms=profile.call_ms,
        operations_per_s=operations_per_s,
    )


def plain_calls(
    program: Program, batches: layer_profile.Batches, num_threads: int, num_calls: int
) -> list[float]:
    """Return the milliseconds of calls after a warm-up, as latency.py measures them."""
    runtime = open_runtime(program.path, num_threads)

    def call() -> None:
        runtime.infer(next(batches))

    return layer_profile.time_calls(call, layer_profile.NUM_WARM_UP_CALLS + num_calls)[
        layer_profile.NUM_WARM_UP_CALLS :
    ]
