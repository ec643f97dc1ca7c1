"""A run and its state -> a trained run: epochs, evaluation, checkpoints, report."""

import copy
import errno
import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor

from efficientnet.formats.class_accuracy import is_at_chance
from efficientnet.machine.environment import current_environment, num_usable_cores
from efficientnet.reporting.tables import format_percent
from training.batches.loader import (
    Batch,
    LoaderError,
    eval_batches,
    explained_worker_deaths,
    train_batches,
)
from training.batches.prefetch import on_device
from training.batches.sampler import StepPlan, StepSampler
from training.learning.distributed import Ranks, broadcast_from_rank0, local_world_size
from training.learning.epoch import (
    Evaluation,
    LossError,
    StepReport,
    TrainingError,
    evaluate,
    train_epoch,
)
from training.learning.optim import learning_rate_at
from training.learning.state import EpochTotals, TrainState
from training.learning.step import TrainStep
from training.recipe.stages import Stage
from training.running.metrics import EpochMetrics
from training.running.progress import InterruptFlag, ProgressBar, format_seconds
from training.running.report import FinalEvaluation, StageResult, write_report
from training.running.run_folder import (
    CheckpointWriter,
    Run,
    point_latest_to,
    publish,
    read_run,
    remove_unfinished,
)
from training.running.tensorboard_log import TensorBoardLog

EVAL_BATCH_SIZE = 64

MAX_ROLLBACKS = 3

# Times the loss of guessing, ln(classes), from which on a mean training loss is no chance, and a
# held-out loss no mere overconfidence.
WORSE_THAN_GUESSING, EXPLODED = 1.1, 3.0

log = logging.getLogger(__name__)


