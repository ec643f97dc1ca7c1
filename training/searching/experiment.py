"""A SearchConfig -> what all trainings of a search have in common, and one of them: brief, no run.

A network is trained in this process: nothing of it is kept but its accuracy after each epoch, and
its weights where it is to be exported.
"""

import copy
import math
import shlex
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from efficientnet.errors import PipelineError
from efficientnet.images.datasets import Dataset, Sample
from efficientnet.images.preprocess import PreprocessSpec
from efficientnet.machine.environment import num_usable_cores
from efficientnet.network.cost import network_cost
from efficientnet.network.variants import VARIANTS, NetworkOptions, VariantSpec
from training.batches.loader import eval_batches, train_batches
from training.batches.prefetch import on_device
from training.batches.sampler import StepPlan, StepSampler
from training.inputs.training_data import load_training_data
from training.learning.distributed import Ranks
from training.learning.evaluation import evaluate
from training.learning.memory import (
    USABLE_SHARE,
    device_memory_bytes,
    plan_micro_batches,
    require_batch_norm_fits,
)
from training.learning.optim import learning_rate_at
from training.learning.state import TrainState, new_state
from training.learning.step import TrainStep
from training.recipe.config import TrainConfig
from training.recipe.recipes import DIGITS_RECIPE, SMALL_RECIPE
from training.recipe.stages import plan_stages
from training.running.command_line import parse
from training.searching.search_config import SearchConfig

EVAL_BATCH_SIZE = 64

# A reading waits for the device.
STEPS_BETWEEN_READINGS = 10


class DivergedError(PipelineError):
    """A loss or weights that are not finite."""


@dataclass(frozen=True, eq=False)
class Experiment:
    """What all trainings of a search have in common."""

    base: TrainConfig
    """The recipe; a network takes the place of its variant."""
    dataset: Dataset
    """Its val is the minival."""
    held_out: Sequence[Sample]
    """The images that no choice is made by."""
    preprocess: PreprocessSpec
    network: NetworkOptions
    ranks: Ranks

    @property
    def device(self) -> torch.device:
        """Where it is trained."""
        return self.ranks.device

    @property
    def num_classes(self) -> int:
        """Length of the logits."""
        return len(self.dataset.class_names)

    @property
    def num_workers(self) -> int:
        """Processes that decode and augment."""
        if self.base.num_workers is not None:
            return self.base.num_workers
        return 0 if self.base.data is None else num_usable_cores()

    def config_for(self, spec: VariantSpec, seed: int | None = None) -> TrainConfig:
        """Return the recipe of a network."""
        is_built_in = VARIANTS.get(spec.name) == spec
        return replace(
            self.base,
            variant=spec.name,
            architecture=None if is_built_in else spec,
            seed=self.base.seed if seed is None else seed,
        )

    def num_parameters(self, spec: VariantSpec) -> int:
        """Count the trained values of a network."""
        size = self.preprocess.image_size
        return network_cost(spec, size, num_classes=self.num_classes).num_parameters


def prepare(config: SearchConfig) -> Experiment:
    """Load the data and fix the recipe.

    Raises:
        FileNotFoundError, DatasetError: the data cannot be used.
        ValueError: a value outside its limits.
    """
    base = parse(recipe_arguments(config))
    if not isinstance(base, TrainConfig):
        raise ValueError("--flags cannot have --resume")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks = Ranks(0, 1, device)
    dataset = load_training_data(base, ranks, None)
    whole = load_training_data(replace(base, minival=None), ranks, dataset.broken)
    return Experiment(
        base, dataset, whole.val, base.preprocess_spec(None), base.network_options(None), ranks
    )


def recipe_arguments(config: SearchConfig) -> list[str]:
    """Return the flags of training/run.py that all networks are trained with."""
    recipe = config.recipe or (DIGITS_RECIPE if config.data is None else SMALL_RECIPE)
    size = str(config.image_size)
    values: dict[str, object] = {
        "--recipe": recipe,
        "--data": config.data,
        "--epochs": config.epochs,
        "--batch-size": config.batch_size,
        "--minival": config.minival,
        "--seed": config.seed,
        "--eval-image-size": size,
        "--schedule": "fixed",
        "--progressive.num-stages": 1,
    }
    parts = [str(p) for flag, v in values.items() if v is not None for p in (flag, v)]
    # Any built-in variant, in whose place each network is put.
    return ["tiny", *parts, "--progressive.image-size", size, size, *shlex.split(config.flags)]


def train(
    experiment: Experiment, spec: VariantSpec, seed: int, samples: Sequence[Sample]
) -> Generator[float, None, TrainState]:
    """Train a network; give its top-1 on `samples` after each epoch, and in the end its state.

    Raises:
        BatchTooLargeError: the device cannot hold it.
        DivergedError: the loss or a weight is not finite.
    """
    config, device = experiment.config_for(spec, seed), experiment.device
    stages = plan_stages(config.progressive, config.seed)
    require_batch_norm_fits(config, stages, 1)
    limit = USABLE_SHARE * device_memory_bytes(device)
    num_classes = experiment.num_classes
    sizes = plan_micro_batches(config, experiment.network, num_classes, stages, 1, limit)
    plan = StepPlan(len(experiment.dataset.train), config, sizes)
    state = new_state(config, experiment.network, num_classes, device)
    evaluated = copy.deepcopy(state.model)
    step = TrainStep(state, config, experiment.ranks, num_classes, experiment.preprocess)
    loader = train_batches(
        experiment.dataset.train, config, stages, StepSampler(plan), experiment.num_workers
    )
    batches = iter(on_device(loader, device))
    stop = torch.zeros((), device=device)
    losses: list[Tensor] = []
    step.begin_stage(stages[0], sizes[0])
    while state.step < plan.num_steps:
        state.model.train()
        rate = learning_rate_at(
            state.step, config.optimizer, config.batch_size, plan.steps_per_epoch, plan.num_steps
        )
        loss, _ = step(batches, plan.gradient_accumulation_steps(state.step), rate, stop)
        losses.append(loss)
        ends_epoch = plan.ends_epoch(state.step)
        if ends_epoch or len(losses) == STEPS_BETWEEN_READINGS:
            _require_finite(torch.stack(losses).tolist(), state.step)
            losses = []
        if ends_epoch:
            broken = state.first_not_finite()
            if broken is not None:
                raise DivergedError(f"{broken} is not finite after step {state.step}")
            evaluated.load_state_dict(state.average.tensors)
            held_out = eval_batches(
                samples, experiment.preprocess, EVAL_BATCH_SIZE, experiment.num_workers
            )
            yield evaluate(evaluated, held_out, device).top1
    return state


def train_to_end(experiment: Experiment, spec: VariantSpec, seed: int) -> tuple[float, TrainState]:
    """Train a network; return its top-1 on the minival and its state.

    Raises:
        BatchTooLargeError, DivergedError: see train.
    """
    training, top1 = train(experiment, spec, seed, experiment.dataset.val), 0.0
    while True:
        try:
            top1 = next(training)
        except StopIteration as end:
            return top1, end.value


def _require_finite(losses: Sequence[float], step: int) -> None:
    for loss in losses:
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} within the {len(losses)} steps to {step}")
