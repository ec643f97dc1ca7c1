"""Programs of one checkpoint -> their times, measured in turns by processes of their own."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from efficientnet import PROJECT_ROOT
from efficientnet.errors import PipelineError
from efficientnet.formats.records import LatencyRecord, read_records
from efficientnet.machine.environment import num_usable_cores
from efficientnet.measuring.clock import Call
from efficientnet.measuring.inputs import rotate
from efficientnet.measuring.turns import TimeBudget, measure_calls

Infer = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def measure(
    paths: Sequence[Path], seconds: float, turns: int, batch_size: int, data: str | None
) -> list[LatencyRecord]:
    """Measure artifacts and checkpoints with perf/latency.py; return their records in that order.

    Each in one process for some seconds, split into turns, on held-out images: of `data`, or of
    what each was trained on.
    """
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "latency.jsonl"
        # Another stage's command: stages meet on disk.
        command = [
            *(sys.executable, str(PROJECT_ROOT / "perf" / "latency.py"), *map(str, paths)),
            *("--output", str(records), "--seconds", str(seconds)),
            *("--turns", str(turns), "--processes", "1"),
            *("--batches", str(batch_size), "--scenarios", "offline"),
            *(("--data", data) if data else ()),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            raise PipelineError("perf/latency.py failed: see its message above")
        found = read_records(records, LatencyRecord)
        assert len(found) == len(paths)
        return found


def profile(
    paths: Sequence[Path], num_calls: int, batch_size: int, data: str | None
) -> list[dict[str, Any]]:
    """Return what perf/layers.py says of artifacts of ONNX Runtime on the CPU, or of OpenVINO.

    The fastest of the calls counts.
    """
    command = [
        *(sys.executable, str(PROJECT_ROOT / "perf" / "layers.py"), *map(str, paths)),
        *("--calls", str(num_calls), "--batch-size", str(batch_size), "--json"),
        *(("--data", data) if data else ()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PipelineError(f"perf/layers.py failed: {done.stderr}")
    return json.loads(done.stdout)["programs"]


def measure_callables(
    openers: Mapping[str, Callable[[], Infer]],
    images: NDArray[np.float32],
    seconds: float,
    turns: int,
    batch_size: int = 1,
) -> dict[str, tuple[float, ...]]:
    """Measure what opens in a process of its own; return the median call of each turn in ms.

    The openers are pickled. Each call takes the next `batch_size` of the images, float32
    [N, 3, H, W].
    """
    calls = {name: partial(_open_call, own, images, batch_size) for name, own in openers.items()}
    return measure_calls(calls, TimeBudget(seconds, turns))


def _open_call(opener: Callable[[], Infer], images: NDArray[np.float32], batch_size: int) -> Call:
    torch.set_num_threads(num_usable_cores())
    torch.set_flush_denormal(True)  # as the runtimes do
    infer, batches = opener(), rotate(images, batch_size)
    return lambda: infer(next(batches))