class Trainer:
    """Trains a run to its end, in one process or as one of several.

    Args:
        run: where, what and on which images.
        state: new or restored; changed in place.
        ranks: of the processes.
        plan: of the steps.
        stages: of progressive learning.
    """

    def __init__(
        self,
        run: Run,
        state: TrainState,
        ranks: Ranks,
        plan: StepPlan,
        stages: tuple[Stage, ...],
    ) -> None:
        self.run, self.state, self.ranks, self.plan, self.stages = run, state, ranks, plan, stages
        # Of its own, so that an evaluation never meets a compiled network or DDP.
        self._evaluated_model = copy.deepcopy(state.model)
        self._step = TrainStep(
            state, run.config, ranks, len(run.dataset.class_names), run.preprocess
        )
        self._num_workers = num_workers(run)

    def fit(self) -> None:
        """Train to the last step; evaluate, save and draw after each epoch; report.

        Raises:
            TrainingError: the loss is not finite, and training is not to be taken back, or was
                so too often; a checkpoint could not be written, or a loader's process died.
            KeyboardInterrupt: this process or another one was asked to stop; all is saved.
        """
        try:
            with explained_worker_deaths():
                self._fit()
        except KeyboardInterrupt as interrupt:
            reason = str(interrupt) or "interrupted"
            raise type(interrupt)(f"{reason}; {self._how_to_go_on()}") from None
        except (LoaderError, OSError) as error:
            reason = str(error)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                reason = f"the disk is full ({error}): free some space"
            raise TrainingError(f"{reason}; {self._how_to_go_on()}") from error

    def _how_to_go_on(self) -> str:
        run = self.run
        if not run.checkpoint.exists():
            return "no checkpoint has been written: start again"
        return (
            f"the newest checkpoint is {run.checkpoint.resolve()}; go on with: "
            f"python training/run.py --resume {run.directory}"
        )

    def _fit(self) -> None:
        run, state, ranks = self.run, self.state, self.ranks
        if ranks.is_main:
            run.directory.mkdir(parents=True, exist_ok=True)
            remove_unfinished(run.directory, state.step)
            if state.step:
                publish(run, state.best, state.history)
        has_ended = False
        writer = CheckpointWriter(run) if ranks.is_main else None
        with ExitStack() as stack:
            if ranks.is_main:
                self._board = stack.enter_context(TensorBoardLog(run.directory, state.step))
            self._bar = stack.enter_context(ProgressBar(self.stages, self.plan, state.step, ranks))
            self._bar.top1 = state.history[-1]["top1"] if state.history else None
            interrupt = stack.enter_context(InterruptFlag())
            try:
                self._train(writer, interrupt)
                has_ended = True
            finally:
                if writer:
                    writer.close(has_ended)
        self._finish()

    def _train(self, writer: CheckpointWriter | None, interrupt: InterruptFlag) -> None:
        state, plan = self.state, self.plan
        if state.device.type == "cuda" and state.step < plan.num_steps:
            sizes = [(s.image_size, plan.micro_batch_sizes[s.index]) for s in self.stages]
            state.model.train()
            self._step.reserve_memory(*max(sizes, key=lambda size: size[0] ** 2 * size[1]))
        every = self.run.config.checkpoint_every_steps
        batches = self._batches()
        while state.step < plan.num_steps:
            try:
                stopped = train_epoch(
                    state,
                    self._step,
                    plan,
                    self.stages,
                    batches,
                    lambda: interrupt.is_set,
                    self._on_step,
                    every - state.step % every if every else None,
                )
            except LossError as error:
                if writer:
                    writer.wait()
                # Told by rank 0, which alone knows when the last one was written.
                newest = self.run.checkpoint
                kept = broadcast_from_rank0(newest.resolve() if newest.exists() else None)
                self._roll_back(error, kept)
                batches = self._batches()
                continue
            evaluation = self._end_epoch() if plan.ends_epoch(state.step) else None
            if writer:
                writer.save(state, plan.epoch_of(state.step), evaluation)
            if stopped and state.step < plan.num_steps:
                if writer:
                    writer.close(must_be_written=True)
                raise KeyboardInterrupt(f"interrupted at step {state.step} of {plan.num_steps}")

    def _batches(self) -> Iterator[Batch]:
        state = self.state
        sampler = StepSampler(self.plan, self.ranks.rank, state.step, state.attempt)
        loader = train_batches(
            self.run.dataset.train, self.run.config, self.stages, sampler, self._num_workers
        )
        return iter(on_device(loader, state.device))

    def _on_step(self, report: StepReport) -> None:
        self._bar.update(report)
        if self.ranks.is_main:
            self._board.on_step(report)

    def _end_epoch(self) -> Evaluation:
        state = self.state
        began = perf_counter()
        evaluation = self._evaluate(state.average.tensors, self.run.preprocess.image_size)
        state.elapsed_s += perf_counter() - began
        metrics = epoch_metrics(self.stages, self.plan, state, evaluation)
        state.history.append(metrics.model_dump())
        if state.best is None or evaluation.top1 > state.best["top1"]:
            state.best = {"step": state.step, "top1": evaluation.top1}
        state.totals = EpochTotals()
        self._bar.top1 = evaluation.top1
        if self.ranks.is_main:
            self._bar.write(describe(metrics, self.plan.num_epochs, len(self.stages)))
            for warning in signs_of_failure(metrics, len(self.run.dataset.class_names)):
                self._bar.write(f"epoch {metrics.epoch:3d}: {warning}")
            self._board.on_epoch(metrics)
        return evaluation

    def _evaluate(self, weights: dict[str, Tensor], image_size: int) -> Evaluation:
        ranks, model = self.ranks, self._evaluated_model
        model.load_state_dict(weights)
        spec = self.run.preprocess.model_copy(update={"image_size": image_size})
        # Every image once: a part that is one image shorter than the others is no harm.
        part = self.run.dataset.val[ranks.rank :: ranks.world_size]
        batches = eval_batches(part, spec, EVAL_BATCH_SIZE, self._num_workers)
        return evaluate(model, batches, self.state.device)

    def _roll_back(self, error: LossError, kept: Path | None) -> None:
        run, state = self.run, self.state
        if run.config.on_nan == "stop" or kept is None or state.attempt == MAX_ROLLBACKS:
            again = f" after {state.attempt} rollbacks" if state.attempt else ""
            raise TrainingError(
                f"{error}{again}; the last good checkpoint: {kept or 'none, it failed too early'}; "
                "lower --optimizer.learning-rate, give it a longer warm-up, or --on-nan rollback"
            ) from None
        attempt = state.attempt + 1
        state.load_dict(read_run(kept).state)
        state.attempt = attempt
        log.warning(
            "%s; back to step %d (%s), on with other random numbers: rollback %d of %d",
            error,
            state.step,
            kept,
            attempt,
            MAX_ROLLBACKS,
        )

    def _finish(self) -> None:
        """Evaluate raw and averaged weights at both sizes; write the report; point to the run."""
        run, state, plan = self.run, self.state, self.plan
        sizes = {self.stages[-1].image_size, run.preprocess.image_size}
        both: tuple[tuple[Literal["averaged", "raw"], dict[str, Tensor]], ...] = (
            ("averaged", state.average.tensors),
            ("raw", state.model.state_dict()),
        )
        evaluations = [
            FinalEvaluation(
                weights=name,
                image_size=size,
                is_train_size=size == self.stages[-1].image_size,
                result=self._evaluate(weights, size),
            )
            for name, weights in both
            for size in sorted(sizes)
        ]
        if not self.ranks.is_main:
            return
        results = [
            StageResult(
                stage=stage,
                micro_batch_size=plan.micro_batch_sizes[stage.index],
                gradient_accumulation_steps=run.config.batch_size
                // plan.micro_batch_sizes[stage.index],
                num_steps=plan.num_steps_of_stage(stage.index),
                num_images=state.stages[stage.index].num_images,
                seconds=state.stages[stage.index].seconds,
                peak_memory_bytes=state.stages[stage.index].peak_memory_bytes,
            )
            for stage in self.stages
        ]
        final = evaluations[sorted(sizes).index(run.preprocess.image_size)].result
        classes = final.classes
        if is_at_chance(final.top1, classes.largest_share, final.num_images):
            log.warning(
                "top-1 %s is not clearly above always naming the largest class, '%s': %s; the "
                "network has not learned to tell the classes apart",
                format_percent(final.top1),
                run.dataset.class_names[classes.largest],
                format_percent(classes.largest_share),
            )
        write_report(
            run.directory,
            run.config,
            run.dataset.class_names,
            len(run.dataset.train),
            len(run.dataset.val),
            results,
            evaluations,
            [EpochMetrics(**epoch) for epoch in state.history],
            current_environment(),
            device_name(state.device),
            self.ranks.world_size,
        )
        point_latest_to(run.directory)


