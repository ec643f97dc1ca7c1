"""Seed and trial number -> Optuna's sampler, whose choices follow from these and what is known."""

import hashlib
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

NUM_RANDOM_TRIALS = 20


class NumberedSampler(BaseSampler):
    """TPE, or random choices, seeded anew for each trial by its number.

    Workers that begin together, and one that goes on, would otherwise draw the same networks.
    """

    def __init__(self, name: str, seed: int) -> None:
        self._name, self._seed = name, seed
        self._inner: BaseSampler = RandomSampler()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Seed it."""
        digest = hashlib.sha256(f"{self._seed} {trial.number}".encode()).digest()
        seed = int.from_bytes(digest[:4])
        if self._name == "random":
            self._inner = RandomSampler(seed=seed)
        else:
            self._inner = TPESampler(seed=seed, n_startup_trials=NUM_RANDOM_TRIALS)
        self._inner.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Leave it to the sampler."""
        return self._inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Leave it to the sampler."""
        return self._inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Leave it to the sampler."""
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: Any, values: Any) -> None:
        """Leave it to the sampler."""
        self._inner.after_trial(study, trial, state, values)
