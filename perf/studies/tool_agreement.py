"""Programs -> our median call and another tool's, in turns, and whether they agree."""

import logging
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from efficientnet.images.preprocess import preprocess
from efficientnet.machine.environment import current_environment, num_usable_cores
from efficientnet.measuring.clock import relative_spread
from efficientnet.measuring.programs import Program, images_for, read_programs
from efficientnet.measuring.turns import TimeBudget, take_turns
from efficientnet.reporting.publishing import Measured, find_section, publish_part
from efficientnet.reporting.tables import NOTHING, Table, format_ms, format_percent, format_ratio
from efficientnet.runtimes.names import title
from perf.measurements.measured_programs import MeasuredProgram, open_programs
from perf.measurements.program_subject import ProgramTurn
from perf.studies.config import AgreementConfig
from perf.studies.other_tools import IMAGES_FILE, IMAGES_FOLDER, OtherTool, ToolError, tool_of

SECTION = "agreement"

TOLERANCE = 0.05
MAX_OVERHEAD_MS = 0.05

# That the other tool rotates through.
NUM_IMAGES = 16

log = logging.getLogger(__name__)


class AgreementRow(BaseModel):
    """A program: the medians of each round, ours and theirs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    program_sha256: str
    tool: str | None
    """With its version; None where there is none."""
    scope: str | None
    """What a call of the tool is."""
    ours_ms: tuple[float, ...]
    theirs_ms: tuple[float, ...]
    overhead_ms: float
    """Of our harness: the median call of a runtime that computes nothing."""
    why_not: str | None
    """Why there is nothing to compare with."""

    @property
    def ratios(self) -> list[float]:
        """Ours over theirs in each round."""
        return [own / other for own, other in zip(self.ours_ms, self.theirs_ms, strict=False)]

    @property
    def verdict(self) -> str:
        """Whether the medians agree; noise of more than the tolerance decides nothing."""
        if not self.theirs_ms:
            return "not compared"
        if abs(statistics.median(self.ratios) - 1) <= TOLERANCE:
            return f"agree within {format_percent(TOLERANCE, 0)}"
        spread = max(relative_spread(self.ours_ms), relative_spread(self.theirs_ms))
        if spread > TOLERANCE:
            return f"inconclusive: rounds of one tool differ by {format_percent(spread, 0)}"
        return "differ"


class Agreement(Measured):
    """All programs of one run."""

    num_threads: int
    seconds: float
    rows: tuple[AgreementRow, ...]


def main(config: AgreementConfig) -> Agreement:
    """Measure each program with our harness and the other tool in turns."""
    if config.publish:
        find_section(config.readme, SECTION)
    started_at, num_threads = datetime.now(UTC), config.threads or num_usable_cores()
    rows: list[AgreementRow] = []
    for program in read_programs(config.paths):
        with open_programs([program], [(1,)], num_threads, config.data) as (opened,):
            rows.append(_compare(opened, config, num_threads))
        log.info("%s: %s", rows[-1].name, rows[-1].verdict)
    record = Agreement(
        environment=current_environment(),
        started_at=started_at,
        num_threads=num_threads,
        seconds=config.seconds,
        rows=tuple(rows),
    )
    log.info("%s", table_of(record).aligned_text())
    if config.publish:
        name = f"{SECTION}-{num_threads}-threads.json"
        publish_part(record, name, config.readme, SECTION, section_of)
    return record


def table_of(record: Agreement) -> Table:
    """Lay the rows out."""
    columns = ("program", "other tool", "ours ms", "theirs ms", "ours / theirs", "rounds")
    columns += ("overhead us", "verdict")
    return Table(
        columns, tuple(map(_cells, record.rows)), frozenset((*columns[:2], "rounds", "verdict"))
    )


def section_of(record: Agreement) -> str:
    """Write the table and how it was measured as Markdown."""
    scopes = {row.tool: row.scope for row in record.rows if row.tool}
    told = "; ".join(f"{tool}: {scope}" for tool, scope in scopes.items())
    worst = max(row.overhead_ms for row in record.rows)
    return (
        f"{table_of(record).markdown()}\n\n"
        f"Median call at batch 1, {record.num_threads} threads of {record.environment.processor}; "
        "ours: host memory to host memory with its checks, 256 images in rotation. "
        f"{told + '. ' if told else ''}"
        "Both take turns; ours / theirs: median of the ratios within a round, and their range. "
        f"Our harness adds {1000 * worst:.1f} us to a call at most (a runtime that computes "
        f"nothing; expected: {1000 * MAX_OVERHEAD_MS:.0f} us). {record.started_at:%Y-%m-%d} UTC."
    )


def _compare(opened: MeasuredProgram, config: AgreementConfig, num_threads: int) -> AgreementRow:
    program, tool = opened.program, tool_of(opened.program)
    budget = TimeBudget(config.seconds, config.rounds)
    for process in (opened.null, opened.process):
        process.ask("warm_up", 1, budget.window_s, budget.warm_up_s)
    why_not = tool if isinstance(tool, str) else None
    with tempfile.TemporaryDirectory(prefix="agreement-") as name:
        folder = Path(name)
        _write_images(folder, program, config.data)

        def turn(contender: str, _: int) -> float:
            if isinstance(tool, OtherTool) and contender == "theirs":
                return tool.median_ms(program, folder, budget.turn_s, num_threads)
            process, seconds = opened.process, budget.turn_s
            if contender == "null":
                process, seconds = opened.null, min(1.0, budget.turn_s)
            answer: ProgramTurn = process.ask("turn", 1, seconds)
            return answer.turn.median_ms

        own = ["null", "ours"]
        try:
            medians = take_turns(own if why_not else [*own, "theirs"], config.rounds, turn)
        except ToolError as error:
            why_not = str(error)
            log.warning("%s", error)
            medians = take_turns(own, config.rounds, turn)
    return AgreementRow(
        name=f"{program.variant} {title(program.runtime, program.precision)}",
        program_sha256=program.program_sha256,
        tool=f"{tool.name} {tool.version}" if isinstance(tool, OtherTool) else None,
        scope=tool.scope if isinstance(tool, OtherTool) else None,
        ours_ms=tuple(medians["ours"]),
        theirs_ms=tuple(medians.get("theirs", ())),
        overhead_ms=statistics.median(medians["null"]),
        why_not=why_not,
    )


def _write_images(folder: Path, program: Program, data: str | None) -> None:
    samples = images_for(program, data).val[:NUM_IMAGES]
    images = np.stack([preprocess(sample.read(), program.preprocess) for sample in samples])
    np.save(folder / IMAGES_FILE, images)
    (folder / IMAGES_FOLDER).mkdir()
    for number in range(len(images)):
        np.save(folder / IMAGES_FOLDER / f"{number:03d}.npy", images[number : number + 1])


def _cells(row: AgreementRow) -> tuple[str, ...]:
    theirs, ratio, rounds = (NOTHING,) * 3
    if ratios := row.ratios:
        theirs = format_ms(statistics.median(row.theirs_ms))
        ratio = format_ratio(statistics.median(ratios))
        rounds = f"{format_ratio(min(ratios))} to {format_ratio(max(ratios))}"
    return (
        *(row.name, row.tool or NOTHING, format_ms(statistics.median(row.ours_ms))),
        *(theirs, ratio, rounds, f"{1000 * row.overhead_ms:.1f}"),
        row.verdict if row.why_not is None else f"not compared: {row.why_not}",
    )