def num_workers(run: Run) -> int:
    """Count the processes that decode and augment for one training process."""
    if run.config.num_workers is not None:
        return run.config.num_workers
    if run.config.data is None:
        return 0
    return max(1, num_usable_cores() // local_world_size())


def device_name(device: torch.device) -> str:
    """Name the device for a person."""
    return "the CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)


def epoch_metrics(
    stages: tuple[Stage, ...], plan: StepPlan, state: TrainState, evaluation: Evaluation
) -> EpochMetrics:
    """Sum up the epoch that has just ended."""
    last_step = state.step - 1
    stage = stages[plan.stage_of(last_step)]
    config = plan.config
    return EpochMetrics(
        epoch=plan.epoch_of(state.step),
        step=state.step,
        stage=stage.index + 1,
        image_size=stage.image_size,
        learning_rate=learning_rate_at(
            last_step, config.optimizer, config.batch_size, plan.steps_per_epoch, plan.num_steps
        ),
        train_loss=state.totals.loss_sum / state.totals.num_steps,
        val_loss=evaluation.loss,
        top1=evaluation.top1,
        top5=evaluation.top5,
        balanced_accuracy=evaluation.classes.balanced,
        images_per_s=state.totals.num_images / state.totals.seconds,
        elapsed_s=state.elapsed_s,
    )


def signs_of_failure(metrics: EpochMetrics, num_classes: int) -> list[str]:
    """Tell what is wrong with an epoch's losses: they are compared with those of guessing."""
    guessing = math.log(num_classes)
    signs: list[str] = []
    # A uniform guess has this loss whatever the labels are smoothed or mixed with.
    if metrics.train_loss > WORSE_THAN_GUESSING * guessing and metrics.epoch > 1:
        signs.append(
            f"the training loss {metrics.train_loss:.3g} is worse than guessing ({guessing:.2f}): "
            "if it does not fall, stop, and lower --optimizer.learning-rate"
        )
    if metrics.val_loss > EXPLODED * guessing:
        signs.append(
            f"the held-out loss {metrics.val_loss:,.5g} has exploded, guessing has {guessing:.2f}: "
            + (
                "the averaged weights still hold those of the first steps, or "
                if metrics.epoch <= 2
                else ""
            )
            + "the learning rate is too high (--optimizer.learning-rate), or the steps are too few "
            "for batch norm's statistics (--batch-norm-momentum) and the moving average"
        )
    return signs


def describe(metrics: EpochMetrics, num_epochs: int, num_stages: int) -> str:
    """Write an epoch as one line for the log."""
    return (
        f"epoch {metrics.epoch:3d}/{num_epochs}  stage {metrics.stage}/{num_stages}  "
        f"{metrics.image_size:3d} px  loss {metrics.train_loss:.3f}  "
        f"held-out loss {metrics.val_loss:.3f}  top-1 {100 * metrics.top1:5.1f} %  "
        f"{metrics.images_per_s:5.0f} images/s  {format_seconds(metrics.elapsed_s)}"
    )
