"""Number of images, seed and step -> the images of each forward pass, and who computes it.

What a pass computes follows from the seed, the step and the pass alone: its images, their
augmentation and its random numbers are the same on one process and on many, and after a resumption.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch.utils.data import Sampler

from training.recipe.config import TrainConfig
from training.recipe.stages import stage_index


class SampleKey(NamedTuple):
    """One use of a training image: which, at which stage, with which random numbers."""

    image: int
    stage: int
    seed: int


class StepPlan:
    """How many steps there are, and how many images a forward pass of each stage takes.

    Images that do not fill an epoch's last batch begin the next one: each pass over the set takes
    each image once. `micro_batch_sizes` are images per forward pass at each stage; the processes
    share the passes of a step evenly.
    """

    def __init__(
        self,
        num_images: int,
        config: TrainConfig,
        micro_batch_sizes: Sequence[int],
        world_size: int = 1,
    ) -> None:
        self.steps_per_epoch = num_images // config.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"{num_images} training images do not fill one batch of {config.batch_size}; "
                f"give --batch-size (and --micro-batch-size) of at most {num_images}"
            )
        self.num_steps = config.steps or self.steps_per_epoch * config.epochs
        self.num_epochs = -(-self.num_steps // self.steps_per_epoch)
        self.num_stages = len(micro_batch_sizes)
        self.micro_batch_sizes = tuple(micro_batch_sizes)
        self.world_size = world_size
        for size in micro_batch_sizes:
            require_even_shares(config.batch_size, size, world_size)
        self.num_images = num_images
        self.config = config

    def stage_of(self, step: int) -> int:
        """Return the index of a step's stage."""
        return stage_index(step, self.num_steps, self.num_stages)

    def gradient_accumulation_steps(self, step: int) -> int:
        """Count a process's forward passes in a step, whose gradients are added up."""
        micro_batch_size = self.micro_batch_sizes[self.stage_of(step)]
        return self.config.batch_size // (micro_batch_size * self.world_size)

    def ends_epoch(self, steps_done: int) -> bool:
        """Tell whether an epoch, or the training, ends after so many steps."""
        return steps_done % self.steps_per_epoch == 0 or steps_done == self.num_steps

    def epoch_of(self, steps_done: int) -> int:
        """Count the epochs that are whole, or last, after so many steps."""
        if steps_done == self.num_steps:
            return self.num_epochs
        return steps_done // self.steps_per_epoch

    def num_steps_of_stage(self, stage: int) -> int:
        """Count the optimizer steps of a stage."""
        first, end = (-(-i * self.num_steps // self.num_stages) for i in (stage, stage + 1))
        return end - first


def require_even_shares(batch_size: int, micro_batch_size: int, world_size: int) -> None:
    """Raise a ValueError unless each process gets the same number of whole passes."""
    if batch_size % world_size:
        raise ValueError(
            f"batch_size {batch_size} cannot be shared by {world_size} processes; start a number "
            f"of processes that divides it, or give --batch-size as a multiple of {world_size}"
        )
    if batch_size % (micro_batch_size * world_size):
        raise ValueError(
            f"micro_batch_size {micro_batch_size} x {world_size} processes is no divisor of "
            f"batch_size {batch_size}; give --micro-batch-size as a divisor of "
            f"{batch_size // world_size}, the share of a process"
        )


def seed_of(config: TrainConfig, *position: object) -> int:
    """Return 63 random bits for a position in the training, the same in every process."""
    text = f"{config.seed} {' '.join(map(str, position))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


class StepSampler(Sampler[list[SampleKey]]):
    """Yields the keys of one forward pass of a rank after the other, from any optimizer step on.

    After each attempt that was taken back, images come in another order.
    """

    def __init__(
        self, plan: StepPlan, rank: int = 0, first_step: int = 0, attempt: int = 0
    ) -> None:
        self._plan = plan
        self._rank = rank
        self._first_step = first_step
        self._attempt = f"attempt {attempt} " if attempt else ""

    def __len__(self) -> int:
        plan = self._plan
        return sum(
            plan.gradient_accumulation_steps(step)
            for step in range(self._first_step, plan.num_steps)
        )

    def __iter__(self) -> Iterator[list[SampleKey]]:
        plan, config = self._plan, self._plan.config
        share = config.batch_size // plan.world_size
        round_under_way, round_seed, order = -1, "", list[int]()
        for step in range(self._first_step, plan.num_steps):
            stage = plan.stage_of(step)
            start = step * config.batch_size + self._rank * share
            keys: list[SampleKey] = []
            for place in range(start, start + share):
                # The set, over and over, each time in another order.
                number, index = divmod(place, plan.num_images)
                if number != round_under_way:
                    round_under_way, order = number, list(range(plan.num_images))
                    round_seed = f"{self._attempt}{config.seed} {number}"
                    random.Random(round_seed).shuffle(order)
                image = order[index]
                seed = random.Random(f"{round_seed} {image}").getrandbits(63)
                keys.append(SampleKey(image, stage, seed))
            micro_batch_size = plan.micro_batch_sizes[stage]
            for first in range(0, share, micro_batch_size):
                yield keys[first : first + micro_batch_size]
