"""Recipe -> checkpoint: trains a variant with progressive learning.

    python training/run.py v2-s
    python training/run.py v2-s --data FOLDER --batch-size 256
    python training/run.py v2-s --data FOLDER --weights timm:tf_efficientnetv2_s.in1k
    python training/run.py --resume runs/v2-s-20261122T101500Z

Without --data it trains on the handwritten digits that come with scikit-learn; with it, by the
paper's recipe, on a folder with one folder of images per class (or train/ and val/ of those).
--weights starts from published weights or from a checkpoint, with a new classifier.
--resume goes on with an interrupted run, by the recipe it was started with.
--help after a variant lists what can be set.
"""

import copy
import logging
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

import torch
import tyro

from efficientnet.checkpoint import CheckpointError
from efficientnet.command import parse_flags, run_command
from efficientnet.datasets import DIGITS, load_dataset, without_broken_images
from efficientnet.environment import num_usable_cores
from efficientnet.variants import get_variant
from training.config import TrainConfig, config_to_json
from training.loader import StepSampler, eval_batches, train_batches
from training.loop import (
    Evaluation,
    StepReport,
    TrainingError,
    evaluate,
    train_one_epoch,
)
from training.metrics import EpochMetrics, draw_curves, read_metrics, write_metrics
from training.optim import learning_rate_at
from training.progress import InterruptFlag, ProgressBar, format_seconds
from training.progressive import Stage, plan_stages, stage_index
from training.recipes import recipes_for
from training.rundir import Run, point_latest_to, read_run, save_run
from training.start import load_start, log_start
from training.state import EpochTotals, TrainState, new_state

EVAL_BATCH_SIZE = 64

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumeConfig:
    """Go on with a run."""

    resume: Path
    """The run's directory; it keeps its recipe."""

    variant: tyro.conf.Positional[str | None] = None
    """May be given, and must then be the run's."""


def parse(args: list[str]) -> TrainConfig | ResumeConfig:
    """Read the command line; the recipes depend on whether there is --data.

    Raises:
        ValueError: unknown variant, with the nearest names, or a value outside its limits.
    """
    if any(arg.partition("=")[0] == "--resume" for arg in args):
        return parse_flags(ResumeConfig, __doc__, args)
    if args and not args[0].startswith("-"):
        get_variant(args[0])
    has_data = any(arg.partition("=")[0] == "--data" for arg in args)
    recipes = recipes_for(Path() if has_data else None)
    described = {name: (f"train {name}", recipe) for name, recipe in recipes.items()}
    return tyro.extras.overridable_config_cli(described, description=__doc__, args=args)


