"""A report's document -> Markdown, and one HTML page that needs nothing beside it."""

import html
import re
from collections.abc import Mapping
from pathlib import Path

from efficientnet.reporting.tables import Table
from perf.pages.document import Document, Section

HERE = Path(__file__).resolve().parent

PICTURE_TEXT = "Time of a call at batch 1 and images a second at the best batch size, by row"


def to_markdown(document: Document, pictures: Mapping[str, str]) -> str:
    """Write the document as Markdown.

    Args:
        document: what stands in it.
        pictures: the text of each by its path relative to the file; the first goes on top.
    """
    first, *others = (f"![{text}]({path})" for path, text in pictures.items())
    parts = [f"# {document.heading}", document.subtitle]
    parts += [f"**{sentence}**" for sentence in document.verdict]
    parts.append(first)
    for section in document.sections:
        parts.append(f"## {section.heading}")
        parts += section.paragraphs
        if section.bullets:
            parts.append("\n".join(f"- {bullet}" for bullet in section.bullets))
        if section.table:
            parts.append(section.table.markdown())
    if others:
        parts += ["## Pictures", *others]
    return "\n\n".join(parts) + "\n"


def to_html(document: Document, data: str) -> str:
    """Write the document as one page with its style, its script and the script's data inside.

    Args:
        document: what stands in it without a script, but for the rows.
        data: of page_data.
    """
    verdict = "".join(f"<p>{_inline(sentence)}</p>" for sentence in document.verdict)
    sections = "\n".join(
        _section_html(section) for section in document.sections if not section.is_rows
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(document.heading)}</title>
<link rel="icon" href="data:,">
<style>{(HERE / "page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
<h1>{html.escape(document.heading)}</h1>
<p class="subtitle">{_inline(document.subtitle)}</p>
<div class="verdict">{verdict}</div>
<noscript><p>The rows need JavaScript; report.md beside this page has them as tables.</p></noscript>
{(HERE / "page.html").read_text(encoding="utf-8")}
{sections}
</main>
<script type="application/json" id="data">{data}</script>
<script>{(HERE / "page.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""


def _section_html(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.heading)}</h2>"]
    parts += [f"<p>{_inline(paragraph)}</p>" for paragraph in section.paragraphs]
    if section.bullets:
        parts.append(f"<ul>{''.join(f'<li>{_inline(b)}</li>' for b in section.bullets)}</ul>")
    if section.table:
        parts.append(_table_html(section.table))
    return "\n".join(parts)


def _table_html(table: Table) -> str:
    kinds = [' class="word"' if title in table.words else "" for title in table.columns]
    titles = [html.escape(title) for title in table.columns]
    # A table of names and values needs no line of titles.
    is_facts = not table.columns[0]
    head = "".join(f"<th{kind}>{title}</th>" for kind, title in zip(kinds, titles, strict=True))
    body = "\n".join(
        "<tr>"
        + "".join(
            f'<td{kind} data-title="{title}">{_inline(cell)}</td>'
            for kind, title, cell in zip(kinds, titles, row, strict=True)
        )
        + "</tr>"
        for row in table.rows
    )
    notes = "".join(f'<p class="note">{_inline(note)}</p>' for note in table.notes)
    opening = '<table class="facts">' if is_facts else f"<table><thead><tr>{head}</tr></thead>"
    return f'<div class="box">{opening}<tbody>{body}</tbody></table></div>{notes}'


def _inline(text: str) -> str:
    escaped = html.escape(text).replace(" %", "&nbsp;%")
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
