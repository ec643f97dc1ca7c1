import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from commands import ROOT, help_of_all

from efficientnet.network.variant_file import write_variant_file
from efficientnet.network.variants import VARIANTS
from efficientnet.reporting.publishing import find_section

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SCRIPT = re.compile(r"(training|export|perf|serving)/\w+\.py")
FLAGS_OF_OTHERS = {"--requeue"}  # Slurm's
END_OF_COMMAND = {"&", "&&", "|", "||", ";", ">", "2>"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page: Path):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    missing = [link for link in links if "://" not in link and not exists(page, link)]
    assert not missing


def test_the_readme_has_at_most_200_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_commands_parse():
    commands = [(page, command) for page in PAGES for command in commands_of(page)]
    scripts = sorted({script for _, (script, *_) in commands if script != "make"})
    assert len(commands) > 50 and len(scripts) > 15
    absent = [script for script in scripts if not (ROOT / script).is_file()]
    assert not absent
    known = known_flags(scripts)
    assert all(known.values())
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))
    wrong: list[str] = []
    for page, (script, *words) in commands:
        if script == "make":
            problems = {word for word in words if "=" not in word} - targets
        else:
            problems = {w.partition("=")[0] for w in words if w.startswith("--")} - known[script]
            if script == "training/run.py" and words and not words[0].startswith("-"):
                problems |= {words[0]} - VARIANTS.keys() - {"VARIANT"}
        wrong += [f"{page.name}: {script} {shlex.join(words)}: {word}" for word in problems]
    # Flags that stand alone between backticks, like `--progressive.image-size 96 224`.
    ours = set[str]().union(*known.values())
    for page in PAGES:
        for flag in re.findall(r"`(--[a-z][\w.-]*)[^`]*`", prose(page)):
            if flag not in ours and flag not in FLAGS_OF_OTHERS:
                wrong.append(f"{page.name}: {flag}")
    assert not wrong


def test_a_page_has_a_place_for_what_each_command_publishes():
    sources = "".join(
        path.read_text()
        for stage in ("training", "export", "perf")
        for path in (ROOT / stage).rglob("*.py")
    )
    defaults = set(re.findall(r'readme: Path = Path\("(.*)"\)', sources))
    sections = re.findall(r'^(?:\w*SECTION|RESULTS) = "([\w-]+)"$', sources, re.M)
    assert defaults == {"docs/results.md", "docs/serving.md"} and len(sections) > 8
    for section in sections:
        (page,) = (ROOT / p for p in defaults if f"<!-- {section}: " in (ROOT / p).read_text())
        find_section(page, section)


def test_each_published_section_tells_its_commit():
    found = [
        (page.name, *match)
        for page in PAGES
        for match in re.findall(
            r"<!-- ([\w-]+): written .*? -->\n(.*?)<!-- /\1 -->", page.read_text(), re.S
        )
    ]
    assert len(found) > 20
    assert not [f"{page}: {name}" for page, name, text in found if "\nCommit" not in text]


def test_the_commands_that_take_no_time_run(tmp_path: Path):
    texts = "\n".join(page.read_text() for page in PAGES)
    commands = set(re.findall(r"(?:`|^ *)python (-m efficientnet[^`\n#]*)", texts, re.M))
    assert len(commands) > 4
    found = tmp_path / "found.json"
    write_variant_file(found, replace(VARIANTS["tiny"], name="found"), {})
    for command in commands:
        # What it saves goes where nobody looks; what it reads is what a search would have found.
        words = re.sub(r"--save \S+", f"--save {tmp_path / 'saved.json'}", command)
        words = re.sub(r"--variant-file \S+", f"--variant-file {found}", words)
        subprocess.run(
            [sys.executable, *shlex.split(words)], cwd=ROOT, capture_output=True, check=True
        )


def test_tests_that_are_named_exist():
    named = [
        match[1] for page in PAGES for match in re.finditer(r"\b(tests/\w+\.\w+)", page.read_text())
    ]
    assert named
    assert not [name for name in named if not (ROOT / name).is_file()]


def exists(page: Path, link: str) -> bool:
    name, _, anchor = link.partition("#")
    target = page.parent / name if name else page
    if not anchor:
        return target.exists()
    return target.is_file() and anchor in anchors(target)


def anchors(page: Path) -> set[str]:
    """Name a page's headings as GitHub does."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def prose(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.M | re.S)


def commands_of(page: Path) -> Iterator[list[str]]:
    """Find calls of the project's scripts and of make, in blocks of sh and between backticks."""
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```$", page.read_text(), re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]
    for line in lines:
        call = re.search(r"(^|\s)((?:\S*/)?(?:python|torchrun)\b.*|make( .*)?)$", line)
        if call is None or not (call[2].startswith("make") or SCRIPT.search(call[2])):
            continue
        words = shlex.split(call[2], comments=True)
        ends = [i for i, word in enumerate(words) if word in END_OF_COMMAND]
        words = words[: ends[0]] if ends else words
        if words[0] == "make":
            yield words
            continue
        scripts = [i for i, word in enumerate(words) if SCRIPT.fullmatch(word)]
        if scripts:
            yield words[scripts[0] :]


def known_flags(scripts: list[str]) -> dict[str, set[str]]:
    helps = help_of_all()
    return {script: set(re.findall(r"--[a-z][\w.-]*", helps[script].text)) for script in scripts}
