"""A network and a fixed reference -> how long a training step takes, relative to the reference's.

Steps are taken in turns, so that a machine that gets slower meanwhile, or whose neighbors do, makes
both slower; each turn of the one is compared with the turn of the other beside it.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from efficientnet.measuring.clock import Call, Clock, measure_turn
from efficientnet.measuring.turns import take_turns, turn_ratios
from training.recipe.config import TrainConfig
from training.studies.speed_contenders import our_step

NUM_WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Ratio:
    """A time relative to the reference's, measured in turns with it."""

    value: float
    noise: float
    """Standard error over the turns, as a fraction."""
    own_ms: float
    reference_ms: float


def synthetic_step(config: TrainConfig, num_classes: int, device: torch.device) -> Call:
    """Build the step that training takes, on random pixels; it returns when the device is done."""
    step = our_step(config, num_classes, device)

    def call() -> None:
        step()
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
    """Time both in turns of so many seconds, which the last step of a turn may exceed."""
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
