"""A study -> networks chosen, trained, measured and told, one after the other, while there is need.

Many workers, on one machine or many, share a study. Which of them trains a network that two have
chosen follows from the numbers of their trials: the lower one does. So each waits, before it
trains, until all trials of lower numbers have said which network is theirs.
"""

import logging
import re
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from optuna import Study
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from efficientnet.machine.environment import current_environment
from efficientnet.measuring.clock import Call
from efficientnet.network.variants import VariantSpec
from efficientnet.reporting.publishing import device_slug
from efficientnet.reporting.tables import format_percent
from training.learning.memory import BatchTooLargeError
from training.running.progress import format_seconds
from training.searching.artifact_latency import ArtifactBench, ExportFailedError
from training.searching.experiment import DivergedError, Experiment, train
from training.searching.search_config import SearchConfig
from training.searching.space import SearchSpace
from training.searching.step_time import Ratio, step_ratio, synthetic_step
from training.searching.storage import PatientStorage, signs_of_life
from training.searching.study import (
    FAILURE,
    NETWORK,
    REUSED,
    SECONDS,
    TOP1,
    TWIN,
    SearchError,
    best_trial,
    is_network,
    reward_of,
)

SECONDS_BETWEEN_LOOKS = 0.1

# More of them in a row are no accident.
MAX_FAILURES_IN_A_ROW, MAX_REUSED_IN_A_ROW = 20, 500

# What torch says when a CPU's memory is at its end, which is no class of its own.
OUT_OF_CPU_MEMORY = "can't allocate memory"

log = logging.getLogger(__name__)


class PrunedError(Exception):
    """A network behind the others."""


