"""Training in processes of its own that can be killed, without each importing torch anew."""

import itertools
import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from processes import fork
from small_trainings import cut_digits

from efficientnet.images import datasets
from training.learning import memory
from training.learning.step import TrainStep
from training.recipe.config import TrainConfig
from training.running import report
from training.running import run_folder as rundir
from training.running.begin_run import main
from training.running.command_line import ResumeConfig

# Of a run, what depends on how long something took.
TIMES = {"elapsed_s", "seconds", "images_per_s", "peak_memory_bytes"}


def start(
    config: TrainConfig | ResumeConfig,
    prepare: Callable[..., None] | None = None,
    *args: object,
    environment: dict[str, str] | None = None,
) -> BaseProcess:
    """Start a training, on as many digits as here; `prepare` is called in its process first."""
    _, digits = datasets.digit_images()
    return fork(_child, config, prepare, args, environment or {}, len(digits))


def start_ranks(
    config: TrainConfig | ResumeConfig,
    world_size: int,
    prepare: Callable[..., None] | None = None,
    *args: object,
) -> list[BaseProcess]:
    """Start the processes that torchrun would start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        start(
            config,
            prepare,
            *args,
            environment={
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(world_size)
    ]


def end(*processes: BaseProcess, timeout: float = 240) -> list[int | None]:
    """Wait for processes, kill those that do not end in time; return their exit codes."""
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def die_after(num_steps: int, seconds: float) -> None:
    """Kill this process some time after it has taken some steps: for `start`."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    if num_steps == 0:
        timer.start()
    call, taken = TrainStep.__call__, itertools.count(1)

    def counting(self: TrainStep, *args: Any) -> Any:
        result = call(self, *args)
        if next(taken) == num_steps:
            timer.start()
        return result

    TrainStep.__call__ = counting


def saved_state(run: Path) -> dict[str, Any]:
    """Return what the newest checkpoint of a run has saved, without times."""
    path = run / "checkpoint" / "train_state.pt"
    return without_times(torch.load(path, weights_only=True)["state"])


def without_times(value: Any) -> Any:
    """Drop what depends on how long something took."""
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in TIMES}
    if isinstance(value, list):
        return [without_times(part) for part in value]
    return value


def require_equal(found: Any, expected: Any, where: str = "state") -> None:
    """Fail unless two states are equal to the last bit."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, part in expected.items():
            require_equal(found[key], part, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for index, part in enumerate(expected):
            require_equal(found[index], part, f"{where}[{index}]")
    else:
        assert found == expected, where


def _child(
    config: TrainConfig | ResumeConfig,
    prepare: Callable[..., None] | None,
    args: tuple[object, ...],
    environment: dict[str, str],
    num_digits: int,
) -> None:
    os.environ.update(environment)
    cut_digits(num_digits)
    # The loader's workers are forks of this process, as in the command, and end with it.
    multiprocessing.set_start_method(None, force=True)
    # They are tested elsewhere: pictures take longer than an epoch, memory half as long.
    rundir.draw_curves = lambda *_: Path()
    report.draw_confusion = lambda *_: b""
    memory.saved_bytes = lambda *_: 0
    torch.set_num_threads(1)
    # An error is a traceback on stderr and exit code 1, as multiprocessing has it.
    logging.basicConfig(level=logging.WARNING)
    if prepare:
        prepare(*args)
    main(config)