def main(command: TrainConfig | ResumeConfig) -> Path:
    """Train, or go on training; return the checkpoint's directory.

    Raises:
        DatasetError: the data cannot be used.
        CheckpointError: there is nothing to resume.
        WeightsError: what to start from cannot be used.
        TrainingError: the loss is not finite.
        KeyboardInterrupt: Ctrl-C, after what was reached has been saved.
    """
    saved = start = None
    if isinstance(command, ResumeConfig):
        saved = read_run(command.resume, command.variant)
        directory, config = saved.directory, saved.config
        preprocess, network = saved.record.preprocess, saved.record.network
        log.info("go on with %s at step %d", directory, saved.values["state"]["step"])
    else:
        config = command
        start = load_start(config)
        preprocess = config.preprocess_spec(start.preprocess if start else None)
        network = config.network_options(start.network if start else None)
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        directory = config.output / f"{config.variant}-{stamp}"
    log_recipe(config)

    dataset = without_broken_images(load_dataset(config.data or DIGITS))
    for problem in dataset.broken:
        log.warning("left out: %s", problem)
    if dataset.broken:
        log.warning("left out %d images that cannot be decoded", len(dataset.broken))
    run = Run(directory, config, dataset, preprocess, network)
    if saved and saved.values["data_fingerprint"] != run.data_fingerprint:
        raise CheckpointError(
            f"the images of {dataset.source} are not those that {directory} was started with; "
            "put the data back, or start a new run"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num_classes = len(dataset.class_names)
    if start:
        log_start(start, num_classes)
    state = new_state(config, network, num_classes, device, start.tensors if start else None)
    if saved:
        state.load_dict(saved.values["state"])
    train(run, state)
    point_latest_to(directory)
    return run.checkpoint


def train(run: Run, state: TrainState) -> None:
    """Train to the last epoch; evaluate, save and draw after each one."""
    config, dataset = run.config, run.dataset
    stages = plan_stages(config.progressive)
    sampler = StepSampler(len(dataset.train), config, state.step)
    num_workers = config.num_workers
    if num_workers is None:
        num_workers = num_usable_cores() if config.data else 0
    log.info(
        "%d training and %d held-out images of %d classes, %d steps per epoch, on %s",
        len(dataset.train),
        len(dataset.val),
        len(dataset.class_names),
        sampler.steps_per_epoch,
        "the CPU" if state.device.type == "cpu" else torch.cuda.get_device_name(state.device),
    )
    batches = iter(
        train_batches(dataset.train, config, run.preprocess, stages, sampler, num_workers)
    )
    held_out = eval_batches(dataset.val, run.preprocess, EVAL_BATCH_SIZE, num_workers)
    average_model = copy.deepcopy(state.model)
    run.directory.mkdir(parents=True, exist_ok=True)
    epochs = read_metrics(run.directory, state.step)
    bar = ProgressBar(stages, sampler.num_steps, state.step)
    bar.top1 = epochs[-1].top1 if epochs else None

    with InterruptFlag() as interrupt:

        def on_step(report: StepReport) -> bool:
            bar.update(report)
            return not interrupt.is_set

        try:
            while state.step < sampler.num_steps:
                is_whole = train_one_epoch(
                    state,
                    batches,
                    config,
                    stages,
                    len(dataset.class_names),
                    sampler.steps_per_epoch,
                    on_step,
                )
                evaluation = None
                if is_whole:
                    began = perf_counter()
                    average_model.load_state_dict(state.average.tensors)
                    evaluation = evaluate(average_model, iter(held_out), state.device)
                    state.elapsed_s += perf_counter() - began
                    epochs.append(epoch_metrics(config, stages, sampler, state, evaluation))
                    state.totals = EpochTotals()
                    bar.top1 = evaluation.top1
                    bar.write(describe(epochs[-1], config.epochs, len(stages)))
                save_run(run, state, state.step // sampler.steps_per_epoch, evaluation)
                if is_whole:
                    write_metrics(run.directory, epochs)
                    title = f"{config.variant} on {Path(dataset.source).name}"
                    draw_curves(run.directory, epochs, title)
                if interrupt.is_set and state.step < sampler.num_steps:
                    raise KeyboardInterrupt(
                        f"interrupted at step {state.step} of {sampler.num_steps}; what was "
                        f"reached is in {run.checkpoint}; "
                        f"go on with: python training/run.py --resume {run.directory}"
                    )
        except TrainingError as error:
            kept = run.checkpoint if run.checkpoint.exists() else "none, the first epoch failed"
            raise TrainingError(f"{error}; the last good checkpoint: {kept}") from None
        finally:
            bar.close()


def epoch_metrics(
    config: TrainConfig,
    stages: tuple[Stage, ...],
    sampler: StepSampler,
    state: TrainState,
    evaluation: Evaluation,
) -> EpochMetrics:
    """Sum up the epoch that has just ended."""
    last_step = state.step - 1
    stage = stages[stage_index(last_step, sampler.num_steps, len(stages))]
    return EpochMetrics(
        epoch=state.step // sampler.steps_per_epoch,
        step=state.step,
        stage=stage.index + 1,
        image_size=stage.image_size,
        learning_rate=learning_rate_at(
            last_step,
            config.optimizer,
            config.batch_size,
            sampler.steps_per_epoch,
            sampler.num_steps,
        ),
        train_loss=state.totals.loss_sum / state.totals.num_steps,
        val_loss=evaluation.loss,
        top1=evaluation.top1,
        top5=evaluation.top5,
        images_per_s=state.totals.num_images / state.totals.seconds,
        elapsed_s=state.elapsed_s,
    )


def describe(metrics: EpochMetrics, num_epochs: int, num_stages: int) -> str:
    """Write an epoch as one line for the log."""
    return (
        f"epoch {metrics.epoch:3d}/{num_epochs}  stage {metrics.stage}/{num_stages}  "
        f"{metrics.image_size:3d} px  loss {metrics.train_loss:.3f}  "
        f"held-out loss {metrics.val_loss:.3f}  top-1 {100 * metrics.top1:5.1f} %  "
        f"{metrics.images_per_s:5.0f} images/s  {format_seconds(metrics.elapsed_s)}"
    )


def log_recipe(config: TrainConfig) -> None:
    """Print every value that decides the run, and what the stages make of them."""
    log.info("recipe %s", config.variant)
    for name, value in config_to_json(config).items():
        parts = value.items() if isinstance(value, dict) else ()
        for part, part_value in parts:
            log.info("  %-36s %s", f"{name}.{part}", part_value)
        if not parts:
            log.info("  %-36s %s", name, value)
    log.info("  stage  image size  RandAugment  Mixup alpha  dropout")
    for stage in plan_stages(config.progressive):
        log.info(
            "  %5d  %7d px  %11.2f  %11.3f  %7.3f",
            stage.index + 1,
            stage.image_size,
            stage.randaugment_magnitude,
            stage.mixup_alpha,
            stage.dropout_rate,
        )


if __name__ == "__main__":
    run_command(lambda: parse(sys.argv[1:]), main)
