"""LatencyRecords and AccuracyRecords -> report.md, report.html and latency.png."""

import logging
from collections.abc import Sequence
from pathlib import Path

from efficientnet.errors import PipelineError
from efficientnet.formats.records import AccuracyRecord, LatencyRecord, read_records
from efficientnet.machine.atomic import write_bytes, write_text
from efficientnet.runtimes.names import title
from perf.measurements.config import ReportConfig
from perf.measurements.scenarios import SCENARIOS
from perf.pages.document import build_document
from perf.pages.page import to_html, to_markdown
from perf.pages.plots import DARK, LIGHT, draw
from perf.pages.publishing import PICTURE_FILE, publish
from perf.pages.rows import Joined, command_for_accuracy, join

log = logging.getLogger(__name__)


class ReportError(PipelineError):
    """There is nothing that may be reported."""


def main(config: ReportConfig) -> Path:
    """Join the records and write the report; return the path of report.md."""
    latencies = read_records(config.latency, LatencyRecord)
    if not latencies:
        raise ReportError(f"no latency in {config.latency}: run 'python perf/latency.py' first")
    if unknown := {record.scenario for record in latencies} - SCENARIOS.keys():
        raise ReportError(
            f"{config.latency} has records of the scenario {', '.join(sorted(unknown))}, this "
            f"program knows {', '.join(SCENARIOS)}; move the file away and measure again"
        )
    joined = join(latencies, read_records(config.accuracy, AccuracyRecord))
    if not joined.groups:
        raise ReportError(
            f"no speed is reported without its accuracy, and {config.accuracy} has none of the "
            f"programs in {config.latency}; run: {'; '.join(_commands(joined))}"
        )
    for record in joined.left_out:
        name = f"{record.variant} {title(record.runtime, record.precision)}, {record.scenario}"
        log.warning("left out, no accuracy measured: %s (%s)", name, command_for_accuracy(record))
    document = build_document(joined)
    picture = draw(joined.groups, LIGHT)
    page = to_html(document, picture, draw(joined.groups, DARK))
    for sentence in document.verdict:
        log.info("%s", sentence)
    write_bytes(config.output / PICTURE_FILE, picture)
    write_text(config.output / "report.html", page)
    report = config.output / "report.md"
    write_text(report, to_markdown(document, PICTURE_FILE))
    if config.publish:
        published = config.output / "published"
        made = publish(joined, document, picture, config.latency, published, config.readme)
        log.info("published: %s, and the table in %s", made, config.readme)
    return report


def _commands(joined: Joined) -> Sequence[str]:
    return list(dict.fromkeys(command_for_accuracy(record) for record in joined.left_out))
