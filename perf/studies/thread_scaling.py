"""Artifacts -> the time of a call by number of threads, measured in turns."""

import logging
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from efficientnet.machine.atomic import write_bytes
from efficientnet.machine.environment import current_environment, num_usable_cores
from efficientnet.measuring.clock import Call
from efficientnet.measuring.inputs import map_inputs, prepare_inputs, rotate
from efficientnet.measuring.programs import Program, images_for, read_program
from efficientnet.measuring.turns import TimeBudget, measure_calls, ratio
from efficientnet.reporting.publishing import (
    Measured,
    find_section,
    publish_part,
    published_directory,
)
from efficientnet.reporting.tables import Table, format_ms, format_ratio
from efficientnet.runtimes import open_runtime
from efficientnet.runtimes.names import title
from perf.measurements.config import ScalingConfig
from perf.studies.scaling_plot import draw_scaling

SEED = 0
SECTION = "threads"

log = logging.getLogger(__name__)


class ThreadTimes(BaseModel):
    """A program on so many threads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    program: str
    num_threads: int
    turn_p50_ms: tuple[float, ...]

    @property
    def p50_ms(self) -> float:
        """Of the turns."""
        return statistics.median(self.turn_p50_ms)


class Scaling(Measured):
    """What one run of the command measured."""

    format_version: Literal[1] = 1
    variant: str
    image_size: int
    batch_size: int
    times: tuple[ThreadTimes, ...]

    def of(self, program: str) -> list[ThreadTimes]:
        """Return a program's times, those of the fewest threads first."""
        own = (time for time in self.times if time.program == program)
        return sorted(own, key=lambda time: time.num_threads)

    @property
    def programs(self) -> tuple[str, ...]:
        """Name them as they were asked for."""
        return tuple(dict.fromkeys(time.program for time in self.times))

    @property
    def name(self) -> str:
        """Name the published files."""
        return f"{SECTION}-{self.variant}-{self.image_size}px-batch-{self.batch_size}"


def main(config: ScalingConfig) -> Scaling:
    """Measure all programs on all numbers of threads, and draw what was found."""
    if config.publish:
        find_section(config.readme, SECTION)
    started_at = datetime.now(UTC)
    programs = [read_program(path) for path in config.paths]
    first = programs[0]
    for program in programs:
        if (program.variant, program.preprocess) != (first.variant, first.preprocess):
            raise ValueError(
                f"{program.path} is {program.variant} at {program.preprocess.image_size} px or "
                f"prepares images otherwise, {first.path} is {first.variant} at "
                f"{first.preprocess.image_size} px; name programs that take the same images"
            )
    found = Scaling(
        variant=first.variant,
        image_size=first.preprocess.image_size,
        batch_size=config.batch_size,
        times=measure(programs, config),
        environment=current_environment(),
        started_at=started_at,
    )
    log.info("%s", table_of(found).aligned_text())
    picture = config.result_file.with_suffix(".png")
    if config.publish:
        picture = published_directory(started_at, [found.environment]) / f"{found.name}.png"
    lines = {
        program: [(time.num_threads, time.p50_ms) for time in found.of(program)]
        for program in found.programs
    }
    write_bytes(picture, draw_scaling(lines, f"{title_of(found)}, {found.environment.processor}"))
    log.info("picture: %s", picture)
    if config.publish:
        render = partial(section_of, readme=config.readme)
        publish_part(found, f"{found.name}.json", config.readme, SECTION, render)
    return found


def measure(programs: Sequence[Program], config: ScalingConfig) -> tuple[ThreadTimes, ...]:
    """Let all programs take turns, each in a process for each number of threads."""
    counts = config.threads or thread_counts(num_usable_cores())
    data, spec = images_for(programs[0], config.data).val, programs[0].preprocess
    inputs = prepare_inputs(data, spec, config.batch_size, SEED)
    with inputs.file:
        descriptor, size = inputs.file.fileno(), inputs.image_size
        cases = [(program, count) for program in programs for count in counts]
        openers = {
            f"{program.path}, {count} threads": partial(
                _open, program.path, count, descriptor, size, config.batch_size
            )
            for program, count in cases
        }
        budget = TimeBudget(config.seconds, config.turns)
        names = names_of(programs)
        turns = measure_calls(openers, budget, (descriptor,))
    return tuple(
        ThreadTimes(
            program=names[program],
            num_threads=count,
            turn_p50_ms=own,
        )
        for (program, count), own in zip(cases, turns.values(), strict=True)
    )


def names_of(programs: Sequence[Program]) -> dict[Program, str]:
    """Name programs by runtime and precision, or by path where that names several."""
    titles = {program: title(program.runtime, program.precision) for program in programs}
    taken = Counter(titles.values())
    return {p: name if taken[name] == 1 else str(p.path) for p, name in titles.items()}


def thread_counts(num_cores: int) -> tuple[int, ...]:
    """Return the powers of two below a number of cores, and the number itself."""
    return (*(1 << bit for bit in range((num_cores - 1).bit_length())), num_cores)


def section_of(scaling: Scaling, readme: Path) -> str:
    """Write what was measured as Markdown."""
    s = scaling
    picture = published_directory(s.started_at, [s.environment]) / f"{s.name}.png"
    link = Path(os.path.relpath(picture, readme.parent)).as_posix()
    return (
        f"**{title_of(s)}**\n\n{table_of(s).markdown()}\n\n"
        f"![time of a call by number of threads]({link})\n\n"
        f"{s.environment.processor}, {s.environment.num_cores} cores, "
        f"{s.started_at:%Y-%m-%d} UTC. In brackets: how many times as fast as on the fewest "
        "threads, median of the ratios within a turn."
    )


def title_of(scaling: Scaling) -> str:
    """Say what was measured."""
    return f"{scaling.variant}, {scaling.image_size} px, batch {scaling.batch_size}"


def table_of(scaling: Scaling) -> Table:
    """Lay the times out: threads by row, programs by column."""
    programs = {name: scaling.of(name) for name in scaling.programs}
    rows: list[tuple[str, ...]] = []
    for index, first in enumerate(next(iter(programs.values()))):
        own = [times[index] for times in programs.values()]
        fewest = [times[0] for times in programs.values()]
        cells = [
            f"{format_ms(time.p50_ms)} "
            f"({format_ratio(ratio(least.turn_p50_ms, time.turn_p50_ms).median)})"
            for time, least in zip(own, fewest, strict=True)
        ]
        rows.append((str(first.num_threads), *cells))
    return Table(("threads", *(f"{name}, ms" for name in programs)), tuple(rows), frozenset())


def _open(path: Path, num_threads: int, descriptor: int, size: int, batch_size: int) -> Call:
    runtime = open_runtime(path, num_threads)
    batches = rotate(map_inputs(descriptor, size), batch_size)
    return lambda: runtime.infer(next(batches))
