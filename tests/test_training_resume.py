"""Runs that are killed, really, and gone on with."""

import errno
import itertools
import logging
import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from facts import raises_naming
from PIL import Image
from processes import wait_until
from small_trainings import NUM_FEW_DIGITS, cut_digits, small_run
from training_processes import die_after, end, require_equal, saved_state, start

from efficientnet.errors import PipelineError
from efficientnet.formats.checkpoint import CheckpointError, load_checkpoint
from efficientnet.machine.atomic import point_link
from efficientnet.machine.locking import LockedError
from efficientnet.runtimes import open_runtime
from training.running import run_folder as rundir
from training.running import trainer
from training.running.begin_run import directory_of, main
from training.running.command_line import ResumeConfig, parse
from training.running.metrics import read_metrics
from training.running.progress import StepReport
from training.running.run_folder import read_run, remove_unfinished
from training.running.trainer import TrainingError

NUM_KILLS = 5


def config(output: Path, **changes: object):
    settings: dict[str, object] = {"batch_size": 64, "micro_batch_size": 32}
    settings["checkpoint_every_steps"] = 2
    return small_run(output, **(settings | changes))


@pytest.fixture(scope="module", autouse=True)
def few_digits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        cut_digits(NUM_FEW_DIGITS, patch.setattr)
        yield


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed at its third checkpoint."""
    folder = tmp_path_factory.mktemp("begun")
    assert end(start(config(folder), die_at_call, "save_checkpoint", 3)) == [-signal.SIGKILL]
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    assert end(start(config(folder))) == [0]
    return folder / "run"


def require_same_run(found: Path, expected: Path) -> None:
    require_equal(saved_state(found), saved_state(expected))
    timeless = {"images_per_s", "elapsed_s"}
    assert [e.model_dump(exclude=timeless) for e in read_metrics(found)] == [
        e.model_dump(exclude=timeless) for e in read_metrics(expected)
    ]
    assert (found / "best").resolve().name == (expected / "best").resolve().name
    names = [sorted(p.name for p in (run / "checkpoints").iterdir()) for run in (found, expected)]
    assert names[0] == names[1]
    assert (found.parent / "latest").resolve() == found.resolve()


def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(
    whole: Path, tmp_path: Path
):
    moments = random.Random(1)
    folders = (tmp_path / str(number) for number in itertools.count())
    kills, reached, output = 0, set[int](), next(folders)
    while kills < NUM_KILLS:
        # A few before the first step, most between two others, some while a checkpoint is written.
        moment = (moments.randrange(4), moments.uniform(0.0, 0.3))
        (code,) = end(start(config(output), die_after, *moment))
        assert code in (0, -signal.SIGKILL)
        if (output / "run" / "checkpoint").exists():
            reached.add(load_checkpoint(output / "run" / "checkpoint")[1].step)
        if code == 0:  # It came to its end first: begin another one.
            require_same_run(output / "run", whole)
            output = next(folders)
        else:
            kills += 1
    assert end(start(config(output))) == [0]
    require_same_run(output / "run", whole)
    assert len(reached) > 1


def die_at_call(name: str, number: int) -> None:
    original = getattr(rundir, name)
    calls = iter(range(1, 1000))

    def dying(*args: object) -> object:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    setattr(rundir, name, dying)


def die_while_writing_weights(number: int) -> None:
    from efficientnet.formats import checkpoint

    calls = iter(range(1, 1000))
    original = checkpoint.save

    def dying(tensors: object) -> bytes:
        if next(calls) == number:
            # Half of the file is there when the process dies.
            place = next(Path(os.environ["RUN"]).glob("checkpoints/.step-*"))
            (place / "weights.safetensors").write_bytes(original(tensors)[:1000])
            os.kill(os.getpid(), signal.SIGKILL)
        return original(tensors)

    checkpoint.save = dying


@pytest.mark.parametrize(
    ("function", "call"), [("save_checkpoint", 5), ("point_link", 3), ("write_metrics", 3)]
)
def test_a_run_killed_within_a_checkpoint_goes_on(
    function: str, call: int, whole: Path, tmp_path: Path
):
    assert end(start(config(tmp_path), die_at_call, function, call)) == [-signal.SIGKILL]
    assert end(start(config(tmp_path))) == [0]
    require_same_run(tmp_path / "run", whole)


def test_a_half_written_checkpoint_is_removed_and_the_older_one_gone_on_with(
    whole: Path, tmp_path: Path
):
    process = start(
        config(tmp_path),
        die_while_writing_weights,
        3,
        environment={"RUN": str(tmp_path / "run")},
    )
    assert end(process) == [-signal.SIGKILL]
    run = tmp_path / "run"
    assert list(run.glob("checkpoints/.step-*")) and read_run(run).record.step == 4
    assert end(start(ResumeConfig(run))) == [0]
    assert not list(run.glob("checkpoints/.step-*"))
    require_same_run(run, whole)


def test_the_last_checkpoints_and_the_best_are_kept(whole: Path):
    epochs = read_metrics(whole)
    best = max(epochs, key=lambda epoch: epoch.top1)
    kept = {path.name for path in (whole / "checkpoints").iterdir()}
    assert kept == {"step-0000012", "step-0000014", "step-0000015", f"step-{best.step:07d}"}
    assert (whole / "checkpoint").resolve().name == "step-0000015"
    _, record = load_checkpoint(whole / "best")
    assert (record.step, record.top1) == (best.step, best.top1)


def test_an_older_checkpoint_can_be_gone_on_with(whole: Path, tmp_path: Path):
    assert end(start(config(tmp_path, keep_checkpoints=20), die_at_call, "save_checkpoint", 7)) == [
        -signal.SIGKILL
    ]
    older = tmp_path / "run" / "checkpoints" / "step-0000006"
    assert end(start(ResumeConfig(older))) == [0]
    require_equal(saved_state(tmp_path / "run"), saved_state(whole))


def test_going_back_to_an_older_checkpoint_never_leaves_a_run_without_one(tmp_path: Path):
    for step in (2, 4):
        (tmp_path / "checkpoints" / f"step-000000{step}").mkdir(parents=True)
    point_link(tmp_path / "checkpoint", Path("checkpoints/step-0000004"))
    point_link(tmp_path / "best", Path("checkpoints/step-0000004"))
    remove_unfinished(tmp_path, 2)
    assert (tmp_path / "checkpoint").resolve().name == "step-0000002"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000002"]
    assert not (tmp_path / "best").is_symlink()


def test_torchrun_would_go_back_to_a_given_checkpoint_at_each_restart(
    begun: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    older = begun / "run" / "checkpoints" / "step-0000002"
    with raises_naming(ValueError, "step-0000002"):
        directory_of(ResumeConfig(older))
    assert directory_of(ResumeConfig(begun / "run")) == begun / "run"


def test_a_complete_run_is_not_trained_again(whole: Path):
    before = (whole / "report.md").stat().st_mtime_ns
    assert main(config(whole.parent)) == whole / "checkpoint"
    assert (whole / "report.md").stat().st_mtime_ns == before
    with raises_naming(CheckpointError, "epochs 3", "now 4"):
        main(config(whole.parent, epochs=4))
    with raises_naming(CheckpointError, "complete"):
        main(ResumeConfig(whole))


def test_the_name_of_a_run_with_another_recipe_is_refused(begun: Path):
    with raises_naming(CheckpointError, "epochs 3", "now 4"):
        main(config(begun, epochs=4))
    with raises_naming(CheckpointError, "tiny", "b0"):
        main(config(begun, variant="b0"))
    with raises_naming(CheckpointError, "tiny", "v2-s"):
        main(ResumeConfig(begun / "run", "v2-s"))


def write_classes(folder: Path, names: tuple[str, ...], num_images: int = 40) -> None:
    for index, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(num_images):
            color = (60 * index, 6 * number, 128)
            Image.new("RGB", (24, 24), color).save(folder / name / f"{number}.png")


def test_a_run_is_not_resumed_with_another_class_list_or_other_images(tmp_path: Path):
    data = tmp_path / "data"
    write_classes(data, ("cat", "dog"))
    begun = config(tmp_path, data=str(data), batch_size=16, micro_batch_size=16)
    assert end(start(begun, die_at_call, "save_checkpoint", 3)) == [-signal.SIGKILL]
    (data / "dog" / "0.png").unlink()
    with raises_naming(CheckpointError, "not those"):
        main(ResumeConfig(tmp_path / "run"))
    (data / "dog").rename(data / "wolf")
    with raises_naming(CheckpointError, "2 classes", "wolf"):
        main(ResumeConfig(tmp_path / "run"))


def test_a_run_whose_images_have_moved_is_resumed_by_data_and_remembers_it(tmp_path: Path):
    data, moved = tmp_path / "data", tmp_path / "moved"
    write_classes(data, ("cat", "dog"))
    begun = config(tmp_path, data=str(data), batch_size=16, micro_batch_size=16)
    assert end(start(begun, die_at_call, "save_checkpoint", 3)) == [-signal.SIGKILL]
    data.rename(moved)
    flags = ["tiny", "--resume", str(tmp_path / "run"), "--data", str(moved)]
    (moved / "dog" / "0.png").rename(tmp_path / "aside.png")
    with raises_naming(CheckpointError, "not those", "--data"):
        main(parse(flags))
    (tmp_path / "aside.png").rename(moved / "dog" / "0.png")
    assert end(start(parse(flags))) == [0]
    _, record = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert (record.data, record.train_config["data"]) == (str(moved), str(moved))


def test_resume_takes_the_flags_of_its_run_and_names_those_that_differ(whole: Path, begun: Path):
    run = begun / "run"
    own = ["tiny", "--recipe", "digits", "--epochs", "3", "--batch-size", "64", "--name", "run"]
    for flag, value, named in (
        ("--epochs", "4", ("epochs 3", "now 4")),
        ("--recipe", "imagenet", ("recipe digits", "now imagenet")),
        ("--name", "other", ("name run", "now other")),
        ("--optimizer.weight-decay", "0.5", ("weight_decay", "now 0.5")),
        ("--output", "elsewhere", ("--output elsewhere",)),
    ):
        with raises_naming(CheckpointError, *named):
            main(parse([*own, "--resume", str(run), flag, value]))
    assert end(start(parse([*own, "--resume", str(run), "--keep-checkpoints", "3"]))) == [0]
    require_same_run(run, whole)


def test_two_processes_do_not_train_one_run(whole: Path, tmp_path: Path):
    run = tmp_path / "run"
    first = start(config(tmp_path), wait_at_step, 3, tmp_path / "go")
    assert wait_until(lambda: (tmp_path / "waits").exists(), 60)
    for command in (config(tmp_path), ResumeConfig(run)):
        with raises_naming(LockedError, run, first.pid):
            main(command)
    (tmp_path / "go").touch()
    assert end(first) == [0]
    require_same_run(run, whole)


def wait_at_step(step: int, go: Path) -> None:
    update = trainer.ProgressBar.update

    def waiting(self: trainer.ProgressBar, report: StepReport) -> None:
        update(self, report)
        if report.step == step:
            go.with_name("waits").touch()
            assert wait_until(go.exists, 60)

    trainer.ProgressBar.update = waiting


def test_a_copied_link_to_a_checkpoint_is_told(whole: Path, tmp_path: Path):
    copy = tmp_path / "checkpoint"
    shutil.copy(whole / "checkpoint", copy, follow_symlinks=False)
    for read in (load_checkpoint, read_run, open_runtime):
        with raises_naming(PipelineError, "checkpoints/step-0000015", "cp -rL"):
            read(copy)


def test_images_left_out_once_are_not_looked_for_again(tmp_path: Path):
    data = tmp_path / "data"
    write_classes(data, ("cat", "dog"), num_images=120)
    (data / "cat" / "3.png").write_bytes(b"broken")
    begun = config(tmp_path, data=str(data), batch_size=16, micro_batch_size=16)
    assert end(start(begun, die_at_call, "save_checkpoint", 3)) == [-signal.SIGKILL]
    assert [Path(name).name for name in read_run(tmp_path / "run").left_out] == ["3.png"]
    assert end(start(ResumeConfig(tmp_path / "run"))) == [0]


def fill_the_disk(log: Path, calls_that_fail: tuple[int, ...]) -> None:
    logging.getLogger().addHandler(logging.FileHandler(log))
    original = rundir.save_checkpoint
    calls = iter(range(1, 1000))

    def failing(*args: object) -> object:
        if next(calls) in calls_that_fail:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args)  # pyright: ignore[reportArgumentType]

    rundir.save_checkpoint = failing  # pyright: ignore[reportAttributeAccessIssue]


def test_a_full_disk_leaves_the_older_checkpoint_whole_and_training_goes_on(
    whole: Path, tmp_path: Path
):
    assert end(start(config(tmp_path), fill_the_disk, tmp_path / "log", (3, 4))) == [0]
    require_equal(saved_state(tmp_path / "run"), saved_state(whole))
    log = (tmp_path / "log").read_text()
    assert log.count("the checkpoint could not be written: [Errno 28] No space left") == 2
    assert "step-0000004; training goes on and tries again" in log


def test_a_full_disk_at_the_last_checkpoint_fails_the_run_and_says_how_to_go_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original, calls = rundir.save_checkpoint, itertools.count(1)

    def failing(*args: Any) -> object:
        if next(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(rundir, "save_checkpoint", failing)
        with raises_naming(TrainingError, "disk is full", "step-0000005", f"--resume {run}"):
            main(config(tmp_path))
    assert read_run(run).record.step == 5 and not (run / "report.md").exists()
    assert end(start(ResumeConfig(run))) == [0]
    require_same_run(run, whole)


def test_a_dead_loader_worker_is_told_with_the_command_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    update, others = trainer.ProgressBar.update, set(multiprocessing.active_children())

    def killing(self: trainer.ProgressBar, report: StepReport) -> None:
        update(self, report)
        if report.step == 3:
            (worker,) = set(multiprocessing.active_children()) - others
            worker.kill()

    monkeypatch.setattr(trainer.ProgressBar, "update", killing)
    with raises_naming(TrainingError, "--num-workers", "step-0000002", "--resume"):
        main(config(tmp_path, num_workers=1))
