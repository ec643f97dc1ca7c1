import errno
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_processes
from facts import raises_naming, require_named
from small_trainings import NUM_FEW_DIGITS, SMALLEST, cut_digits, epoch_metrics
from torch.utils.tensorboard.writer import SummaryWriter
from training_processes import end, require_equal, saved_state, start

from efficientnet.formats.checkpoint import load_checkpoint, read_checkpoint
from efficientnet.images import datasets
from efficientnet.network.variants import NetworkOptions
from training.learning.optim import WeightAverage, build_optimizer, learning_rate_at
from training.learning.state import new_state
from training.learning.step import TrainStep
from training.recipe.config import TrainConfig
from training.recipe.recipes import digits_recipe, imagenet_recipe
from training.running import trainer
from training.running.begin_run import main
from training.running.command_line import ResumeConfig
from training.running.metrics import draw_curves, loss_axis_end, read_metrics
from training.running.progress import StepReport
from training.running.run_folder import is_complete
from training.running.trainer import TrainingError

EVERY_DIGIT = datasets.digit_images


def tiny_config(output: Path, **changes: object) -> TrainConfig:
    config = replace(digits_recipe(SMALLEST), epochs=2, batch_size=32, output=output)
    config = replace(config, eval_image_size=20, **changes)
    stages = {"image_size": (16, 20), "num_stages": min(2, config.epochs)}
    return replace(config, progressive=replace(config.progressive, **stages))


def at_16_pixels(config: TrainConfig) -> TrainConfig:
    """Train in one stage, at the least size."""
    small = replace(config.progressive, image_size=(16, 16), num_stages=1)
    return replace(config, progressive=small, eval_image_size=16)


def state_of(run: Path) -> dict:
    return torch.load(run / "checkpoint" / "train_state.pt", weights_only=True)["state"]


def interrupt_after(step: int, number: signal.Signals, said: Path) -> None:
    """Do what Ctrl-C or Slurm's signal does, during a step, and write what is said: for `start`."""
    original = trainer.ProgressBar.update
    seen = iter(range(1, 10_000))

    def update(self: trainer.ProgressBar, report: StepReport) -> None:
        original(self, report)
        if next(seen) == step:
            os.kill(os.getpid(), number)

    def telling(config: TrainConfig) -> None:
        try:
            main(config)
        except KeyboardInterrupt as interrupt:
            said.write_text(str(interrupt))
            raise

    trainer.ProgressBar.update = update
    training_processes.main = telling


