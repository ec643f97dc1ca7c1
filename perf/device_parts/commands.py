"""pytest, and the commands of training -> what they measured, as records."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from efficientnet import PROJECT_ROOT
from efficientnet.errors import PipelineError
from efficientnet.images.sample_images import photo_crops
from efficientnet.machine.environment import num_usable_cores
from perf.device_parts.plan import Order
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

TRAIN_SIZE, TRAIN_BATCH = 300, 64
DRY_TRAIN_SIZE, DRY_TRAIN_BATCH = 32, 2
NUM_PHOTOS = 256
DRY_NUM_PHOTOS = 32

# Alike in all records of a call, and told at its start.
LEFT_OUT = ("environment", "started_at", "format_version")

log = logging.getLogger(__name__)


class CommandFailedError(PipelineError):
    """A command that has failed."""


def run_tests(order: Order) -> PytestMeasured:
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
            code = process.wait(order.seconds)
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
    seconds, turns = ("0.1", "2") if order.is_dry_run else ("5", "5")
    yield from _speed(order, "--peer", "timm", "--seconds", seconds, "--turns", turns)


def measure_loading(order: Order) -> Iterator[TrainingMeasured | LoaderMeasured]:
    """Measure the training step without and with the loader, then the loader beside timm's."""
    folder = Path(order.scratch) / "photos"
    write_photos(folder, DRY_NUM_PHOTOS if order.is_dry_run else NUM_PHOTOS)
    workers = str(1 if order.is_dry_run else num_usable_cores())
    seconds = "0.1" if order.is_dry_run else "5"
    fed = ("--data", str(folder), "--num-workers", workers, "--seconds", seconds)
    yield from _speed(order, *fed)
    size, batch = _shape(order)
    rounds, passes = ("1", "1") if order.is_dry_run else ("3", "2")
    output = Path(order.scratch) / "loader.json"
    command = ["training/loader_speed.py", str(folder), "--image-sizes", str(size)]
    command += ["--num-workers", workers, "--batch-size", str(batch)]
    _run([*command, "--rounds", rounds, "--passes", passes, "--output", str(output)])
    record = json.loads(output.read_text(encoding="utf-8"))
    yield LoaderMeasured(record=_without(record))


def write_photos(folder: Path, count: int) -> None:
    """Write crops of the sample photographs as a folder of two classes."""
    for index, (name, data) in enumerate(photo_crops(count)):
        path = folder / f"class-{index % 2}" / Path(name).name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _speed(order: Order, *flags: str) -> Iterator[TrainingMeasured]:
    size, batch = _shape(order)
    output = Path(order.scratch) / f"{order.part}.jsonl"
    command = ["training/speed.py", order.variant, "--image-sizes", str(size)]
    command += ["--batch-sizes", str(batch), "--output", str(output)]
    command += ["--precision", "fp32" if order.is_dry_run else "bf16"]
    _run([*command, *flags])
    for line in output.read_text(encoding="utf-8").splitlines():
        yield TrainingMeasured(job=order.job, record=_without(json.loads(line)))


def _shape(order: Order) -> tuple[int, int]:
    if order.is_dry_run:
        return DRY_TRAIN_SIZE, DRY_TRAIN_BATCH
    return TRAIN_SIZE, TRAIN_BATCH


def _run(command: list[str]) -> None:
    log.info("%s", " ".join(command))
    done = subprocess.run([sys.executable, *command], cwd=PROJECT_ROOT, check=False)
    if done.returncode != 0:
        raise CommandFailedError(f"{command[0]} ended with exit code {done.returncode}")


def _without(record: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in record.items() if name not in LEFT_OUT}
