"""Measurements -> their place in reports/published/, and a section of docs/results.md."""

import logging
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict

from efficientnet.errors import PipelineError
from efficientnet.formats.records import Record, read_records
from efficientnet.machine.atomic import write_text
from efficientnet.machine.environment import EnvironmentRecord

PUBLISHED = Path("reports/published")


log = logging.getLogger(__name__)


class Measured(BaseModel):
    """A record of what was measured, when and on what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    environment: EnvironmentRecord
    started_at: AwareDatetime


Part = TypeVar("Part", bound=Measured)


class PublishError(PipelineError):
    """A report that cannot be published: no place in docs/results.md, or a file is missing."""


def published_directory(
    started_at: datetime, environments: Iterable[EnvironmentRecord], published: Path = PUBLISHED
) -> Path:
    """Return the place of what was measured on a day and on some machines."""
    return published / f"{started_at:%Y-%m-%d}-{device_slug(environments)}"


def device_slug(environments: Iterable[EnvironmentRecord]) -> str:
    """Name the devices for a directory: lower case words with hyphens."""
    return "+".join(sorted({_slug(environment) for environment in environments}))


def find_section(readme: Path, name: str) -> tuple[str, str]:
    """Return what stands before and after a section's text, with the lines that mark it."""
    if not readme.is_file():
        raise PublishError(f"there is no {readme} to write the table into")
    text = readme.read_text(encoding="utf-8")
    found = re.search(rf"<!-- {name}: [^\n]* -->\n(?s:.*?)(<!-- /{name} -->)", text)
    if found is None:
        raise PublishError(
            f"{readme} has no place for the table; add these two lines where it belongs: "
            f"'<!-- {name}: written by a command -->' and '<!-- /{name} -->'"
        )
    return text[: text.index("\n", found.start()) + 1], text[found.start(1) :]


def write_section(
    readme: Path, name: str, body: str, environments: Iterable[EnvironmentRecord]
) -> None:
    """Put text between a section's marks, in the place of what was there, and the commits below."""
    before, after = find_section(readme, name)
    write_text(readme, f"{before}\n{body.strip()}\n\n{commits_line(environments)}\n\n{after}")


def commits_line(environments: Iterable[EnvironmentRecord]) -> str:
    """Tell what the project was when something was measured."""
    commits = list(dict.fromkeys(one.git_commit or "unknown" for one in environments))
    return f"Commit{'s' * (len(commits) > 1)}: {', '.join(commits)}."


def publish_record(
    record: Measured, name: str, readme: Path, section: str, text: str, title: str | None = None
) -> Path:
    """Write a record to its place, and its text into docs/results.md; return the record's file.

    With a title the text is written beside the record, too.
    """
    path = published_directory(record.started_at, [record.environment]) / name
    write_section(readme, section, text, [record.environment])
    if title is not None:
        write_text(path.with_suffix(".md"), f"# {title}\n\n{text}")
    write_text(path, record.model_dump_json(indent=1) + "\n")
    log.info("published: %s, and the table in %s", path, readme)
    return path


def publish_part(
    record: Part, name: str, readme: Path, section: str, render: Callable[[Part], str]
) -> None:
    """Write a record to its place, and its section, with the newest of each on this device.

    A part measured on another day stays in the section: one published anew replaces only its own.
    """
    device = [record.environment]
    folder = published_directory(record.started_at, device)
    write_text(folder / name, record.model_dump_json(indent=1) + "\n")
    files = sorted(PUBLISHED.glob(f"????-??-??-{device_slug(device)}/{section}-*.json"))
    newest = {file.name: file for file in files}
    texts = [file.read_text(encoding="utf-8") for _, file in sorted(newest.items())]
    parts = [type(record).model_validate_json(text) for text in texts]
    environments = [part.environment for part in parts]
    write_section(readme, section, "\n\n".join(map(render, parts)), environments)


def read_all(path: Path, kind: type[Record]) -> list[Record]:
    """Read a file of records and those that are published under the same name, oldest first.

    Raises:
        ValueError: `path` is damaged or of another format; a published file is left out instead,
            and that is logged.
    """
    records = read_records(path, kind)
    for file in sorted(PUBLISHED.glob(f"*/{path.name}")):
        try:
            records += read_records(file, kind)
        except ValueError as error:
            log.warning("left out: %s", error)
    # A published record may be in the other file, too.
    different = {record.model_dump_json(): record for record in records}
    return sorted(different.values(), key=lambda record: record.started_at)


def _slug(environment: EnvironmentRecord) -> str:
    device = environment.gpus[0].partition(",")[0] if environment.gpus else environment.cpu
    plain = re.sub(r"\((r|tm)\)|@.*|\b(cpu|processor|\d+-core)\b", " ", device.lower())
    name = "-".join(re.findall(r"[a-z0-9]+", plain)) or "unknown"
    if environment.gpus:
        return name
    return "-".join((name, *environment.instruction_sets, str(environment.num_cores), "cores"))
