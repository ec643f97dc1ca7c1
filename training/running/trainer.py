"""Run -> trained to its end: epochs, evaluation, checkpoints, report."""

import copy
import errno
import logging
import math
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter

import torch
from torch import Tensor

from efficientnet.errors import PipelineError
from efficientnet.formats.class_accuracy import is_at_chance
from efficientnet.machine.environment import num_usable_cores
from efficientnet.reporting.tables import format_percent
from training.batches import loader
from training.batches.loader import Batch
from training.batches.prefetch import on_device
from training.batches.sampler import StepSampler
from training.learning import memory
from training.learning.distributed import broadcast_from_rank0, local_world_size
from training.learning.evaluation import Evaluation, evaluate
from training.learning.optim import learning_rate_at
from training.learning.state import EpochTotals, StageTotals
from training.learning.step import TrainStep
from training.recipe.config import TrainConfig
from training.recipe.stages import Stage
from training.running import run_folder
from training.running.metrics import EpochMetrics, describe, signs_of_failure
from training.running.progress import ProgressBar, StepReport, stop_flag
from training.running.report import FinalEvaluation, write_report
from training.running.tensorboard_log import TensorBoardLog

# Reading the loss makes a GPU's queue run dry; every tenth pass is enough for the bar, for NaN and
# to see that the training is asked to stop.
PASSES_BETWEEN_READINGS = {"cpu": 1, "cuda": 10}

MAX_ROLLBACKS = 3

log = logging.getLogger(__name__)


class TrainingError(PipelineError):
    """Training that cannot go on."""


class LossError(TrainingError):
    """A loss, weights or running statistics that are not finite."""