@dataclass(frozen=True, eq=False)
class Worker:
    """One of those that work on a study."""

    config: SearchConfig
    experiment: Experiment
    space: SearchSpace
    study: Study
    storage: PatientStorage
    bench: ArtifactBench | None
    """Of the exported networks; None = they are not exported."""

    @cached_property
    def _reference_step(self) -> Call:
        return self._step_of(self.space.backbone)

    def _step_of(self, spec: VariantSpec) -> Call:
        experiment = self.experiment
        return synthetic_step(
            experiment.config_for(spec), experiment.num_classes, experiment.ranks.device
        )

    def size_ratio_of(self, spec: VariantSpec) -> float:
        """Return the number of parameters over the reference's."""
        count = self.experiment.num_parameters
        return count(spec) / count(self.space.backbone)

    def step_ratio_of(self, spec: VariantSpec) -> Ratio:
        """Time a network's training step in turns with the reference's."""
        config = self.config
        return step_ratio(
            self._step_of(spec), self._reference_step, config.turns, config.turn_seconds
        )

    def run(self) -> None:
        """Try networks until there are enough, the time is over, or many in a row failed."""
        config = self.config
        began, took = time.monotonic(), list[float]()
        num_failed = num_reused = 0
        while True:
            self.storage.fail_stale_trials(self.study._study_id)
            trials = self.trials()
            num_networks = sum(map(is_network, trials))
            num_running = sum(t.state == TrialState.RUNNING for t in trials)
            if num_networks + num_running >= config.trials:
                break
            if config.hours is not None and time.monotonic() - began > 3600 * config.hours:
                log.info("%g hours are over", config.hours)
                break
            if num_reused >= MAX_REUSED_IN_A_ROW:
                log.info("the last %d choices were known already: nothing is new", num_reused)
                break
            trial_began = time.monotonic()
            trial = self._one_trial()
            if trial is None or not is_network(trial):
                num_reused += 1
                continue
            num_reused = 0
            num_failed = num_failed + 1 if FAILURE in trial.user_attrs else 0
            if num_failed == MAX_FAILURES_IN_A_ROW:
                raise SearchError(
                    f"{num_failed} networks in a row failed, the last one: "
                    f"{trial.user_attrs[FAILURE]}"
                )
            took.append(time.monotonic() - trial_began)
            self._tell_progress(trial, took, began, num_running + 1)

    def trials(self) -> list[FrozenTrial]:
        """Return all trials by number."""
        return self.study.get_trials(deepcopy=False)

    def others_are_at_work(self) -> bool:
        """Tell whether another worker trains a network."""
        self.storage.fail_stale_trials(self.study._study_id)
        return any(trial.state == TrialState.RUNNING for trial in self.trials())

    def _one_trial(self) -> FrozenTrial | None:
        """Choose a network and train it, or take over what is known of it; None: it was lost."""
        trial = self.study.ask()
        with signs_of_life(self.storage, trial._trial_id):
            try:
                chosen = {
                    name: trial.suggest_categorical(name, choices)
                    for name, choices in self.space.parameters.items()
                }
                spec = self.space.network(chosen)
                trial.set_user_attr(NETWORK, spec.name)
                values, state = self._outcome(trial, spec)
                self.storage.set_trial_state_values(trial._trial_id, state, values)
                return self.trials()[trial.number]
            except UpdateFinishedTrialError:
                # Told to be dead by others, while the database could not be reached.
                log.warning("trial %d: given up by the others meanwhile, it is lost", trial.number)
                return None

    def _outcome(self, trial: Trial, spec: VariantSpec) -> tuple[list[float] | None, TrialState]:
        first = self._first_of(trial, spec.name)
        if first is not None:
            return self._take_over(trial, first)
        began = time.monotonic()
        trial.set_user_attr("device", device_slug([current_environment()]))
        values = None
        try:
            values, state = self._judge(trial, spec), TrialState.COMPLETE
        except PrunedError:
            state = TrialState.PRUNED
        except KeyboardInterrupt as interrupt:
            self._give_back(trial)
            raise type(interrupt)(
                f"interrupted in trial {trial.number}, which counts as not trained; the same "
                "command goes on"
            ) from None
        except BaseException as error:
            failure = failure_of(error)
            if failure is None:
                # The next worker may try the network again.
                self._give_back(trial)
                raise
            trial.set_user_attr(FAILURE, failure)
            log.warning("trial %d failed: %s", trial.number, failure)
            state = TrialState.FAIL
        trial.set_user_attr(SECONDS, time.monotonic() - began)
        return values, state

    def _give_back(self, trial: Trial) -> None:
        with suppress(UpdateFinishedTrialError):
            self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    def _first_of(self, trial: Trial, network: str) -> FrozenTrial | None:
        """Return the trial of a lower number that has, or had, this network; None: it is new."""
        began, grace = time.monotonic(), self.storage.grace_period
        assert grace is not None
        while True:
            lower = [other for other in self.trials() if other.number < trial.number]
            silent = [
                other
                for other in lower
                if other.state == TrialState.RUNNING and NETWORK not in other.user_attrs
            ]
            if not silent:
                break
            self.storage.fail_stale_trials(self.study._study_id)
            if time.monotonic() - began > grace:
                # Of workers that died before their first sign of life.
                for other in silent:
                    with suppress(UpdateFinishedTrialError):
                        self.storage.set_trial_state_values(other._trial_id, TrialState.FAIL)
            time.sleep(SECONDS_BETWEEN_LOOKS)
        same = [other for other in lower if other.user_attrs.get(NETWORK) == network]
        # Trials that were cut short are not among them: the network is tried again.
        known = [o for o in same if is_network(o) or o.state == TrialState.RUNNING]
        return known[0] if known else None

    def _take_over(self, trial: Trial, first: FrozenTrial) -> tuple[list[float] | None, TrialState]:
        if first.state == TrialState.RUNNING:
            trial.set_user_attr(TWIN, first.number)
            return None, TrialState.FAIL
        trial.set_user_attr(REUSED, first.number)
        for name, value in first.user_attrs.items():
            if name not in (REUSED, TWIN, SECONDS):
                trial.set_user_attr(name, value)
        if first.state == TrialState.PRUNED:
            for step, value in first.intermediate_values.items():
                trial.report(value, step)
        return (first.values if first.state == TrialState.COMPLETE else None), first.state

    def _judge(self, trial: Trial, spec: VariantSpec) -> list[float]:
        """Measure a network's step, train it, and measure what is exported of it."""
        experiment, config = self.experiment, self.config
        size_ratio, step_time = self.size_ratio_of(spec), self.step_ratio_of(spec)
        _tell(
            trial,
            parameters=experiment.num_parameters(spec),
            size_ratio=size_ratio,
            step_ratio=step_time.value,
            step_noise=step_time.noise,
            step_ms=step_time.own_ms,
            reference_step_ms=step_time.reference_ms,
        )

        def on_epoch(top1: float, epoch: int) -> None:
            trial.set_user_attr(TOP1, top1)
            if not config.pareto:
                # What the accuracy so far would be worth: a small network may be behind the others
                # in accuracy and still be the better one.
                trial.report(config.reward(top1, step_time.value, size_ratio), epoch)
                if trial.should_prune():
                    raise PrunedError

        top1, state = train(experiment, spec, experiment.base.seed, on_epoch)
        latency_ratio = None
        if self.bench is not None:
            latency = self.bench.measure(spec, state.average.tensors, f"trial-{trial.number}")
            latency_ratio = latency.value
            _tell(trial, latency_ratio=latency_ratio, latency_noise=latency.noise)
        reward = config.reward(top1, step_time.value, size_ratio, latency_ratio)
        _tell(trial, reward=reward)
        if not config.pareto:
            return [reward]
        costs = (step_time.value, size_ratio, latency_ratio)
        return [top1, *(cost for cost in costs if cost is not None)]

    def _tell_progress(
        self, trial: FrozenTrial, took: Sequence[float], began: float, num_workers: int
    ) -> None:
        config, trials = self.config, self.trials()
        networks, best = [t for t in trials if is_network(t)], best_trial(trials)
        num_failed = sum(FAILURE in t.user_attrs for t in networks)
        num_pruned = sum(t.state == TrialState.PRUNED for t in networks)
        left_s = (config.trials - len(networks)) * statistics.fmean(took) / num_workers
        if config.hours is not None:
            left_s = min(left_s, 3600 * config.hours - (time.monotonic() - began))
        log.info(
            "trial %d: %s; %s; %d of %d networks, %d pruned, %d failed, %s left",
            *(trial.number, describe(trial)),
            f"best: {describe(best)} (trial {best.number})" if best else "none is whole yet",
            *(len(networks), config.trials, num_pruned, num_failed),
            format_seconds(max(left_s, 0.0)),
        )


def _tell(trial: Trial, **found: float) -> None:
    for name, value in found.items():
        trial.set_user_attr(name, value)


def failure_of(error: BaseException) -> str | None:
    """Say why a network cannot be judged, so that the search goes on; None: no fault of it."""
    text = str(error)
    if isinstance(error, BatchTooLargeError | DivergedError | ExportFailedError):
        return text
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and OUT_OF_CPU_MEMORY in text
    ):
        torch.cuda.empty_cache()
        first, *_ = re.split(r"\n|\. ", text)
        return f"out of memory: {first}"
    return None


def describe(trial: FrozenTrial) -> str:
    """Tell in a few words what came out of a trial."""
    found: dict[str, Any] = trial.user_attrs
    if FAILURE in found:
        return "failed"
    parts = [f"top-1 {format_percent(found[TOP1])}"] if TOP1 in found else []
    parts += [f"step x {found['step_ratio']:.2f}", f"size x {found['size_ratio']:.2f}"]
    if "latency_ratio" in found:
        parts.append(f"latency x {found['latency_ratio']:.2f}")
    reward = reward_of(trial)
    parts.append("pruned" if reward is None else f"reward {reward:.4f}")
    return ", ".join(parts)
