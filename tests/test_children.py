import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import child_pids, process_exists, wait_until
from small_trainings import small_run
from training_processes import end, start

from training.learning.step import TrainStep

# A command whose two children compute for ever when Ctrl-C, SIGTERM, an exception or death ends it.
COMMAND = """
import multiprocessing, sys, time
from efficientnet.machine.children import obey_parent
from efficientnet.command import run_command

def compute(connection):
    obey_parent()
    connection.send("ready")
    while True:
        pass

def main(ending):
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    children = [context.Process(target=compute, args=(theirs,), daemon=d) for d in (True, False)]
    for child in children:
        child.start()
        ours.recv()
    print(*(child.pid for child in children), flush=True)
    if ending == "exception":
        raise RuntimeError("a bug")
    time.sleep(600)

run_command(lambda: sys.argv[1], main)
"""


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("exception", 1),
        (signal.SIGINT, 130),
        (signal.SIGTERM, 143),
        (signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_whatever_ends_a_command_ends_its_children(ending: signal.Signals | str, code: int):
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(ending)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as command:
        assert command.stdout is not None
        try:
            children = list(map(int, command.stdout.readline().split()))
            if isinstance(ending, signal.Signals):
                command.send_signal(ending)
            command.communicate(timeout=60)
        finally:
            command.kill()
    assert command.returncode == code and len(children) == 2
    assert wait_until(lambda: not any(map(process_exists, children)))


def end_at_step(ending: str, pids: Path) -> None:
    """End a training at its third step, while its loader has two workers: for `start`."""
    call, taken = TrainStep.__call__, itertools.count(1)

    def ending_call(self: TrainStep, *args: object) -> object:
        result = call(self, *args)  # pyright: ignore[reportArgumentType]
        if next(taken) == 3:
            workers = child_pids(os.getpid())
            pids.write_text(" ".join(map(str, workers)))
            if ending == "exception":
                raise RuntimeError("a bug")
            os.kill(workers[0] if ending == "worker" else os.getpid(), signal.SIGKILL)
        return result

    TrainStep.__call__ = ending_call


@pytest.mark.parametrize("ending", ["exception", "worker", "killed"])
def test_a_training_ends_with_its_workers(ending: str, tmp_path: Path):
    config = small_run(tmp_path, num_workers=2, batch_size=64)
    code = end(start(config, end_at_step, ending, tmp_path / "pids"), timeout=60)
    assert code == [-signal.SIGKILL if ending == "killed" else 1]
    workers = list(map(int, (tmp_path / "pids").read_text().split()))
    assert len(workers) == 2
    assert wait_until(lambda: not any(map(process_exists, workers)))