class Trainer:
    """Trains a run to its end, in one process or as one of several."""

    def __init__(self, run: run_folder.Run) -> None:
        self._run, self._state, self._ranks = run, run.state, run.ranks
        self._plan, self._stages = run.plan, run.stages
        # Of its own, so that an evaluation never meets a compiled network or DDP.
        self._evaluated_model = copy.deepcopy(run.state.model)
        self._step = TrainStep(
            run.state, run.config, run.ranks, len(run.dataset.class_names), run.preprocess
        )
        self._num_workers = num_workers(run.config)
        self._board: TensorBoardLog | None = None
        self._writer: run_folder.CheckpointWriter | None = None

    def fit(self) -> None:
        """Train to the last step; evaluate, save and draw after each epoch; report.

        Raises:
            TrainingError: the loss is not finite, and training is not to be taken back, or was
                so too often; a checkpoint could not be written, or a loader's process died.
            KeyboardInterrupt: this process or another one was asked to stop; all is saved.
        """
        run, state, plan = self._run, self._state, self._plan
        with _told_how_to_go_on(run):
            with ExitStack() as stack:
                if self._ranks.is_main:
                    run.directory.mkdir(parents=True, exist_ok=True)
                    run_folder.remove_unfinished(run.directory, state.step)
                    if state.step:
                        run_folder.publish(run, state.best, state.history)
                    self._board = TensorBoardLog(run.directory, state.step)
                    stack.callback(self._board.close)
                self._bar = ProgressBar(self._stages, plan, state.step, self._ranks)
                stack.callback(self._bar.close)
                self._bar.top1 = state.history[-1]["top1"] if state.history else None
                self._stop = stack.enter_context(stop_flag())
                if self._ranks.is_main:
                    self._writer = stack.enter_context(run_folder.CheckpointWriter(run))
                self._reserve_memory()
                batches = self._batches()
                while state.step < plan.num_steps:
                    try:
                        is_stopped = self.train_epoch(batches)
                    except LossError as error:
                        self._roll_back(error)
                        batches = self._batches()
                        continue
                    evaluation = self._end_epoch() if plan.ends_epoch(state.step) else None
                    if self._writer:
                        self._writer.save(state, plan.epoch_of(state.step), evaluation)
                    if is_stopped and state.step < plan.num_steps:
                        if self._writer:
                            self._writer.close(must_be_written=True)
                        raise KeyboardInterrupt(
                            f"interrupted at step {state.step} of {plan.num_steps}"
                        )
            self._finish()

    def train_epoch(self, batches: Iterator[Batch]) -> bool:
        """Train to the end of the epoch under way, or to the next checkpoint within it.

        `batches` are forward passes, several to a step when gradients are accumulated. Returns
        whether a process was asked to stop; all stop after the same step.

        Raises:
            LossError: the loss, or at the end a weight or a running statistic, is not finite.
        """
        state, plan, config, device = self._state, self._plan, self._run.config, self._state.device
        totals = state.totals
        state.model.train()
        # Continued in the same precision, so that a resumed epoch adds up to the very same sum.
        loss_sum = torch.tensor(totals.loss_sum, dtype=torch.float64, device=device)
        unread: list[Tensor] = []
        loss: float | None = None
        began = perf_counter()
        seconds_before, images_before = totals.seconds, totals.num_images
        is_last = is_stopped = False
        while not is_last:
            stage = self._stages[plan.stage_of(state.step)]
            self._step.begin_stage(stage, plan.micro_batch_sizes[stage.index])
            stage_totals = state.stages.setdefault(stage.index, StageTotals())
            # All of its steps take the same: to start a count anew in each epoch would cost time.
            is_memory_counted = not stage_totals.num_images
            if is_memory_counted:
                memory.give_back_freed_memory(device)
                is_memory_counted = memory.reset_peak_memory(device)
            stage_began, ends_stage = perf_counter(), False
            while not is_last and not ends_stage:
                rate = self._learning_rate(state.step)
                # Filled where it is needed: to copy it there would wait for the device.
                stop = torch.full((), float(self._stop.is_set), device=device)
                num_passes = plan.gradient_accumulation_steps(state.step)
                step_loss, stops = self._step(batches, num_passes, rate, stop)
                loss_sum += step_loss
                unread.append(step_loss)
                totals.num_steps += 1
                totals.num_images += config.batch_size
                stage_totals.num_images += config.batch_size

                is_last = plan.ends_epoch(state.step) or (
                    config.checkpoint_every_steps is not None
                    and state.step % config.checkpoint_every_steps == 0
                )
                ends_stage = is_last or plan.stage_of(state.step) != stage.index
                every = max(1, PASSES_BETWEEN_READINGS[device.type] // num_passes)
                if ends_stage or state.step % every == 0:
                    loss = self._read(unread, stage)
                    unread = []
                    is_stopped = stops.item() > 0
                    is_last = is_last or is_stopped
                elapsed_s = perf_counter() - began
                totals.seconds = seconds_before + elapsed_s
                images_per_s = (totals.num_images - images_before) / elapsed_s
                report = StepReport(state.step, stage, loss, rate, images_per_s)
                self._bar.update(report)
                if self._board:
                    self._board.on_step(report)
            stage_totals.seconds += perf_counter() - stage_began
            if is_memory_counted:
                stage_totals.peak_memory_bytes = memory.peak_memory_bytes(device)
        totals.loss_sum = loss_sum.item()
        state.elapsed_s += perf_counter() - began
        broken = state.first_not_finite()
        if broken is not None:
            raise LossError(f"{broken} is not finite after step {state.step} of {plan.num_steps}")
        return is_stopped

    def _read(self, losses: list[Tensor], stage: Stage) -> float:
        # The last of the losses of a stage since they were read; waits for the device.
        values = torch.stack(losses).tolist()
        for offset, value in enumerate(values):
            if not math.isfinite(value):
                raise LossError(
                    f"the loss is {value} at step {self._state.step - len(values) + 1 + offset} of "
                    f"{self._plan.num_steps} (stage {stage.index + 1} of {len(self._stages)}, "
                    f"{stage.image_size} px)"
                )
        return values[-1]

    def _learning_rate(self, step: int) -> float:
        config, plan = self._run.config, self._plan
        return learning_rate_at(
            step, config.optimizer, config.batch_size, plan.steps_per_epoch, plan.num_steps
        )

    def _reserve_memory(self) -> None:
        state, plan = self._state, self._plan
        if state.device.type == "cuda" and state.step < plan.num_steps:
            sizes = [(s.image_size, plan.micro_batch_sizes[s.index]) for s in self._stages]
            state.model.train()
            self._step.reserve_memory(*max(sizes, key=lambda size: size[0] ** 2 * size[1]))

    def _batches(self) -> Iterator[Batch]:
        run, state = self._run, self._state
        sampler = StepSampler(self._plan, self._ranks.rank, state.step, state.attempt)
        batches = loader.train_batches(
            run.dataset.train, run.config, self._stages, sampler, self._num_workers
        )
        return iter(on_device(batches, state.device))

    def _end_epoch(self) -> Evaluation:
        state, plan = self._state, self._plan
        began = perf_counter()
        evaluation = self._evaluate(state.average.tensors, self._run.preprocess.image_size)
        state.elapsed_s += perf_counter() - began
        last_step = state.step - 1
        stage = self._stages[plan.stage_of(last_step)]
        metrics = EpochMetrics(
            epoch=plan.epoch_of(state.step),
            step=state.step,
            stage=stage.index + 1,
            image_size=stage.image_size,
            learning_rate=self._learning_rate(last_step),
            train_loss=state.totals.loss_sum / state.totals.num_steps,
            val_loss=evaluation.loss,
            top1=evaluation.top1,
            top5=evaluation.top5,
            balanced_accuracy=evaluation.classes.balanced,
            images_per_s=state.totals.num_images / state.totals.seconds,
            elapsed_s=state.elapsed_s,
        )
        state.history.append(metrics.model_dump())
        if state.best is None or evaluation.top1 > state.best["top1"]:
            state.best = {"step": state.step, "top1": evaluation.top1}
        state.totals = EpochTotals()
        self._bar.top1 = evaluation.top1
        if self._board:
            self._bar.write(describe(metrics, plan.num_epochs, len(self._stages)))
            for warning in signs_of_failure(metrics, len(self._run.dataset.class_names)):
                self._bar.write(f"epoch {metrics.epoch:3d}: {warning}")
            self._board.on_epoch(metrics)
        return evaluation

    def _evaluate(self, weights: dict[str, Tensor], image_size: int) -> Evaluation:
        ranks, model = self._ranks, self._evaluated_model
        model.load_state_dict(weights)
        spec = self._run.preprocess.model_copy(update={"image_size": image_size})
        # Every image once: a part that is one image shorter than the others is no harm.
        part = self._run.dataset.val[ranks.rank :: ranks.world_size]
        batches = loader.eval_batches(part, spec, self._num_workers)
        return evaluate(model, batches, self._state.device)

    def _roll_back(self, error: LossError) -> None:
        run, state = self._run, self._state
        if self._writer:
            self._writer.wait()
        # Told by rank 0, which alone knows when the last one was written.
        kept = broadcast_from_rank0(run.checkpoint.resolve() if run.checkpoint.exists() else None)
        if run.config.on_nan == "stop" or kept is None or state.attempt == MAX_ROLLBACKS:
            again = f" after {state.attempt} rollbacks" if state.attempt else ""
            raise TrainingError(
                f"{error}{again}; the last good checkpoint: {kept or 'none, it failed too early'}; "
                "lower --optimizer.learning-rate, give it a longer warm-up, or --on-nan rollback"
            ) from None
        attempt = state.attempt + 1
        state.load_dict(run_folder.read_run(kept).state)
        state.attempt = attempt
        log.warning(
            f"{error}; back to step {state.step} ({kept}), on with other random numbers: rollback "
            f"{attempt} of {MAX_ROLLBACKS}"
        )

    def _finish(self) -> None:
        """Evaluate raw and averaged weights at both sizes; write the report; point to the run."""
        run, state = self._run, self._state
        averaged, raw = state.average.tensors, state.model.state_dict()
        sizes = sorted({self._stages[-1].image_size, run.preprocess.image_size})
        evaluations = [
            *(FinalEvaluation("averaged", size, self._evaluate(averaged, size)) for size in sizes),
            *(FinalEvaluation("raw", size, self._evaluate(raw, size)) for size in sizes),
        ]
        if not self._ranks.is_main:
            return
        final = evaluations[sizes.index(run.preprocess.image_size)].result
        classes = final.classes
        if is_at_chance(final.top1, classes.largest_share, final.num_images):
            log.warning(
                f"top-1 {format_percent(final.top1)} is not clearly above always naming the "
                f"largest class, '{run.dataset.class_names[classes.largest]}': "
                f"{format_percent(classes.largest_share)}; the network has not learned to tell "
                "the classes apart"
            )
        write_report(run, evaluations)
        run_folder.point_latest_to(run.directory)


@contextmanager
def _told_how_to_go_on(run: run_folder.Run) -> Generator[None]:
    # What ends a training says where it can be gone on with.
    def reason_and_how(reason: str) -> str:
        if not run.checkpoint.exists():
            return f"{reason}; no checkpoint has been written: start again"
        return (
            f"{reason}; the newest checkpoint is {run.checkpoint.resolve()}; go on with: "
            f"python training/run.py --resume {run.directory}"
        )

    try:
        with loader.explained_worker_deaths():
            yield
    except KeyboardInterrupt as interrupt:
        raise type(interrupt)(reason_and_how(str(interrupt) or "interrupted")) from None
    except (loader.LoaderError, OSError) as error:
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = f"the disk is full ({error}): free some space" if is_full else str(error)
        raise TrainingError(reason_and_how(reason)) from error


def num_workers(config: TrainConfig) -> int:
    """Count the processes that decode and augment for one training process."""
    if config.num_workers is not None:
        return config.num_workers
    if config.data is None:
        return 0
    return max(1, num_usable_cores() // local_world_size())
