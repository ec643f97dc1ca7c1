"""Programs, white noise and real images -> calls with denormal floats, and without them."""

import logging
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from efficientnet.formats.artifact import ArtifactError
from efficientnet.formats.checkpoint import load_checkpoint
from efficientnet.machine.denormals import count_denormals, keep_denormals
from efficientnet.machine.environment import current_environment, num_usable_cores
from efficientnet.measuring.clock import Call
from efficientnet.measuring.inputs import map_inputs, prepare_inputs, rotate
from efficientnet.measuring.programs import Program, images_for, read_programs
from efficientnet.measuring.turns import Ratio, TimeBudget, measure_calls, ratio
from efficientnet.reporting.publishing import Measured, find_section, publish_part
from efficientnet.reporting.tables import Table, format_ms, format_percent, format_ratio_and_range
from efficientnet.runtimes import open_runtime
from efficientnet.runtimes.names import title
from perf.studies.config import DenormalsConfig

SEED = 0
SECTION = "denormals"

# That calls of noise rotate through.
NUM_NOISE_IMAGES = 8

InputName = Literal["noise", "images"]
INPUTS: tuple[InputName, ...] = get_args(InputName)

log = logging.getLogger(__name__)


class InputTimes(BaseModel):
    """A program on one kind of input: each turn's median call, milliseconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    program: str
    program_sha256: str
    input: InputName
    flushed_ms: tuple[float, ...]
    kept_ms: tuple[float, ...]

    @property
    def cost(self) -> Ratio:
        """How many times as long a call with denormals is."""
        return ratio(self.kept_ms, self.flushed_ms)


class DenormalsCost(Measured):
    """What one run of the command measured."""

    format_version: Literal[1] = 1
    variant: str
    image_size: int
    data: str
    """What the network was trained on."""
    num_threads: int
    denormal_share: float | None
    """Of what the eager model's convolutions read for noise; None where no checkpoint is named."""
    times: tuple[InputTimes, ...]


def main(config: DenormalsConfig) -> DenormalsCost:
    """Measure all programs, and show what was found."""
    if config.publish:
        find_section(config.readme, SECTION)
    started_at = datetime.now(UTC)
    programs = read_programs(config.paths)
    first = programs[0]
    for program in programs:
        require_switch(program)
        if (program.variant, program.preprocess) != (first.variant, first.preprocess):
            raise ValueError(
                f"{program.path} is {program.variant} at {program.preprocess.image_size} px or "
                f"prepares images otherwise, {first.path} is {first.variant} at "
                f"{first.preprocess.image_size} px; name programs that take the same images"
            )
    num_threads = config.threads or num_usable_cores()
    found = DenormalsCost(
        variant=first.variant,
        image_size=first.preprocess.image_size,
        data=first.data,
        num_threads=num_threads,
        denormal_share=next(
            (denormal_share(program.path) for program in programs if program.runtime == "torch"),
            None,
        ),
        times=measure(programs, config, num_threads),
        environment=current_environment(),
        started_at=started_at,
    )
    log.info("%s", table_of(found).aligned_text())
    if config.publish:
        name = f"{SECTION}-{found.variant}-{found.image_size}px.json"
        publish_part(found, name, config.readme, SECTION, section_of)
    return found


def require_switch(program: Program) -> None:
    """Check that a program can be measured both ways."""
    if program.runtime == "native" or program.runs_on_gpu:
        raise ArtifactError(
            f"{program.path} cannot keep denormals: the native engine always flushes, and has next "
            "to no floats in int8; GPUs compute with them at no cost. Name a checkpoint, or "
            "artifacts of 'python export/ort.py', 'export/ov.py' or 'export/aoti.py --device cpu'"
        )


def measure(
    programs: Sequence[Program], config: DenormalsConfig, num_threads: int
) -> tuple[InputTimes, ...]:
    """Let all take turns, each program in a process for each input and each arithmetic."""
    first = programs[0]
    inputs = prepare_inputs(images_for(first, config.data).val, first.preprocess, 1, SEED)
    cases = list(product(programs, INPUTS))
    with inputs.file:
        descriptor = inputs.file.fileno()
        openers = {
            f"{program.path}, {kind}, {'kept' if is_kept else 'flushed'}": partial(
                _open, program.path, num_threads, kind, is_kept, descriptor, inputs.image_size
            )
            for program, kind in cases
            for is_kept in (False, True)
        }
        turns = iter(
            measure_calls(openers, TimeBudget(config.seconds, config.turns), (descriptor,)).values()
        )
    return tuple(
        InputTimes(
            program=title(program.runtime, program.precision),
            program_sha256=program.program_sha256,
            input=kind,
            flushed_ms=next(turns),
            kept_ms=next(turns),
        )
        for program, kind in cases
    )


def white_noise(image_size: int, num_images: int = NUM_NOISE_IMAGES) -> NDArray[np.float32]:
    """Return preprocessed images [N, 3, S, S] of independent pixels, mean 0 and deviation 1.

    What no network was trained on: SiLU then gets numbers so far below zero that what it gives, or
    its product with a weight, is denormal.
    """
    shape = (num_images, 3, image_size, image_size)
    return np.random.default_rng(SEED).standard_normal(shape, np.float32)


def denormal_share(checkpoint: Path) -> float:
    """Return which share of what the eager model's convolutions read for noise is denormal."""
    model, record = load_checkpoint(checkpoint)
    denormals: list[int] = []
    sizes: list[int] = []

    def count(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        denormals.append(count_denormals(inputs[0].numpy()))
        sizes.append(inputs[0].numel())

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(count)
    with torch.inference_mode():
        model(torch.from_numpy(white_noise(record.preprocess.image_size, 1)))
    return sum(denormals) / sum(sizes)


def table_of(cost: DenormalsCost) -> Table:
    """Lay the times out: a row for each program and input."""
    rows = [
        (
            times.program,
            times.input,
            format_ms(statistics.median(times.kept_ms)),
            format_ms(statistics.median(times.flushed_ms)),
            format_ratio_and_range(times.cost.median, times.cost.low, times.cost.high),
        )
        for times in cost.times
    ]
    columns = ("program", "input", "with denormals, ms", "flushed, ms", "with / flushed")
    return Table(columns, tuple(rows), frozenset(("program", "input")))


def section_of(cost: DenormalsCost) -> str:
    """Write what was measured as Markdown."""
    share = ""
    if cost.denormal_share is not None:
        share = f" ({format_percent(cost.denormal_share, 2)} of what convolutions read is denormal)"
    return (
        f"**{cost.variant}, trained on {cost.data}, {cost.image_size} px, batch 1**\n\n"
        f"{table_of(cost).markdown()}\n\n"
        f"{cost.environment.processor}, {cost.num_threads} threads, {cost.started_at:%Y-%m-%d} "
        f"UTC. noise: white, as preprocessed{share}; images: held out, of what it was trained on. "
        "With / flushed: median of the ratios of the medians within a turn, and their range."
    )


def _open(
    path: Path, num_threads: int, kind: InputName, is_kept: bool, descriptor: int, size: int
) -> Call:
    if is_kept:
        keep_denormals()
    runtime = open_runtime(path, num_threads)
    images = white_noise(size) if kind == "noise" else map_inputs(descriptor, size)
    batches = rotate(images, 1)
    return lambda: runtime.infer(next(batches))
