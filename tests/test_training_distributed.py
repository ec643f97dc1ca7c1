"""One training shared by several processes (gloo, on the CPU)."""

import multiprocessing
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from facts import raises_naming
from processes import fork
from small_trainings import cut_digits, small_run, with_stages
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from training_processes import end, require_equal, saved_state, start, start_ranks

from efficientnet.command import run_command
from training.learning import distributed
from training.recipe.config import TrainConfig
from training.running.begin_run import directory_of, main
from training.running.command_line import parse
from training.running.metrics import read_metrics

# Between processes only the order of additions differs, and training makes that grow. The losses of
# this run, on one process, differ by less than 2e-6 between AVX-512, AVX2 and SSE 4.1; of a run of
# twice the images the held-out loss differed by 1.5e-4, and on AMX by 2.4e-4 between one process
# and four. Gradients that are not averaged change the training loss by 5e-3 and more.
TRAIN_TOLERANCE = 1e-4
VAL_TOLERANCE = 6e-4


NUM_DIGITS = 900
NUM_HELD_OUT = 180


def config(output: Path, **changes: object) -> TrainConfig:
    # What batch norm sees: the same on one process and on four.
    settings: dict[str, object] = {"batch_size": 128, "micro_batch_size": 32}
    return small_run(output, **(settings | changes))


@pytest.fixture(scope="module", autouse=True)
def half_the_digits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        cut_digits(NUM_DIGITS, patch.setattr)
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    assert end(start(config(folder))) == [0]
    return folder / "run"


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    assert end(*start_ranks(config(folder), 2)) == [0, 0]
    return folder / "run"


def require_same_curves(found: Path, expected: Path) -> None:
    for epoch, other in zip(read_metrics(found), read_metrics(expected), strict=True):
        assert epoch.train_loss == pytest.approx(other.train_loss, abs=TRAIN_TOLERANCE)
        assert epoch.val_loss == pytest.approx(other.val_loss, abs=VAL_TOLERANCE)
        for name in ("step", "image_size", "learning_rate"):
            assert getattr(epoch, name) == getattr(other, name)
        # One image on the border may fall on the other side.
        assert epoch.top1 == pytest.approx(other.top1, abs=1.5 / NUM_HELD_OUT)


def test_two_processes_that_share_a_batch_have_the_loss_curve_of_one(by_two: Path, alone: Path):
    require_same_curves(by_two, alone)


def test_four_processes_that_share_a_batch_have_the_loss_curve_of_one(alone: Path, tmp_path: Path):
    assert end(*start_ranks(config(tmp_path), 4)) == [0] * 4
    require_same_curves(tmp_path / "run", alone)


def test_the_statistics_of_batch_norm_do_not_depend_on_the_number_of_processes(tmp_path: Path):
    one_step = {"epochs": 1, "batch_size": 512, "micro_batch_size": 64, "steps": 1}
    alone, shared = (with_stages(config(tmp_path / n, **one_step), 1) for n in ("1", "4"))
    assert end(start(alone)) == [0]
    assert end(*start_ranks(shared, 4)) == [0] * 4
    found, expected = (saved_state(tmp_path / n / "run")["model"] for n in ("4", "1"))
    statistics = [name for name in expected if "running" in name]
    assert statistics
    for name in statistics:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5)


def die_at_step(rank: int, step: int) -> None:
    from training.learning.step import TrainStep

    call = TrainStep.__call__

    def dying(self: TrainStep, *args: object) -> object:
        if int(os.environ.get("RANK", "0")) == rank and self._state.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(self, *args)

    TrainStep.__call__ = dying


def test_a_checkpoint_of_two_processes_resumes_on_one(alone: Path, tmp_path: Path):
    processes = start_ranks(config(tmp_path), 2, die_at_step, 0, 7)
    assert end(*processes)[0] == -signal.SIGKILL
    assert end(start(config(tmp_path))) == [0]
    require_same_curves(tmp_path / "run", alone)


def test_ranks_resume_to_the_same_bits(by_two: Path, tmp_path: Path):
    assert end(*start_ranks(config(tmp_path), 2, die_at_step, 1, 8))[1] == -signal.SIGKILL
    assert end(*start_ranks(config(tmp_path), 2)) == [0, 0]
    require_equal(saved_state(tmp_path / "run"), saved_state(by_two))


def run_under_torchrun(words: list[str], log: Path) -> None:
    """Do what torchrun does; its processes are forks, which have torch loaded."""
    from torch.distributed import run as torchrun

    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    multiprocessing.set_start_method(None, force=True)
    cut_digits(NUM_DIGITS)
    launch = torchrun.elastic_launch

    def launch_forks(config: Any, entrypoint: object) -> Any:
        config.start_method = "fork"
        return launch(config, train_and_die_once)

    torchrun.elastic_launch = launch_forks
    torchrun.main(words)


def train_and_die_once(_: str, script: str, *words: str) -> None:
    """One of the processes dies by itself in the second epoch, the first time only."""
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        die_at_step(1, 7)
    try:
        run_command(lambda: parse(words), main)
    except SystemExit as end:
        if end.code:
            raise


def test_torchrun_restarts_a_killed_worker_and_the_run_ends_as_if_nothing_had_happened(
    alone: Path, tmp_path: Path
):
    words = [
        *("--standalone", "--nproc-per-node", "2", "--max-restarts", "2"),
        *("training/run.py", "tiny", "--output", str(tmp_path)),
        *("--name", "run", "--epochs", "3", "--batch-size", "128", "--micro-batch-size", "32"),
        # The size of `alone`.
        *("--progressive.num-stages", "3", "--progressive.image-size", "16", "24"),
        *("--eval-image-size", "24"),
    ]
    assert end(fork(run_under_torchrun, words, tmp_path / "log")) == [0]
    assert "go on with" in (tmp_path / "log").read_text()
    require_same_curves(tmp_path / "run", alone)


def test_a_process_does_not_meet_at_the_port_that_a_dead_process_left_behind():
    of_torchrun = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))
        of_torchrun.set(distributed.MEETING_PORT, str(dead.getsockname()[1]))
    with ThreadPoolExecutor() as pool:
        follower = pool.submit(distributed.meeting_store, "127.0.0.1", of_torchrun.port, 1)
        with pytest.raises(TimeoutError):
            follower.result(timeout=0.5)
        main = distributed.meeting_store("127.0.0.1", of_torchrun.port, 0)
        main.set("from", "process 0")
        assert follower.result(timeout=60).get("from") == b"process 0"


def test_processes_that_torchrun_did_not_start_are_told_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with raises_naming(distributed.DistributedError, "torchrun"):
        distributed.join_ranks()


def test_a_run_that_torchrun_may_restart_needs_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with raises_naming(ValueError, "--name"):
        directory_of(config(tmp_path, name=None))
