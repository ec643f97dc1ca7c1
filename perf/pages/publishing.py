"""A report and its records -> reports/published/<date>-<device>/, and tables in docs/results.md."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from efficientnet.formats.records import LatencyRecord
from efficientnet.machine.atomic import replaced_directory
from efficientnet.reporting.publishing import (
    PublishError,
    published_directory,
    write_section,
)
from perf.pages.document import TIME_ONLY, Document, time_only_table
from perf.pages.latency_tables import result_tables
from perf.pages.page import PICTURE_TEXT, to_markdown
from perf.pages.rows import Joined, Row

RESULTS = "results"
PICTURE_FILE = "latency.png"
REPORT_FILE = "report.md"


def publish(
    joined: Joined,
    document: Document,
    pictures: Mapping[str, tuple[str, bytes]],
    latency_path: Path,
    published: Path,
    readme: Path,
) -> Path:
    """Write the report's own directory and the table in docs/results.md; return the directory."""
    shown = _shown(joined)
    newest = max(record.started_at for record in shown)
    environments = [group.environment for group in joined.groups]
    directory = published_directory(newest, environments, published)
    used = _used_records(joined)
    samples = [latency_path.parent / s for s in _sample_files(shown)]
    for path in samples:
        if not path.is_file():
            raise PublishError(f"the samples {path} are missing; measure again")
    with replaced_directory(directory) as fresh:
        # What other commands published of the same day and machine stays.
        for path in directory.glob("*") if directory.is_dir() else ():
            if path.name not in (*used, *pictures, REPORT_FILE) and path.suffix != ".npy":
                shutil.copyfile(path, fresh / path.name)
        for name, lines in used.items():
            (fresh / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        for path in samples:
            shutil.copyfile(path, fresh / path.name)
        for name, (_, picture) in pictures.items():
            (fresh / name).write_bytes(picture)
        texts = {name: text for name, (text, _) in pictures.items()}
        (fresh / REPORT_FILE).write_text(to_markdown(document, texts), encoding="utf-8")
    link = Path(os.path.relpath(directory, readme.parent)).as_posix()
    text = readme_results(joined, document, link)
    write_section(readme, RESULTS, text, [record.environment for record in shown])
    return directory


def readme_results(joined: Joined, document: Document, link: str) -> str:
    """Write what stands in docs/results.md: verdict, tables, picture and where the rest is."""
    parts = list(document.verdict)
    for group in joined.groups:
        for heading, table in result_tables(group):
            parts += [f"**{heading}**", table.markdown()]
    if joined.unverified:
        parts += [f"**{TIME_ONLY}**", time_only_table(joined.unverified).markdown()]
    parts.append(f"![{PICTURE_TEXT}]({link}/{PICTURE_FILE})")
    subtitle = document.subtitle[0].upper() + document.subtitle[1:]
    parts.append(
        f"{subtitle}. [How it was measured, the environment, and all samples]({link}/report.md)."
    )
    return "\n\n".join(parts)


def _used_records(joined: Joined) -> dict[str, list[str]]:
    """Collect the lines of the published records: those shown, and their eager references."""
    shown = _shown(joined)
    accuracies = [row.accuracy for row in _rows(joined)]
    return {
        "latency.jsonl": list(dict.fromkeys(record.model_dump_json() for record in shown)),
        "accuracy.jsonl": list(dict.fromkeys(record.model_dump_json() for record in accuracies)),
    }


def _sample_files(records: Sequence[LatencyRecord]) -> list[str]:
    names = [record.samples_ms for record in records if isinstance(record.samples_ms, str)]
    return list(dict.fromkeys(names))


def _shown(joined: Joined) -> list[LatencyRecord]:
    return [*(row.latency for row in _rows(joined)), *joined.unverified]


def _rows(joined: Joined) -> list[Row]:
    rows = [row for group in joined.groups for row in group.rows]
    return [*rows, *(row.eager for row in rows if row.eager)]
