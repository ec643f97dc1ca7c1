"""pytest, and the commands of training -> what they measured, as records."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from efficientnet import PROJECT_ROOT
from efficientnet.errors import PipelineError
from efficientnet.images.sample_images import photo_crops
from efficientnet.machine.environment import num_usable_cores
from perf.device_parts.order import Order
from perf.device_parts.records import LoaderMeasured, PytestMeasured, TrainingMeasured

JUNIT_FILE = "tests.xml"

# What files say that have tests for a GPU.
GPU_MARK = "mark.gpu"
DRY_TEST_FILES = ("tests/test_squeeze_excite_kernel.py",)

OUTCOME = re.compile(
    r"^(tests/.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b"
    r"|^(ERROR) (tests/\S+)"
)
NUM_LAST_LINES = 60

NO_TESTS = 5

# Alike in all records of a call, and told at its start.
LEFT_OUT = ("environment", "started_at", "format_version")

log = logging.getLogger(__name__)


class CommandFailedError(PipelineError):
    """A command that has failed."""


def run_tests(order: Order, seconds: float) -> PytestMeasured:
    """Run the tests that need a GPU, as far as the time goes."""
    files = [
        str(path.relative_to(PROJECT_ROOT))
        for path in sorted((PROJECT_ROOT / "tests").glob("test_*.py"))
        if GPU_MARK in path.read_text(encoding="utf-8")
    ]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--color=no", "-rfE"]
    command += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command += [f"--junitxml={Path(order.output) / JUNIT_FILE}"]
    command += DRY_TEST_FILES if order.is_dry_run else files
    log.info("%s", " ".join(command[1:]))
    # Into a file: what a test has started may outlive it, and would keep a pipe open.
    printed = Path(order.scratch) / "pytest.txt"
    with printed.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=PROJECT_ROOT,
            env=os.environ | {"COLUMNS": "200"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    lines = printed.read_text(encoding="utf-8", errors="replace").splitlines()
    outcomes: dict[str, str] = {}
    for line in lines:
        if found := OUTCOME.match(line):
            test, outcome = (found[1], found[2]) if found[1] else (found[4], found[3])
            outcomes[test] = outcome.lower()
    if code >= NO_TESTS or (code > 1 and not outcomes):
        raise CommandFailedError(f"pytest ended with code {code}: {' / '.join(lines[-3:])}")
    return PytestMeasured(
        outcomes=outcomes, last_lines=tuple(lines[-NUM_LAST_LINES:]), is_complete=code >= 0
    )


def measure_training(order: Order) -> Iterator[TrainingMeasured]:
    """Measure our training step, timm's, and timm's again, in turns."""
    yield from _speed(order, "--peer", "timm", "--turns", order.scale.pace.num_turns)


def measure_loading(order: Order) -> Iterator[TrainingMeasured | LoaderMeasured]:
    """Measure the training step without and with the loader, then the loader beside timm's."""
    folder, scale = Path(order.scratch) / "photos", order.scale
    write_photos(folder, scale.num_photos)
    workers = 1 if order.is_dry_run else num_usable_cores()
    yield from _speed(order, "--data", folder, "--num-workers", workers)
    words = ("training/loader_speed.py", folder, "--image-sizes", scale.train_size)
    words += ("--batch-size", scale.train_batch, "--num-workers", workers)
    words += ("--rounds", scale.loader_rounds, "--passes", 2)
    yield LoaderMeasured(record=_record(_run(order, *words)))


def write_photos(folder: Path, count: int) -> None:
    """Write crops of the sample photographs as a folder of two classes."""
    for index, (name, data) in enumerate(photo_crops(count)):
        path = folder / f"class-{index % 2}" / Path(name).name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _speed(order: Order, *flags: object) -> Iterator[TrainingMeasured]:
    scale = order.scale
    sizes = ("--image-sizes", scale.train_size, "--batch-sizes", scale.train_batch)
    how = ("--precision", scale.train_precision, "--seconds", scale.train_s)
    words = ("training/speed.py", order.variant, *sizes, *how, *flags)
    for line in _run(order, *words).splitlines():
        yield TrainingMeasured(job=order.job, record=_record(line))


def _run(order: Order, *words: object) -> str:
    # Returns what a command of this project has written.
    output = Path(order.scratch) / f"{order.job} {Path(str(words[0])).stem}"
    command = [*map(str, words), "--output", str(output)]
    log.info("%s", " ".join(command))
    done = subprocess.run([sys.executable, *command], cwd=PROJECT_ROOT, check=False)
    if done.returncode != 0:
        raise CommandFailedError(f"{command[0]} ended with exit code {done.returncode}")
    return output.read_text(encoding="utf-8")


def _record(text: str) -> dict[str, Any]:
    return {name: value for name, value in json.loads(text).items() if name not in LEFT_OUT}
