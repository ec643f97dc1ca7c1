"""A network and a fixed reference -> how long a training step takes, relative to the reference's.

Steps are taken in turns, so that a machine that gets slower meanwhile, or whose neighbors do, makes
both slower; each turn of the one is compared with the turn of the other beside it.
"""

import math
import statistics
import time
from collections.abc import Sequence
from itertools import repeat

import torch

from efficientnet.measuring.clock import Call, Clock, measure_turn
from efficientnet.measuring.turns import take_turns, turn_ratios
from efficientnet.network.variants import NetworkOptions
from training.batches.loader import Batch
from training.learning.distributed import Ranks
from training.learning.state import new_state
from training.learning.step import TrainStep
from training.recipe.config import TrainConfig
from training.recipe.stages import plan_stages
from training.searching.reward import Ratio

# The time of a step does not depend on it, but a loss that is not a number does.
LEARNING_RATE = 1e-6

NUM_WARM_UP_STEPS = 2


def synthetic_step(
    config: TrainConfig, network: NetworkOptions, num_classes: int, device: torch.device
) -> Call:
    """Build the step that training takes, fed with the same random pixels again and again.

    It returns when the device is done.
    """
    state = new_state(config, network, num_classes, device)
    state.model.train()
    spec = config.preprocess_spec(None)
    step = TrainStep(state, config, Ranks(0, 1, device), num_classes, spec)
    stage = plan_stages(config.progressive, config.seed)[-1]
    count, size = config.batch_size, stage.image_size
    step.begin_stage(stage, count)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(num_classes, (count,), generator=generator)
    batch = Batch(
        pixels.permute(0, 3, 1, 2).to(device), labels.to(device), torch.arange(len(labels))
    )
    batches, stop = repeat(batch), torch.zeros((), device=device)

    def call() -> None:
        step(batches, 1, LEARNING_RATE, stop)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call


def step_ratio(
    step: Call,
    reference: Call,
    num_turns: int,
    seconds: float,
    clock: Clock = time.perf_counter_ns,
) -> Ratio:
    """Time both in turns.

    Args:
        step: of the network.
        reference: of the reference.
        num_turns: of each.
        seconds: length of a turn, which its last step may exceed.
        clock: nanoseconds.
    """
    calls = {"reference": reference, "network": step}
    for call in calls.values():
        for _ in range(NUM_WARM_UP_STEPS):
            call()
    turns = take_turns(
        calls, num_turns, lambda name, _: measure_turn(calls[name], clock, seconds).median_ms
    )
    return ratio_of(turns["network"], turns["reference"])


def ratio_of(own_ms: Sequence[float], reference_ms: Sequence[float]) -> Ratio:
    """Compare turn with turn: the median of their ratios, and its standard error."""
    ratios = turn_ratios(own_ms, reference_ms)
    value = statistics.median(ratios)
    noise = statistics.stdev(ratios) / value / math.sqrt(len(ratios)) if len(ratios) > 1 else 0.0
    return Ratio(value, noise, statistics.median(own_ms), statistics.median(reference_ms))
