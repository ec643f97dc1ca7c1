"""A recipe or a run to go on with -> Run: data, plan and state; then the Trainer."""

import logging
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from efficientnet.command import PROJECT_LOGGERS
from efficientnet.formats.checkpoint import CheckpointError, read_checkpoint
from efficientnet.machine.locking import LockedError, locked_folder
from training.batches.sampler import StepPlan
from training.inputs.initial_weights import load_start, log_start
from training.inputs.training_data import load_training_data
from training.learning import distributed, memory
from training.learning.state import new_state
from training.recipe import config as recipe_config
from training.recipe.config import TrainConfig
from training.recipe.stages import plan_stages
from training.running import run_folder
from training.running.command_line import ResumeConfig
from training.running.trainer import Trainer

# Of the steps; and the weight of the initial batch norm statistics after the last step.
MAX_WARMUP_SHARE, MAX_INITIAL_SHARE = 0.5, 0.01

log = logging.getLogger(__name__)


def main(command: TrainConfig | ResumeConfig) -> Path | None:
    """Train, or go on training; return the checkpoint's directory, in rank 0."""
    ranks = distributed.join_ranks()
    try:
        if not ranks.is_main:
            for name in PROJECT_LOGGERS:
                logging.getLogger(name).setLevel(logging.ERROR)
        if isinstance(command, TrainConfig):
            command.require_stages_fit()
        directory = directory_of(command)
        with _kept_from_others(directory, ranks):
            run = begin_run(command, directory, ranks)
            if run is not None:
                Trainer(run).fit()
        return directory / run_folder.CHECKPOINT if ranks.is_main else None
    finally:
        distributed.leave_ranks()


@contextmanager
def _kept_from_others(directory: Path, ranks: distributed.Ranks) -> Generator[None]:
    # Rank 0 holds the lock, and the others end with it if it cannot.
    with ExitStack() as stack:
        problem: Exception | None = None
        if ranks.is_main:
            try:
                stack.enter_context(locked_folder(directory))
            except (LockedError, OSError) as error:
                problem = error
        problem = distributed.broadcast_from_rank0(problem)
        if problem is not None:
            raise problem
        yield


def begin_run(
    command: TrainConfig | ResumeConfig, directory: Path, ranks: distributed.Ranks
) -> run_folder.Run | None:
    """Return what to train with, new or saved; None: the run is complete."""
    if isinstance(command, TrainConfig) and distributed.broadcast_from_rank0(
        run_folder.is_complete(directory)
    ):
        record = read_checkpoint(directory / run_folder.CHECKPOINT)
        require_same_recipe(command, recipe_config.config_from_json(record.train_config), directory)
        log.info("%s is complete: nothing to train", directory)
        return None
    saved, weights = find_run(command, directory), None
    if saved:
        config, preprocess, network = saved.config, saved.record.preprocess, saved.record.network
        if isinstance(command, TrainConfig):
            config = require_same_recipe(command, config, directory)
        elif command.config is not None:
            config = require_same_run(command.config, config, directory)
        log.info("go on with %s at step %d", directory, saved.record.step)
    else:
        assert isinstance(command, TrainConfig)
        config, weights = command, load_start(command)
        preprocess = config.preprocess_spec(weights.preprocess if weights else None)
        network = config.network_options(weights.network if weights else None)
    stages = plan_stages(config.progressive, config.seed)
    memory.require_batch_norm_fits(config, stages, ranks.world_size)

    dataset = load_training_data(config, ranks, saved.left_out if saved else None)
    # After what can be wrong with the data, so that an error is not the 46th line.
    log_recipe(config)
    num_classes = len(dataset.class_names)
    if saved:
        saved.require_dataset(dataset)
    if saved and saved.state["world_size"] == ranks.world_size:
        sizes = tuple(saved.state["micro_batch_sizes"])
    else:
        limit = memory.USABLE_SHARE * memory.device_memory_bytes(ranks.device)
        # On the CPU the processes of a machine share its memory.
        limit /= 1 if ranks.device.type == "cuda" else distributed.local_world_size()
        sizes = distributed.broadcast_from_rank0(
            memory.plan_micro_batches(config, network, num_classes, stages, ranks.world_size, limit)
        )
    plan = StepPlan(len(dataset.train), config, sizes, ranks.world_size)
    if weights:
        log_start(weights, num_classes)
    tensors = weights.tensors if weights else None
    state = new_state(config, network, num_classes, ranks.device, tensors)
    if saved:
        state.load_dict(saved.state)
    state.micro_batch_sizes, state.world_size = plan.micro_batch_sizes, plan.world_size
    run = run_folder.Run(
        directory, config, dataset, preprocess, network, ranks, stages, plan, state
    )
    log_plan(run)
    return run