@pytest.fixture(autouse=True)
def no_memory_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave that to test_training_memory.py: it takes half as long as these trainings."""
    monkeypatch.setattr("training.learning.memory.saved_bytes", lambda *_: 0)


@pytest.fixture(scope="module", autouse=True)
def few_digits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        cut_digits(NUM_FEW_DIGITS, patch.setattr)
        yield


@pytest.fixture
def every_digit(few_digits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all digits where what is learned counts."""
    monkeypatch.setattr(datasets, "digit_images", EVERY_DIGIT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    assert end(start(tiny_config(folder, name="run"))) == [0]
    return folder / "run"


def test_a_run_writes_checkpoint_metrics_and_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.undo()  # with its pictures
    checkpoint = main(at_16_pixels(tiny_config(tmp_path)))
    run = checkpoint.parent
    assert (run.parent / "latest").resolve() == run.resolve()
    assert {p.name for p in run.iterdir()} == {
        *("checkpoint", "best", "checkpoints", "metrics.jsonl", "curves.png"),
        *("tensorboard", "report.md", "confusion.png"),
    }
    record = read_checkpoint(checkpoint)
    assert (record.epoch, record.step, record.num_images_evaluated) == (2, 22, 90)
    epochs = read_metrics(run)
    assert [e.epoch for e in epochs] == [1, 2]
    assert epochs[-1].top1 == record.top1
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("every_digit")
def test_a_small_network_learns_the_digits(tmp_path: Path):
    config = at_16_pixels(tiny_config(tmp_path, variant="tiny", architecture=None, batch_size=32))
    config = replace(config, epochs=5)
    config = replace(config, optimizer=replace(config.optimizer, learning_rate=4e-2))
    record = read_checkpoint(main(config))
    assert record.top1 is not None and record.top1 > 0.8
    assert record.top5 is not None and record.top5 >= record.top1


@pytest.mark.parametrize(("stop_step", "number"), [(3, signal.SIGINT), (17, signal.SIGTERM)])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(
    stop_step: int, number: signal.Signals, whole: Path, tmp_path: Path
):
    cut, said = tmp_path / "run", tmp_path / "said"
    config = tiny_config(tmp_path, name="run")
    assert end(start(config, interrupt_after, stop_step, number, said)) == [1]
    require_named(said.read_text(), f"--resume {cut}")
    # The flag is looked at before a step, which is then still taken.
    assert state_of(cut)["step"] == stop_step + 1
    assert not (tmp_path / "latest").exists()
    assert end(start(ResumeConfig(cut))) == [0]
    require_equal(saved_state(cut), saved_state(whole))


def test_a_loss_that_is_not_finite_ends_the_run_and_names_step_and_stage(tmp_path: Path):
    config = tiny_config(tmp_path)
    config = replace(config, optimizer=replace(config.optimizer, learning_rate=math.inf))
    with raises_naming(TrainingError, "nan", "step 2 of 22", "stage 1 of 2", "16 px"):
        main(config)


def test_a_loss_that_is_read_late_belongs_to_its_own_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # As on a GPU.
    monkeypatch.setitem(trainer.PASSES_BETWEEN_READINGS, "cpu", 8)
    losses: list[float | None] = []
    original = trainer.ProgressBar.update

    def update(self: trainer.ProgressBar, report: StepReport) -> None:
        losses.append(report.loss)
        original(self, report)

    monkeypatch.setattr(trainer.ProgressBar, "update", update)
    fail_at(monkeypatch, {10})
    with raises_naming(TrainingError, "nan", "step 11", "stage 1 of 2"):
        main(tiny_config(tmp_path))
    # The first stage ends with step 11.
    assert losses[:7] == [None] * 7 and len(set(losses[7:])) == 1 and len(losses) == 10


def test_a_full_disk_ends_tensorboards_log_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
    main(at_16_pixels(tiny_config(tmp_path)))
    assert caplog.text.count("TensorBoard's log could not be written: [Errno 28]") == 1


def test_curves_are_drawn_of_any_number_of_stages(tmp_path: Path):
    epochs = [epoch_metrics(number, stage=number) for number in range(1, 31)]
    assert draw_curves(tmp_path, epochs, "thirty stages", 10).is_file()


def test_a_spike_does_not_stretch_the_loss_axis(tmp_path: Path):
    usual = [epoch_metrics(n, train_loss=1.0 + 1 / n, val_loss=0.9) for n in range(1, 9)]
    end = loss_axis_end(usual, 10)
    assert 2.0 < end < 1.5 * math.log(10)
    spiked = [*usual, epoch_metrics(9, val_loss=37.5), epoch_metrics(10, val_loss=24_133.0)]
    assert loss_axis_end(spiked, 10) == pytest.approx(1.5 * math.log(10))
    assert draw_curves(tmp_path, spiked, "a spike", 10).is_file()


@pytest.mark.parametrize(
    "changes",
    [
        {"label_smoothing": 1.5},
        {"stochastic_depth_rate": 1.0},
        {"batch_norm_momentum": -0.1},
    ],
)
def test_settings_outside_their_limits_are_named(changes: dict, tmp_path: Path):
    ((name, value),) = changes.items()
    with raises_naming(ValueError, name, value):
        tiny_config(tmp_path, **changes)
    with raises_naming(ValueError, "--num-workers", -2):
        tiny_config(tmp_path, num_workers=-2)


@pytest.mark.usefixtures("every_digit")
def test_gradients_of_micro_batches_add_up_to_those_of_the_batch(tmp_path: Path):
    def weights(micro_batch_size: int | None) -> dict[str, torch.Tensor]:
        config = tiny_config(
            tmp_path / str(micro_batch_size),
            epochs=1,
            batch_size=128,
            micro_batch_size=micro_batch_size,
            stochastic_depth_rate=0.0,
        )
        config = at_16_pixels(config)
        still = replace(config.progressive, mixup_alpha=(0, 0), dropout_rate=(0, 0))
        model, _ = load_checkpoint(main(replace(config, progressive=still)))
        return model.state_dict()

    whole, parts = weights(None), weights(64)
    # Batch norm sees 64 images instead of 128, so the runs are close and not equal.
    bias = "classifier.1.bias"
    assert not torch.equal(whole[bias], parts[bias])
    torch.testing.assert_close(whole[bias], parts[bias], atol=5e-3, rtol=0)


@pytest.mark.usefixtures("every_digit")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_trains(precision: str, tmp_path: Path):
    run = main(at_16_pixels(tiny_config(tmp_path, precision=precision, batch_size=128))).parent
    first, last = read_metrics(run)
    assert last.train_loss < first.train_loss
    # Only fp16 needs a scaled loss, and its scale comes back with a resumed run.
    assert bool(state_of(run)["scaler"]) == (precision == "fp16")


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fail_at(monkeypatch, {15})
    config = tiny_config(tmp_path, name="run", checkpoint_every_steps=4)
    with raises_naming(TrainingError, "nan", "step 16", "checkpoints/step-0000012"):
        main(config)
    load_checkpoint(tmp_path / "run" / "checkpoint")


def test_rollback_goes_on_from_the_last_checkpoint_with_other_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    fail_at(monkeypatch, {15}, attempts={0, 1})
    config = tiny_config(tmp_path, name="run", checkpoint_every_steps=4, on_nan="rollback")
    with caplog.at_level("WARNING"):
        record = read_checkpoint(main(config))
    assert record.step == 22 and state_of(tmp_path / "run")["attempt"] == 2
    assert caplog.text.count("back to step 12") == 2
    assert "rollback 2 of 3" in caplog.text


def test_rollback_gives_up_after_three_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fail_at(monkeypatch, {15}, attempts=set(range(9)))
    config = tiny_config(tmp_path, checkpoint_every_steps=4, on_nan="rollback")
    with raises_naming(TrainingError, "step 16", "3 rollbacks"):
        main(config)


def fail_at(monkeypatch: pytest.MonkeyPatch, steps: set[int], attempts: set[int] | None = None):
    """Make the loss of some steps NaN, as a bad batch would."""
    call = TrainStep.__call__

    def failing(self: TrainStep, *args: object) -> object:
        state = self._state
        step, attempt = state.step, state.attempt
        loss, stops = call(self, *args)
        bad = step in steps and attempt in (attempts or {0})
        return loss * math.nan if bad else loss, stops

    monkeypatch.setattr(TrainStep, "__call__", failing)


@pytest.mark.parametrize("name", ["classifier.1.bias", "features.0.1.running_var"])
@pytest.mark.parametrize("is_averaged", [False, True])
def test_a_run_that_ends_with_values_that_are_not_finite_is_not_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_averaged: bool
):
    call = TrainStep.__call__

    def poisoning(self: TrainStep, *args: object) -> object:
        result = call(self, *args)
        state = self._state
        if state.step == 22:
            with torch.no_grad():
                tensors = state.average.tensors if is_averaged else state.model.state_dict()
                tensors[name][0] = math.inf
        return result

    monkeypatch.setattr(TrainStep, "__call__", poisoning)
    with raises_naming(TrainingError, name, "step 22", "checkpoints/step-0000011"):
        main(tiny_config(tmp_path, name="run"))
    assert read_checkpoint(tmp_path / "run" / "checkpoint").step == 11
    assert not is_complete(tmp_path / "run") and not (tmp_path / "latest").exists()


