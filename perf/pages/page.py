"""A report's document -> Markdown, and one HTML page that needs nothing beside it."""

import base64
import html
import re

from efficientnet.reporting.tables import Table
from perf.pages.document import Document, Section

PICTURE_TEXT = "Time of a call at batch 1 and images a second at the best batch size, by row"

STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --muted: #59636e; --page: #f6f8fa;
  --card: #ffffff; --line: #d8dee4; --accent: #0b62c4; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --muted: #9da7b1; --page: #0d1117;
  --card: #161b22; --line: #30363d; --accent: #58a6ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.25; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.2rem; line-height: 1.35; }
.subtitle { margin: .35rem 0 0; color: var(--muted); }
.verdict { margin: 1.5rem 0; padding: .9rem 1.25rem; border-left: 4px solid var(--accent);
  border-radius: 0 8px 8px 0; background: var(--card); font-size: 1.1rem; }
.verdict p { margin: .35rem 0; }
figure { margin: 1.5rem 0; padding: 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
figure img { display: block; width: 100%; max-width: 38rem; height: auto; margin: 0 auto; }
.box { overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
table { width: 100%; border-collapse: collapse; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .6rem; text-align: right; vertical-align: top; white-space: nowrap; }
th { color: var(--muted); font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { padding-left: 1rem; }
th:last-child, td:last-child { padding-right: 1rem; }
td { border-top: 1px solid var(--line); }
th.word, td.word { text-align: left; }
.facts td.word:first-child { color: var(--muted); }
.facts td.word + td.word { white-space: normal; overflow-wrap: anywhere; width: 100%; }
.note { margin: .5rem 0 0; color: var(--muted); font-size: .875rem; }
code { padding: .1em .35em; border-radius: 4px; background: var(--page); font-size: .875em;
  overflow-wrap: anywhere; border: 1px solid var(--line); }
ul { margin: 0; padding-left: 1.25rem; }
li { margin: .35rem 0; overflow-wrap: anywhere; }
@media (max-width: 46rem) {
  main { padding: 1.25rem .9rem 3rem; }
  figure { padding: .5rem; }
  .box { overflow: visible; background: none; border: 0; }
  .box table, .box tbody { display: block; }
  .box thead { display: none; }
  .box tr { display: grid; grid-template-columns: repeat(3, 1fr); gap: .6rem .75rem;
    margin: 0 0 .75rem; padding: .75rem .9rem; background: var(--card);
    border: 1px solid var(--line); border-radius: 8px; }
  .box td, .box td.word { padding: 0; border: 0; text-align: left; white-space: normal;
    overflow-wrap: anywhere; font-size: .95rem; line-height: 1.35; }
  .box td::before { content: attr(data-title); display: block; color: var(--muted);
    font-size: .75rem; }
  .box .facts tr { display: block; margin: 0; padding: .5rem .9rem; border-radius: 0;
    border-width: 0 1px 1px; }
  .box .facts tr:first-child { border-width: 1px; border-radius: 8px 8px 0 0; }
  .box .facts tr:last-child { border-radius: 0 0 8px 8px; }
  .box .facts td::before { content: none; }
  .box .facts td { display: block; }
  .box .facts td.word:first-child { font-size: .75rem; }
}
"""


def to_markdown(document: Document, picture: str) -> str:
    """Write the document as Markdown; `picture` is a path relative to it."""
    parts = [f"# {document.heading}", document.subtitle]
    parts += [f"**{sentence}**" for sentence in document.verdict]
    parts.append(f"![{PICTURE_TEXT}]({picture})")
    for section in document.sections:
        parts.append(f"## {section.heading}")
        parts += section.paragraphs
        if section.bullets:
            parts.append("\n".join(f"- {bullet}" for bullet in section.bullets))
        if section.table:
            parts.append(section.table.markdown())
    return "\n\n".join(parts) + "\n"


def to_html(document: Document, light_picture: bytes, dark_picture: bytes) -> str:
    """Write the document as one page with its style and both pictures (PNG) inside."""
    verdict = "".join(f"<p>{_inline(sentence)}</p>" for sentence in document.verdict)
    sections = "\n".join(_section_html(section) for section in document.sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(document.heading)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{html.escape(document.heading)}</h1>
<p class="subtitle">{_inline(document.subtitle)}</p>
<div class="verdict">{verdict}</div>
<figure><picture>
<source media="(prefers-color-scheme: dark)" srcset="{_data_uri(dark_picture)}">
<img src="{_data_uri(light_picture)}" alt="{html.escape(PICTURE_TEXT)}">
</picture></figure>
{sections}
</main>
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


def _data_uri(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"