def directory_of(command: TrainConfig | ResumeConfig) -> Path:
    """Return the directory of the run that is begun or gone on with.

    Raises:
        ValueError: torchrun may start the processes again, and the run could not be found then.
    """
    if isinstance(command, ResumeConfig):
        directory, checkpoint = run_folder.run_of(command.resume)
        if not checkpoint.is_dir():
            run_folder.read_run(command.resume)  # It says what is missing.
        if distributed.may_be_restarted() and command.resume.resolve() != directory.resolve():
            raise ValueError(
                f"torchrun --max-restarts would go back to {command.resume} at each restart; start "
                f"it without, or give the run, --resume {directory}"
            )
        return directory
    if command.name is None:
        if distributed.may_be_restarted():
            raise ValueError(
                "torchrun --max-restarts starts the processes again, which must find their run: "
                "give it a name with --name"
            )
        stamp = distributed.broadcast_from_rank0(datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ"))
        return command.output / f"{command.variant}-{stamp}"
    return command.output / command.name


def find_run(command: TrainConfig | ResumeConfig, directory: Path) -> run_folder.SavedRun | None:
    """Return what a run was saved with; None if it has not been begun."""
    if isinstance(command, ResumeConfig):
        return run_folder.read_run(command.resume, command.variant)
    # Rank 0 decides: another process may look while it already writes.
    is_begun = distributed.broadcast_from_rank0(
        (directory / run_folder.CHECKPOINT).is_symlink() and not run_folder.is_complete(directory)
    )
    return run_folder.read_run(directory, command.variant) if is_begun else None


def require_same_recipe(asked: TrainConfig, begun: TrainConfig, directory: Path) -> TrainConfig:
    """Return the recipe to go on with."""
    if changes := recipe_config.changed_values(
        recipe_config.config_to_json(begun), recipe_config.config_to_json(asked)
    ):
        raise CheckpointError(
            f"{directory} was begun with {'; '.join(changes)}: give the same values, or begin "
            "another run by another --name"
        )
    return asked


def require_same_run(asked: TrainConfig, begun: TrainConfig, directory: Path) -> TrainConfig:
    """Return the recipe to go on with where --resume and other flags are given.

    Data may be elsewhere now: its images are compared with the run's by their names and labels.
    """
    moved = replace(begun, data=asked.data, data_folder=asked.data_folder)
    if asked.name == directory.name:
        moved = replace(moved, name=asked.name)
    if asked.output != begun.output and asked.output.resolve() != directory.resolve().parent:
        raise CheckpointError(f"{directory} is not in --output {asked.output}: leave that out")
    return require_same_recipe(asked, moved, directory)


def log_recipe(config: TrainConfig) -> None:
    """Print every value that decides the run."""
    reason = f", for {config.recipe_reason}" if config.recipe_reason else ""
    log.info("recipe %s of %s%s", config.recipe, config.variant, reason)
    for name, value in recipe_config.flat_values(recipe_config.config_to_json(config)).items():
        log.info("  %-36s %s", name, value)


def misfits(plan: StepPlan) -> list[str]:
    """Tell which values of a recipe are made for more steps than the run has."""
    config, said = plan.config, list[str]()
    warmup_steps = config.optimizer.warmup_epochs * plan.steps_per_epoch
    if warmup_steps > MAX_WARMUP_SHARE * plan.num_steps:
        said.append(
            f"optimizer.warmup_epochs {config.optimizer.warmup_epochs:g} is more than half of the "
            f"{plan.num_steps} steps: the learning rate hardly falls again"
        )
    if (1 - config.batch_norm_momentum) ** plan.num_steps > MAX_INITIAL_SHARE:
        said.append(
            f"batch_norm_momentum {config.batch_norm_momentum:g} is small for {plan.num_steps} "
            "steps: the statistics that are deployed still hold the initial ones"
        )
    return said


def log_plan(run: run_folder.Run) -> None:
    """Print what is trained on, and what each stage makes of the recipe."""
    plan, dataset = run.plan, run.dataset
    log.info("  stage  image size  RandAugment  Mixup  CutMix  dropout   steps  passes x images")
    for stage in run.stages:
        micro_batch_size = plan.micro_batch_sizes[stage.index]
        num_passes = plan.config.batch_size // micro_batch_size
        log.info(
            f"  {stage.index + 1:5d}  {stage.image_size:7d} px  {stage.randaugment_magnitude:11.2f}"
            f"  {stage.mixup_alpha:5.3f}  {stage.cutmix_alpha:6.3f}  {stage.dropout_rate:7.3f}"
            f"  {plan.num_steps_of_stage(stage.index):6d}  {num_passes:6d} x {micro_batch_size}"
        )
    log.info(
        f"{len(dataset.train)} training and {len(dataset.val)} held-out images of "
        f"{len(dataset.class_names)} classes, {plan.steps_per_epoch} steps per epoch, on "
        f"{run.ranks.describe()}"
    )
    for misfit in misfits(plan):
        log.warning("%s; --recipe small follows from the number of images", misfit)
