"""A study -> SearchRecord: every trial, and what was trained beside the found network."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState, create_trial
from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from efficientnet.errors import first_problem
from efficientnet.machine.environment import EnvironmentRecord, current_environment
from efficientnet.network.variants import VariantSpec
from training.searching.search_config import SearchConfig
from training.searching.space import Choice, SearchSpace
from training.searching.study import (
    FAILURE,
    NETWORK,
    REUSED,
    SECONDS,
    TOP1,
    TWIN,
    SearchError,
    is_network,
    reward_of,
)

# Fewer whole networks say nothing of what a choice matters.
MIN_TRIALS_FOR_IMPORTANCE = 20

COMPARISON = "comparison "

Outcome = Literal["whole", "pruned", "failed", "reused", "twin", "cut short", "running"]


Role = Literal["found", "reference", "rival"]


OUTCOMES: dict[TrialState, Outcome] = {
    TrialState.COMPLETE: "whole",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TrialRecord(_Frozen):
    """One trial; None where it was not measured."""

    number: int
    outcome: Outcome
    """twin: another worker was training the network; reused: it was known already."""
    network: str | None
    chosen: dict[str, Choice]
    top1: float | None
    """On the minival, after the last epoch trained."""
    step_ratio: float | None
    """Time of a training step, over the reference's."""
    step_noise: float | None
    """Standard error of step_ratio, as a fraction."""
    step_ms: float | None
    reference_step_ms: float | None
    parameters: int | None
    size_ratio: float | None
    latency_ratio: float | None
    latency_noise: float | None
    reward: float | None
    """None unless it was trained to its end."""
    seconds: float | None
    failure: str | None
    reused: int | None
    """Number of the trial whose result it has."""
    device: str | None


class ComparedRun(_Frozen):
    """A network trained in the end, by one seed, like all others."""

    name: str
    role: Role
    seed: int
    top1: float
    """On the images that had no part in the search."""
    minival_top1: float
    step_ratio: float
    step_noise: float
    size_ratio: float
    parameters: int
    latency_ratio: float | None
    reward: float


class SearchRecord(_Frozen):
    """search.json."""

    format_version: int = 1
    name: str
    setting: dict[str, Any]
    """What all trials have in common; S and P are relative to its reference."""
    space: SearchSpace
    sampler: str
    seed: int
    num_trials_planned: int
    num_held_out: int
    """Images that had no part in the search."""
    started_at: AwareDatetime
    finished_at: AwareDatetime
    environment: EnvironmentRecord
    """Of the worker that wrote this."""
    best: VariantSpec | None
    trials: tuple[TrialRecord, ...]
    compared: tuple[ComparedRun, ...] = ()
    importances: dict[str, float] = {}
    """Share of each choice in the variance of the reward (fANOVA); empty with few networks."""

    @property
    def whole(self) -> list[TrialRecord]:
        """The networks that were trained to their end."""
        return [trial for trial in self.trials if trial.outcome == "whole"]

    @property
    def best_trial(self) -> TrialRecord | None:
        """The trial of the best reward."""
        return best_of(self.whole)

    @property
    def front(self) -> list[TrialRecord]:
        """The networks that none is better than in accuracy, step time, size and latency alike."""

        def costs(trial: TrialRecord) -> tuple[float, ...]:
            values = (trial.top1, trial.step_ratio, trial.size_ratio, trial.latency_ratio)
            top1, *others = (value if value is not None else 0.0 for value in values)
            return (-top1, *others)

        def is_beaten(trial: TrialRecord) -> bool:
            own = costs(trial)
            return any(
                other != own and all(a <= b for a, b in zip(other, own, strict=True))
                for other in map(costs, self.whole)
            )

        return [trial for trial in self.whole if not is_beaten(trial)]


def best_of(trials: Sequence[TrialRecord]) -> TrialRecord | None:
    """Return the trial of the highest reward, the first among equals."""
    return max(trials, key=lambda t: (t.reward or 0.0, -t.number), default=None)


def collect(
    config: SearchConfig, study: Study, space: SearchSpace, num_held_out: int
) -> SearchRecord:
    """Put together what is known of a study."""
    trials = study.get_trials(deepcopy=False)
    records = tuple(map(_record_of, trials))
    whole = [record for record in records if record.outcome == "whole"]
    best = best_of(whole)
    attributes = study.user_attrs
    times = [t for trial in trials for t in (trial.datetime_start, trial.datetime_complete) if t]
    now = datetime.now(UTC)
    compared = (
        ComparedRun.model_validate(value)
        for name, value in attributes.items()
        if name.startswith(COMPARISON)
    )
    # Not those of a network that was the best before.
    own = [run for run in compared if run.role != "found" or (best and run.name == best.network)]
    return SearchRecord(
        name=config.title,
        setting=attributes["setting"],
        space=space,
        sampler=config.sampler,
        seed=config.seed,
        num_trials_planned=config.trials,
        num_held_out=num_held_out,
        started_at=min(times).astimezone(UTC) if times else now,
        finished_at=max(times).astimezone(UTC) if times else now,
        environment=current_environment(),
        best=space.network(best.chosen) if best else None,
        trials=records,
        compared=tuple(sorted(own, key=lambda run: (run.role, run.name, run.seed))),
        importances=importances(space, whole),
    )


def _record_of(trial: FrozenTrial) -> TrialRecord:
    found = trial.user_attrs
    names = ("parameters", "step_ratio", "step_noise", "step_ms", "reference_step_ms")
    names += ("size_ratio", "latency_ratio", "latency_noise", "device")
    names += (NETWORK, TOP1, SECONDS, FAILURE, REUSED)
    return TrialRecord(
        number=trial.number,
        outcome=_outcome(trial),
        chosen=trial.params,
        reward=reward_of(trial),
        **{name: found.get(name) for name in names},
    )


def _outcome(trial: FrozenTrial) -> Outcome:
    if not trial.state.is_finished():
        return "running"
    if TWIN in trial.user_attrs:
        return "twin"
    if REUSED in trial.user_attrs:
        return "reused"
    if not is_network(trial):
        return "cut short"
    return OUTCOMES[trial.state]


def importances(space: SearchSpace, whole: Sequence[TrialRecord]) -> dict[str, float]:
    """Return how much of the reward's variance each choice explains, largest first (fANOVA).

    Hutter et al. 2014. Of networks that were trained to their end.
    """
    import optuna

    rewards = {trial.reward for trial in whole}
    if len(whole) < MIN_TRIALS_FOR_IMPORTANCE or len(rewards) == 1:
        return {}
    distributions: dict[str, BaseDistribution] = {
        name: CategoricalDistribution(choices) for name, choices in space.parameters.items()
    }
    study = optuna.create_study(direction="maximize")
    for trial in whole:
        study.add_trial(
            create_trial(params=dict(trial.chosen), distributions=distributions, value=trial.reward)
        )
    return get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))


def read_record(path: Path) -> SearchRecord:
    """Read a search.json."""
    text = path.read_bytes()
    try:
        return SearchRecord.model_validate_json(text)
    except ValidationError as error:
        raise SearchError(
            f"{path} is damaged or not the record of a search ({first_problem(error)}); give a "
            "search.json that training/search.py wrote"
        ) from None


def differences(runs: Sequence[ComparedRun], name: str) -> list[float]:
    """Return by how much the found network's reward is above that of another, seed by seed."""
    found = {run.seed: run.reward for run in runs if run.role == "found"}
    other = {run.seed: run.reward for run in runs if run.name == name and run.role != "found"}
    return [found[seed] - other[seed] for seed in sorted(found.keys() & other.keys())]
