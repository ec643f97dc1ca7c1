"""Programs of one checkpoint -> their times, measured in turns by processes of their own."""

import contextlib
import gc
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from efficientnet import PROJECT_ROOT
from efficientnet.errors import PipelineError
from efficientnet.formats.records import LatencyRecord, read_records
from efficientnet.machine.children import obey_parent
from efficientnet.machine.environment import num_usable_cores

Infer = Callable[[NDArray[np.float32]], NDArray[np.float32]]

# The first calls of a turn find the caches and the threads as another process left them.
SETTLING_FRACTION = 0.05


def measure(
    paths: Sequence[Path], seconds: float, turns: int, batch_size: int, data: str | None
) -> list[LatencyRecord]:
    """Measure all programs with perf/latency.py; return their records in the order of the paths.

    Args:
        paths: artifact and checkpoint directories.
        seconds: measured time of each.
        turns: that this time is split into.
        batch_size: images in a call.
        data: held-out images; None = those of what each was trained on.

    Raises:
        PipelineError: the command failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "latency.jsonl"
        # Another stage's command: stages meet on disk.
        command = [
            *(sys.executable, str(PROJECT_ROOT / "perf" / "latency.py"), *map(str, paths)),
            *("--output", str(records), "--seconds", str(seconds)),
            *("--turns", str(turns), "--batches", str(batch_size), "--scenarios", "offline"),
            *(("--data", data) if data else ()),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            raise PipelineError("perf/latency.py failed: see its message above")
        found = read_records(records, LatencyRecord)
        assert len(found) == len(paths)
        return found


def profile_modules(
    paths: Sequence[Path], num_calls: int, batch_size: int, data: str | None
) -> list[dict[str, float]]:
    """Profile artifacts with perf/layers.py; return the ms of each module, one dict a path.

    Args:
        paths: artifacts of ONNX Runtime on the CPU, or of OpenVINO.
        num_calls: of which the fastest counts.
        batch_size: images in a call.
        data: held-out images; None = those of what each was trained on.

    Raises:
        PipelineError: the command failed.
    """
    command = [
        *(sys.executable, str(PROJECT_ROOT / "perf" / "layers.py"), *map(str, paths)),
        *("--calls", str(num_calls), "--batch-size", str(batch_size), "--json"),
        *(("--data", data) if data else ()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PipelineError(f"perf/layers.py failed: {done.stderr}")
    found: list[dict[str, float]] = []
    for program in json.loads(done.stdout)["programs"]:
        times: dict[str, float] = defaultdict(float)
        for layer in program["layers"]:
            times[layer["module"]] += layer["ms"]
        found.append(times)
    return found


def measure_callables(
    openers: Mapping[str, Callable[[], Infer]],
    images: NDArray[np.float32],
    seconds: float,
    turns: int,
    batch_size: int = 1,
) -> dict[str, tuple[float, ...]]:
    """Measure what opens in a process of its own; return the median call of each turn in ms.

    Args:
        openers: by name, what opens a program; to be pickled.
        images: [N, 3, H, W], which the calls rotate through.
        seconds: measured time of each, without a first turn that does not count.
        turns: that this time is split into.
        batch_size: images in a call, at most N.

    Raises:
        PipelineError: a process died.
    """
    medians: dict[str, list[float]] = {name: [] for name in openers}
    with ExitStack() as stack:
        contenders = {
            name: stack.enter_context(_Contender(name, opener, images, batch_size))
            for name, opener in openers.items()
        }
        for contender in contenders.values():
            contender.ask(seconds / turns)
        for turn in range(turns):
            # There and back: a machine that gets slower or faster meanwhile favors nobody.
            order = list(openers) if turn % 2 == 0 else list(openers)[::-1]
            for name in order:
                medians[name].append(contenders[name].ask(seconds / turns))
    return {name: tuple(values) for name, values in medians.items()}


class _Contender:
    # A process that computes only when it is asked to.
    def __init__(
        self, name: str, opener: Callable[[], Infer], images: NDArray[np.float32], batch_size: int
    ) -> None:
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, opener, batch_size)
        self._process = context.Process(target=_contend, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self._send(images)

    def __enter__(self) -> "_Contender":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()

    def ask(self, seconds: float) -> float:
        """Let it compute for some seconds; return the median of a call in ms."""
        self._send(seconds)
        try:
            return self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise PipelineError(
                f"the process that measures {self._name} died with exit code "
                f"{self._process.exitcode}: see its message above"
            ) from None

    def _send(self, message: object) -> None:
        # A process that died is noticed by the next answer that does not come.
        with contextlib.suppress(ConnectionError):
            self._connection.send(message)


def _contend(connection: Connection, opener: Callable[[], Infer], batch_size: int) -> None:
    obey_parent()
    torch.set_num_threads(num_usable_cores())
    torch.set_flush_denormal(True)  # as the runtimes do
    images: NDArray[np.float32] = connection.recv()
    infer = opener()
    gc.disable()
    while True:
        try:
            seconds: float = connection.recv()
        except EOFError:
            return
        connection.send(_median_call_ms(infer, images, batch_size, seconds))


def _median_call_ms(
    infer: Infer, images: NDArray[np.float32], batch_size: int, seconds: float
) -> float:
    samples_ns: list[int] = []
    started = time.perf_counter_ns()
    settled, end = (started + round(s * 1e9) for s in (seconds * SETTLING_FRACTION, seconds))
    number, before = 0, started
    while before < end or not samples_ns:
        start = number * batch_size % (len(images) - batch_size + 1)
        batch = images[start : start + batch_size]
        before = time.perf_counter_ns()
        infer(batch)
        after = time.perf_counter_ns()
        if number > 0 and before >= settled:
            samples_ns.append(after - before)
        number, before = number + 1, after
    return statistics.median(samples_ns) / 1e6
