"""LatencyRecords, AccuracyRecords, layers and history -> report.md, report.html and pictures."""

import gc
import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ValidationError

from efficientnet.errors import PipelineError
from efficientnet.formats.records import AccuracyRecord, LatencyRecord, read_records
from efficientnet.machine.atomic import write_bytes, write_text
from efficientnet.reporting.publishing import find_section
from efficientnet.runtimes.names import title
from perf.layer_times.layer_tables import ProgramLayers
from perf.measurements.config import ReportConfig
from perf.measurements.scenarios import SCENARIOS
from perf.pages.curves import draw_all
from perf.pages.document import MAX_LISTED, build_document
from perf.pages.history import history_lines, read_history
from perf.pages.page import PICTURE_TEXT, to_html, to_markdown
from perf.pages.page_data import page_data
from perf.pages.plots import draw
from perf.pages.publishing import PICTURE_FILE, RESULTS, publish
from perf.pages.rows import Joined, command_for_accuracy, join

log = logging.getLogger(__name__)


class ReportError(PipelineError):
    """There is nothing that may be reported."""


def main(config: ReportConfig) -> Path:
    """Join the records and write the report; return the path of report.md."""
    if config.publish:
        find_section(config.readme, RESULTS)
    with _no_collection():
        return _write_report(config)


@contextmanager
def _no_collection() -> Generator[None]:
    # Of ten thousand records none is garbage, and the collector looks at all again and again.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _write_report(config: ReportConfig) -> Path:
    problems: list[str] = []
    read = read_records(config.latency, LatencyRecord, problems)
    latencies = [record for record in read if record.scenario in SCENARIOS]
    if unknown := {record.scenario for record in read} - SCENARIOS.keys():
        problems.append(
            f"{config.latency} has records of the scenario {', '.join(sorted(unknown))}, this "
            f"program knows {', '.join(SCENARIOS)}"
        )
    accuracies = read_records(config.accuracy, AccuracyRecord, problems)
    layers = read_layers(config.layers, problems)
    for problem in problems:
        log.warning("left out: %s", problem)
    if not latencies:
        raise ReportError(
            f"no latency in {config.latency}: run 'python perf/latency.py' first"
            + (f" ({problems[0]})" if problems else "")
        )
    joined = join(latencies, accuracies)
    if not joined.groups:
        raise ReportError(
            f"no report is made of speeds alone, and {config.accuracy} has no accuracy of the "
            f"programs in {config.latency}; run: {'; '.join(_commands(joined))}"
        )
    for record in joined.unverified[:MAX_LISTED]:
        name = f"{record.variant} {title(record.runtime, record.precision)}, {record.scenario}"
        log.warning("time only, no accuracy measured: %s (%s)", name, command_for_accuracy(record))
    # A report that is published tells no folder of this machine.
    folders = {f"{path.parent}/" for path in (config.latency, config.accuracy, config.layers)}
    for folder in folders:
        problems = [problem.replace(folder, "") for problem in problems]
    document = build_document(joined, problems)
    history = read_history(config.history) if config.history else []
    lines = history_lines(sorted([*history, *latencies], key=lambda record: record.started_at))
    folder = config.latency.parent
    pictures = {PICTURE_FILE: (PICTURE_TEXT, draw(joined.groups))}
    pictures |= draw_all(joined.groups, folder, layers, lines)
    for sentence in document.verdict:
        log.info("%s", sentence)
    for name, (_, picture) in pictures.items():
        write_bytes(config.output / name, picture)
    page = to_html(document, page_data(joined, folder, lines, layers))
    write_text(config.output / "report.html", page)
    report = config.output / "report.md"
    texts = {name: text for name, (text, _) in pictures.items()}
    write_text(report, to_markdown(document, texts))
    if config.publish:
        published = config.output / "published"
        made = publish(joined, document, pictures, config.latency, published, config.readme)
        log.info("published: %s, and the table in %s", made, config.readme)
    return report


class _LayerFile(BaseModel):
    format_version: int
    programs: tuple[ProgramLayers, ...] = ()


def read_layers(path: Path, problems: list[str]) -> tuple[ProgramLayers, ...]:
    """Read what perf/layers.py wrote; a file that is not there holds none.

    Args:
        path: the file.
        problems: takes what is wrong with it, which then holds none.
    """
    if not path.exists():
        return ()
    advice = "run 'python perf/layers.py ARTIFACT' again"
    try:
        layers = _LayerFile.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        problems.append(f"{path} is damaged or holds no layers ({problem}); {advice}")
        return ()
    if layers.format_version != 1:
        problems.append(
            f"{path} has format version {layers.format_version}, this program reads 1; {advice}"
        )
        return ()
    return layers.programs


def _commands(joined: Joined) -> Sequence[str]:
    return list(dict.fromkeys(command_for_accuracy(record) for record in joined.unverified))
