"""A SearchConfig -> what all trainings of a search have in common, and one of them: brief, no run.

A network is trained in this process: nothing of it is kept but its accuracy after each epoch, and
its weights where it is to be exported.
"""

import copy
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from efficientnet.errors import PipelineError
from efficientnet.images.datasets import Dataset, Sample
from efficientnet.images.preprocess_spec import PreprocessSpec
from efficientnet.network.cost import network_cost
from efficientnet.network.model import EfficientNet
from efficientnet.network.variants import VARIANTS, NetworkOptions, VariantSpec
from training.batches.loader import eval_batches, train_batches
from training.batches.prefetch import on_device
from training.batches.sampler import StepPlan, StepSampler
from training.inputs.training_data import load_training_data
from training.learning import memory
from training.learning.distributed import Ranks
from training.learning.evaluation import evaluate
from training.learning.optim import learning_rate_at
from training.learning.state import TrainState, new_state
from training.learning.step import TrainStep
from training.recipe.config import TrainConfig
from training.recipe.recipes import DIGITS_RECIPE, SMALL_RECIPE
from training.recipe.stages import plan_stages
from training.running.command_line import parse
from training.running.trainer import num_workers
from training.searching.search_config import SearchConfig

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
    def num_classes(self) -> int:
        """Length of the logits."""
        return len(self.dataset.class_names)

    def config_for(self, spec: VariantSpec, seed: int | None = None) -> TrainConfig:
        """Return the recipe of a network."""
        return replace(
            self.base,
            variant=spec.name,
            architecture=None if VARIANTS.get(spec.name) == spec else spec,
            seed=self.base.seed if seed is None else seed,
        )

    def num_parameters(self, spec: VariantSpec) -> int:
        """Count the trained values of a network."""
        size = self.preprocess.image_size
        return network_cost(spec, size, num_classes=self.num_classes).num_parameters

    def top1(self, model: EfficientNet, samples: Sequence[Sample]) -> float:
        """Evaluate a network."""
        batches = eval_batches(samples, self.preprocess, num_workers(self.base))
        return evaluate(model, batches, self.ranks.device).top1


def prepare(config: SearchConfig) -> Experiment:
    """Load the data and fix the recipe."""
    base = parse(recipe_arguments(config))
    if not isinstance(base, TrainConfig):
        raise ValueError("--flags cannot have --resume")
    ranks = Ranks(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    dataset = load_training_data(base, ranks, None)
    whole = load_training_data(replace(base, minival=None), ranks, dataset.broken)
    return Experiment(
        base, dataset, whole.val, base.preprocess_spec(None), base.network_options(None), ranks
    )


def recipe_arguments(config: SearchConfig) -> list[str]:
    """Return the flags of training/run.py that all networks are trained with."""
    size = str(config.image_size)
    values: dict[str, object] = {
        "--recipe": config.recipe or (DIGITS_RECIPE if config.data is None else SMALL_RECIPE),
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
    experiment: Experiment,
    spec: VariantSpec,
    seed: int,
    on_epoch: Callable[[float, int], None] | None = None,
) -> tuple[float, TrainState]:
    """Train a network; return its top-1 on the minival, and its state.

    `on_epoch` gets top-1 after each epoch, and the epoch from 1 on.

    Raises:
        BatchTooLargeError: the device cannot hold it.
        DivergedError: the loss or a weight is not finite.
    """
    config, device = experiment.config_for(spec, seed), experiment.ranks.device
    samples, num_classes = experiment.dataset.train, experiment.num_classes
    stages = plan_stages(config.progressive, config.seed)
    memory.require_batch_norm_fits(config, stages, 1)
    limit = memory.USABLE_SHARE * memory.device_memory_bytes(device)
    sizes = memory.plan_micro_batches(config, experiment.network, num_classes, stages, 1, limit)
    plan = StepPlan(len(samples), config, sizes)
    state = new_state(config, experiment.network, num_classes, device)
    evaluated = copy.deepcopy(state.model)
    step = TrainStep(state, config, experiment.ranks, num_classes, experiment.preprocess)
    loader = train_batches(samples, config, stages, StepSampler(plan), num_workers(config))
    batches = iter(on_device(loader, device))
    stop = torch.zeros((), device=device)
    losses: list[Tensor] = []
    top1 = 0.0
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
            for value in torch.stack(losses).tolist():
                if not math.isfinite(value):
                    raise DivergedError(
                        f"the loss is {value} within the {len(losses)} steps to {state.step}"
                    )
            losses = []
        if ends_epoch:
            if broken := state.first_not_finite():
                raise DivergedError(f"{broken} is not finite after step {state.step}")
            evaluated.load_state_dict(state.average.tensors)
            top1 = experiment.top1(evaluated, experiment.dataset.val)
            if on_epoch:
                on_epoch(top1, plan.epoch_of(state.step))
    return top1, state
