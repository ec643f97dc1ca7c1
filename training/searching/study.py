"""A SearchConfig -> the study that workers share; refused where it was made for something else."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import optuna
from optuna import Study
from optuna.pruners import MedianPruner, NopPruner
from optuna.samplers import TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from efficientnet.errors import PipelineError
from training.recipe.config import config_to_json, flat_values
from training.searching.experiment import Experiment
from training.searching.search_config import MAX_TRIALS, SearchConfig
from training.searching.space import SearchSpace
from training.searching.storage import PatientStorage

SETTING = "setting"

# Attributes of a trial.
NETWORK, TOP1, FAILURE, SECONDS = "network", "top1", "failure", "seconds"
REUSED, TWIN = "reused", "twin"

NUM_RANDOM_TRIALS = 20

# Not before so many networks are whole, and not after the first epoch, which says little.
NUM_UNPRUNED_TRIALS, NUM_UNPRUNED_EPOCHS = 16, 2

# Of the recipe: the network itself, and what does not change what is computed.
NOT_OF_THE_SETTING = {
    *("variant", "architecture", "recipe_reason", "num_workers", "output", "name", "data"),
    *("data_folder", "keep_checkpoints", "checkpoint_every_steps"),
}


class SearchError(PipelineError):
    """A search that cannot begin, or cannot go on."""


class NumberedSampler(TPESampler):
    """TPE after some random networks, seeded anew for each trial by its number.

    Workers that begin together, and one that goes on, would otherwise draw the same networks.
    """

    def __init__(self, num_random_trials: int, seed: int) -> None:
        super().__init__(n_startup_trials=num_random_trials)
        self._num_random_trials, self._seed = num_random_trials, seed

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Seed it."""
        digest = hashlib.sha256(f"{self._seed} {trial.number}".encode()).digest()
        seed = int.from_bytes(digest[:4])
        super().__init__(n_startup_trials=self._num_random_trials, seed=seed)
        super().before_trial(study, trial)


def setting_of(config: SearchConfig, experiment: Experiment, space: SearchSpace) -> dict[str, Any]:
    """Return what the trials of a study must have in common to be compared, as plain JSON."""
    dataset, target = experiment.dataset, config.target_artifact
    names = "\n".join(
        f"{sample.label} {sample.name}" for part in (dataset.train, dataset.val) for sample in part
    )
    recipe = flat_values(config_to_json(experiment.base))
    setting: dict[str, Any] = {
        "backbone": asdict(space.backbone),
        "operators": space.operators,
        "kernel_sizes": space.kernel_sizes,
        "expand_ratios": space.expand_ratios,
        "layer_changes": space.layer_changes,
        "data": config.data_name,
        "train images": len(dataset.train),
        "minival images": len(dataset.val),
        "classes": len(dataset.class_names),
        "images' names and labels": hashlib.sha256(names.encode()).hexdigest()[:12],
        "objective": "front" if config.pareto else "reward",
        "w": config.w,
        "v": config.v,
        "u": config.u if target else None,
        "target_artifact": target,
        # What S and P are relative to; S is measured anew with each network.
        "reference": space.backbone.name,
        "reference's parameters": experiment.num_parameters(space.backbone),
        **{name: value for name, value in recipe.items() if name not in NOT_OF_THE_SETTING},
    }
    return json.loads(json.dumps(setting))


def open_study(config: SearchConfig, storage: PatientStorage, setting: Mapping[str, Any]) -> Study:
    """Make the study or join it.

    Raises:
        SearchError: a study of this name was made for another space, other data or another reward.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions = [StudyDirection.MAXIMIZE]
    if config.pareto:
        directions += [StudyDirection.MINIMIZE] * (3 if config.target_artifact else 2)
    may_prune = config.prune and not config.pareto
    study = optuna.create_study(
        study_name=config.title,
        storage=storage,
        sampler=NumberedSampler(
            MAX_TRIALS if config.sampler == "random" else NUM_RANDOM_TRIALS, config.seed
        ),
        pruner=MedianPruner(NUM_UNPRUNED_TRIALS, NUM_UNPRUNED_EPOCHS) if may_prune else NopPruner(),
        directions=directions,
        load_if_exists=True,
    )
    found = study.user_attrs.get(SETTING)
    if found is None:
        study.set_user_attr(SETTING, dict(setting))
        found = study.user_attrs[SETTING]  # another worker's, if it was as fast
    if differences := differences_between(found, setting):
        raise SearchError(
            f"the study {config.title} was made with {'; '.join(differences)}: give the same "
            "values, or begin another one with another --name"
        )
    return study


def differences_between(found: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Name what differs between two settings."""
    said: list[str] = []
    for name in {**found, **asked}:
        old, new = found.get(name), asked.get(name)
        if old != new:
            if isinstance(old, dict) and isinstance(new, dict):
                said.append(f"another {name}: {old.get('name')} and now {new.get('name')}")
            else:
                said.append(f"{name} {json.dumps(old)} and now {json.dumps(new)}")
    return said


def is_network(trial: FrozenTrial) -> bool:
    """Tell whether a trial trained, or tried to train, a network that no other one had."""
    attributes = trial.user_attrs
    if REUSED in attributes or TWIN in attributes:
        return False
    if trial.state == TrialState.FAIL:
        return FAILURE in attributes
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED)


def reward_of(trial: FrozenTrial) -> float | None:
    """Return the reward of a trial that was trained to its end."""
    if trial.state != TrialState.COMPLETE:
        return None
    return trial.user_attrs.get("reward")


def best_trial(trials: list[FrozenTrial]) -> FrozenTrial | None:
    """Return the trial of the highest reward, the first among equals; None: none is whole."""
    whole = [t for t in trials if is_network(t) and reward_of(t) is not None]
    return max(whole, key=lambda t: (reward_of(t), -t.number), default=None)
