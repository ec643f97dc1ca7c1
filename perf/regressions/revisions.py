"""Revisions -> their files, the programs that they build of a checkpoint, and their turns."""

import contextlib
import json
import os
import random
import subprocess
import sys
import tarfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from efficientnet import PROJECT_ROOT
from efficientnet.errors import PipelineError
from efficientnet.machine.children import output_of

# Of one command that builds or evaluates.
MAX_BUILD_S = 1800

PROCESS = Path(__file__).with_name("revision_process.py")

WARM_UP_TURNS = 2


class RevisionError(PipelineError):
    """A revision that is not there, or does not build or run."""


@dataclass(frozen=True)
class Revision:
    """A revision's files in a folder of their own."""

    name: str
    commit: str
    tree: Path

    def run(self, command: list[str], cwd: Path) -> str:
        """Run a command of this revision; return the last line of its stdout."""
        name, words = f"{self.name}: {command[0]}", [self.tree / command[0], *command[1:]]
        options = {"cwd": cwd, "env": self.environment}
        told = output_of(name, [sys.executable, *words], RevisionError, MAX_BUILD_S, **options)
        return told.strip().splitlines()[-1]

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which Python imports this revision and no other."""
        return {**os.environ, "PYTHONPATH": str(self.tree)}


def extract(name: str, folder: Path, repository: Path = PROJECT_ROOT) -> Revision:
    """Write a revision's files to a folder."""
    git = ("git", "-C", repository)
    words = (*git, "rev-parse", "--verify", f"{name}^{{commit}}")
    commit = output_of(f"git rev-parse {name}", words, RevisionError).strip()
    folder.mkdir(parents=True)
    archive = folder.with_suffix(".tar")
    words = (*git, "archive", "--format=tar", f"--output={archive}", commit)
    output_of("git archive", words, RevisionError)
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    archive.unlink()
    return Revision(name, commit, folder)


class Contender:
    """A process that runs one revision's program and computes only when it is asked to."""

    def __init__(self, revision: Revision, program: Path, images: Path, num_threads: int) -> None:
        self._what = f"{revision.name}, {program}"
        self._process = subprocess.Popen(
            [sys.executable, "-P", PROCESS, program, images, str(num_threads)],
            env=revision.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait(self) -> None:
        """Wait until it has opened its program."""
        self._receive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def take_turn(self, seconds: float) -> list[float]:
        """Let it compute; return its samples in ms."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(f"{seconds}\n")
            self._process.stdin.flush()
        return json.loads(self._receive())

    def _receive(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise RevisionError(
                f"{self._what}: its process ended with exit code {code}; what it said stands above"
            )
        return line


def take_turns(
    contenders: dict[str, tuple[Revision, Path]],
    images: Path,
    num_threads: int,
    num_rounds: int,
    turn_s: float,
    generator: random.Random,
) -> dict[str, list[list[float]]]:
    """Start fresh processes and let them take turns in random order; return each turn's samples."""
    samples: dict[str, list[list[float]]] = {name: [] for name in contenders}
    with ExitStack() as stack:
        names = list(contenders)
        # Whoever starts first finds other memory free.
        generator.shuffle(names)
        running = {
            name: stack.enter_context(Contender(*contenders[name], images, num_threads))
            for name in names
        }
        # They open their programs side by side: nothing is measured yet.
        for contender in running.values():
            contender.wait()
        for _ in range(WARM_UP_TURNS):
            for contender in running.values():
                contender.take_turn(turn_s)
        for _ in range(num_rounds):
            generator.shuffle(names)
            for name in names:
                samples[name].append(running[name].take_turn(turn_s))
    return samples
