"""A report and its records -> reports/published/<date>-<device>/, and tables in docs/results.md."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from efficientnet.machine.atomic import replaced_directory
from efficientnet.reporting.publishing import (
    PublishError,
    published_directory,
    write_section,
)
from perf.pages.document import Document
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
    rows = [row for group in joined.groups for row in group.rows]
    newest = max(row.latency.started_at for row in rows)
    environments = [group.environment for group in joined.groups]
    directory = published_directory(newest, environments, published)
    used = _used_records(rows)
    samples = [latency_path.parent / s for s in _sample_files(rows)]
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
    write_section(readme, RESULTS, text, [row.latency.environment for row in rows])
    return directory


def readme_results(joined: Joined, document: Document, link: str) -> str:
    """Write what stands in docs/results.md: verdict, tables, picture and where the rest is."""
    parts = list(document.verdict)
    for group in joined.groups:
        for heading, table in result_tables(group):
            parts += [f"**{heading}**", table.markdown()]
    parts.append(f"![{PICTURE_TEXT}]({link}/{PICTURE_FILE})")
    subtitle = document.subtitle[0].upper() + document.subtitle[1:]
    parts.append(
        f"{subtitle}. [How it was measured, the environment, and all samples]({link}/report.md)."
    )
    return "\n\n".join(parts)


def _used_records(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Collect the lines of the published records: those shown, and their eager references."""
    all_rows = [*rows, *(row.eager for row in rows if row.eager)]
    return {
        "latency.jsonl": list(dict.fromkeys(r.latency.model_dump_json() for r in all_rows)),
        "accuracy.jsonl": list(dict.fromkeys(r.accuracy.model_dump_json() for r in all_rows)),
    }


def _sample_files(rows: Sequence[Row]) -> list[str]:
    all_rows = [*rows, *(row.eager for row in rows if row.eager)]
    names = dict.fromkeys(
        r.latency.samples_ms for r in all_rows if isinstance(r.latency.samples_ms, str)
    )
    return [name for name in names if isinstance(name, str)]
