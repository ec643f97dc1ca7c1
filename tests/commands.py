"""The project's commands -> what they print, and their exit codes."""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from processes import fork
from quick import hold_contenders_here, tell_peaks

ROOT = Path(__file__).resolve().parents[1]

# What others start is no command of its own.
STARTED = {"supervisor", "decoding_process"}
COMMANDS = [
    f"{path.parent.name}/{path.name}"
    for stage in ("training", "export", "perf", "serving")
    for path in sorted((ROOT / stage).glob("*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8") and path.stem not in STARTED
]

# All in one process: what they share is imported once. training/run.py has a help of each variant.
SHOW_ALL = """
import contextlib, io, json, runpy, sys
helps = {}
for command in sys.argv[1:]:
    sys.path[0] = command.rpartition("/")[0]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for words in [[], ["v2-s"]] if command == "training/run.py" else [[]]:
            sys.argv = [command, *words, "--help"]
            try:
                runpy.run_path(command, run_name="__main__")
            except SystemExit as end:
                assert not end.code, command
    helps[command] = out.getvalue(), "torch" in sys.modules
print(json.dumps(helps))
"""


class Help(NamedTuple):
    """What a command prints for --help, and whether it, or one before it, loaded torch for it."""

    text: str
    has_torch: bool


@cache
def help_of_all() -> dict[str, Help]:
    """Return the help of each of COMMANDS."""
    done = subprocess.run(
        [sys.executable, "-c", SHOW_ALL, *COMMANDS],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return {command: Help(*told) for command, told in json.loads(done.stdout).items()}


class Done(NamedTuple):
    """What a command has left."""

    returncode: int | None
    stdout: str
    stderr: str


class Running(NamedTuple):
    """A command under way."""

    process: BaseProcess
    stdout: Path
    stderr: Path


@contextmanager
def started(
    command: str | Path, *arguments: object, cwd: Path = ROOT, has_contenders: bool = False
) -> Iterator[Running]:
    """Start a command as `python command` would, without the seconds that its libraries take.

    Nor does it measure this processor; and without `has_contenders` what it compares is in its own
    process, see quick.py. When the block ends it is killed.
    """
    with tempfile.TemporaryDirectory() as name:
        streams = Path(name, "stdout"), Path(name, "stderr")
        for stream in streams:
            stream.touch()
        words = [str(ROOT / command), *map(str, arguments)]
        process = fork(_become, words, cwd, streams, has_contenders)
        try:
            yield Running(process, *streams)
        finally:
            process.kill()
            process.join()


def run(command: str | Path, *arguments: object, **how: Any) -> Done:
    """Run a command to its end; see `started`."""
    with started(command, *arguments, **how) as running:
        running.process.join(600)
        return Done(
            running.process.exitcode, running.stdout.read_text(), running.stderr.read_text()
        )


def _become(words: list[str], cwd: Path, streams: tuple[Path, Path], has_contenders: bool) -> None:
    for number, stream in enumerate(streams, 1):
        os.dup2(os.open(stream, os.O_WRONLY), number)
    os.chdir(cwd)
    tell_peaks()
    if not has_contenders:
        hold_contenders_here()
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    # The loader's workers are forks of this process, as in the command, and end with it.
    multiprocessing.set_start_method(None, force=True)
    runpy.run_path(words[0], run_name="__main__")
