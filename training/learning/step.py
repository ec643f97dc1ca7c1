"""Batches -> one optimizer step: forward and backward passes, update, moving average.

Nothing in a step waits for a GPU: the learning rate is a number, the dropout rate a tensor that is
filled, the loss stays on the device until somebody reads it. (With fp16 the scaler reads whether
gradients overflowed, once a step.)
"""

import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from efficientnet.images.preprocess_spec import PreprocessSpec
from training.batches.loader import Batch
from training.batches.mixing import mix
from training.batches.randaugment import BatchRandAugment
from training.batches.sampler import seed_of
from training.learning.batch_norm import StepStatistics
from training.learning.distributed import Ranks
from training.learning.memory import BatchTooLargeError
from training.learning.state import TrainState
from training.recipe.config import TrainConfig
from training.recipe.stages import Stage

AUTOCAST_TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainStep:
    """An optimizer step on the device, the same on one process and on each of many.

    `state` is changed in place; of `preprocess` mean and std are used.
    """

    def __init__(
        self,
        state: TrainState,
        config: TrainConfig,
        ranks: Ranks,
        num_classes: int,
        preprocess: PreprocessSpec,
    ) -> None:
        self._state = state
        self._config = config
        self._ranks = ranks
        self._num_classes = num_classes
        self._autocast_type = AUTOCAST_TYPES[config.precision]
        self._statistics = StepStatistics(state.model)
        self._compiled_for: object = None
        device = state.device
        mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
        self._scale = (1 / (255 * std)).to(device)[:, None, None]
        self._shift = (-mean / std).to(device)[:, None, None]
        self._stage: Stage | None = None
        self._augment: BatchRandAugment | None = None
        self._network: nn.Module = state.model
        if ranks.world_size > 1:
            # The statistics of batch norm are averaged by StepStatistics, not taken from rank 0.
            # torch 2.14 has renamed the setting.
            parameters = inspect.signature(DistributedDataParallel).parameters
            is_renamed = "forward_sync_buffers" in parameters
            options: dict[str, Any] = {
                "forward_sync_buffers" if is_renamed else "broadcast_buffers": False
            }
            self._network = DistributedDataParallel(
                state.model,
                device_ids=[device] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **options,
            )

    def begin_stage(self, stage: Stage, micro_batch_size: int) -> None:
        """Set what a stage changes; compile the network if it is to be and the shape is new."""
        self._stage = stage
        # Within a stage all shapes are the same, so that trying out kernels pays.
        torch.backends.cudnn.benchmark = True
        # As cuDNN's convolutions do by default; squeeze-excite and classifier are matrices.
        torch.backends.cuda.matmul.allow_tf32 = True
        self._state.model.dropout.set_rate(stage.dropout_rate)
        self._augment = None
        if self._config.augment_on == "device" and stage.randaugment_magnitude:
            num_layers = self._config.num_randaugment_layers
            self._augment = BatchRandAugment(stage.randaugment_magnitude, num_layers)
        shape = (stage.image_size, micro_batch_size)
        if self._config.compile and self._compiled_for != shape:
            # The last stage's graphs are dropped: they would count against torch's limit on graphs
            # of one function, after which it silently stops compiling.
            torch.compiler.reset()
            self._state.model.compile(dynamic=False)
            self._compiled_for = shape

    def reserve_memory(self, image_size: int, micro_batch_size: int) -> None:
        """Make one pass of a size without a step, so that its memory is taken in one piece.

        A GPU's allocator that has grown with the stages is left with pieces too small for the last.
        """
        state = self._state
        shape = (micro_batch_size, 3, image_size, image_size)
        images = torch.zeros(shape, device=state.device)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(micro_batch_size, dtype=torch.int64, device=state.device)
        before = [buffer.clone() for buffer in state.model.buffers()]
        try:
            with self._autocast():
                # Not called: a compiled network would be compiled for this size out of turn.
                logits = state.model.forward(images)
            cross_entropy(logits.float(), labels).backward()
        except torch.OutOfMemoryError as error:
            raise BatchTooLargeError(
                f"{state.device} cannot hold a pass of {micro_batch_size} images of {image_size} "
                f"px: {str(error).partition('. ')[0]}; give a smaller --micro-batch-size"
            ) from None
        finally:
            for buffer, value in zip(state.model.buffers(), before, strict=True):
                buffer.copy_(value)
            state.optimizer.zero_grad()

    def _autocast(self) -> torch.autocast:
        is_enabled = self._autocast_type is not None
        return torch.autocast(self._state.device.type, self._autocast_type, enabled=is_enabled)

    def __call__(
        self, batches: Iterator[Batch], num_passes: int, learning_rate: float, stop: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take one step, of so many passes of this process.

        `batches` may be on the CPU or already on the device; `stop` is a scalar, whether this
        process was asked to stop. Returns on the device the mean loss over all passes of all
        processes, and the fraction of the processes that were asked to stop.
        """
        state, config = self._state, self._config
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate
        self._statistics.begin_step(num_passes)
        losses: list[Tensor] = []
        for index in range(num_passes):
            is_last = index + 1 == num_passes
            torch.manual_seed(
                seed_of(
                    config,
                    f"attempt {state.attempt} step {state.step}",
                    f"pass {self._ranks.rank * num_passes + index}",
                )
            )
            images, labels = self._prepare(next(batches))
            # Gradients travel once a step, with the last backward pass.
            quiet = (
                self._network.no_sync()
                if isinstance(self._network, DistributedDataParallel) and not is_last
                else nullcontext()
            )
            with quiet:
                with self._autocast():
                    logits = self._network(images)
                loss = cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
                state.scaler.scale(loss / num_passes).backward()
            losses.append(loss.detach())
            self._statistics.end_pass(num_passes)
        mean_loss = losses[0] if num_passes == 1 else torch.stack(losses).mean()
        mean_loss, stopped = self._statistics.end_step(num_passes, [mean_loss, stop])
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
        state.average.update()
        state.step += 1
        return mean_loss, stopped

    def _prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert self._stage is not None, "begin_stage comes first"
        device = self._state.device
        images = batch.images.to(device, non_blocking=True)
        labels = batch.labels.to(device, non_blocking=True)
        if self._augment:
            images = self._augment(images, batch.seeds)
        images = torch.addcmul(self._shift, images, self._scale)
        images = images.contiguous(memory_format=torch.channels_last)
        return mix(
            images, labels, self._stage.mixup_alpha, self._stage.cutmix_alpha, self._num_classes
        )