def test_a_run_can_be_given_by_its_steps(tmp_path: Path):
    run = main(tiny_config(tmp_path, steps=14)).parent
    assert [(e.epoch, e.step) for e in read_metrics(run)] == [(1, 11), (2, 14)]


def test_more_stages_than_epochs_are_refused_before_training(tmp_path: Path):
    with raises_naming(ValueError, "num_stages", 2, 1):
        main(replace(tiny_config(tmp_path), epochs=1))
    assert not list(tmp_path.iterdir())


def test_the_papers_learning_rate_warms_up_and_decays_in_steps():
    config = imagenet_recipe("v2-s").optimizer
    rates = [learning_rate_at(step, config, 4096, 100, 35_000) for step in range(35_000)]
    assert rates[0] == pytest.approx(0.256 / 501)
    assert max(rates) == rates[499] == pytest.approx(0.256 * 500 / 501)
    assert rates[500] == pytest.approx(0.256 * 0.97**2)
    assert rates[719] == rates[500] and rates[720] == pytest.approx(rates[719] * 0.97)


def test_the_cosine_ends_near_zero_and_scales_with_the_batch():
    config = digits_recipe("v2-s").optimizer
    rates = [learning_rate_at(step, config, 64, 10, 100) for step in range(100)]
    assert max(rates) == pytest.approx(config.learning_rate * 64 / 256)
    assert rates[-1] < 0.001 * max(rates)


def test_biases_and_norms_have_no_weight_decay():
    state = new_state(digits_recipe("tiny"), NetworkOptions(), 10, torch.device("cpu"))
    decayed, free = state.optimizer.param_groups
    assert decayed["weight_decay"] > 0 and free["weight_decay"] == 0
    assert all(p.ndim >= 2 for p in decayed["params"]) and all(p.ndim < 2 for p in free["params"])
    total = sum(p.numel() for p in state.model.parameters())
    assert sum(p.numel() for g in (decayed, free) for p in g["params"]) == total


def test_the_papers_optimizer_is_tensorflows_rmsprop():
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    module = torch.nn.ParameterList([parameter])
    optimizer = build_optimizer(module, imagenet_recipe("v2-s").optimizer)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.1, 0.0
    parameter.grad = torch.full((2, 2), 2.0)
    optimizer.step()
    # Square average starts at one: 0.9 * 1 + 0.1 * 4 = 1.3; epsilon stands inside the root.
    assert parameter[0, 0].item() == pytest.approx(1 - 0.1 * 2 / math.sqrt(1.3 + 1e-3))


def test_the_average_forgets_the_initial_weights_first_and_then_follows_its_decay():
    layer = torch.nn.BatchNorm1d(1)
    average = WeightAverage(layer, decay=0.9)
    with torch.no_grad():
        layer.weight.fill_(11.0)
    layer(torch.randn(8, 1))
    average.update()
    assert average.tensors["weight"].item() == pytest.approx(1 + (1 - 2 / 11) * 10)
    assert average.tensors["num_batches_tracked"].item() == 1
    for _ in range(200):
        average.update()
    before = average.tensors["weight"].item()
    with torch.no_grad():
        layer.weight.fill_(before + 1)
    average.update()
    assert average.tensors["weight"].item() == pytest.approx(before + 0.1, rel=1e-4)
