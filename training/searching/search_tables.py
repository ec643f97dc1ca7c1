"""SearchRecord -> tables: the found network, the best ones, their choices, and who was compared."""

from collections import Counter
from collections.abc import Sequence

from efficientnet.reporting.tables import NOTHING, Table, format_percent
from training.searching.search_record import Outcome, SearchRecord, TrialRecord, differences
from training.searching.space import Choice, SearchSpace
from training.studies.spread import spread

# What is chosen of a stage -> how it is called.
KINDS = {
    "operator": "operator",
    "kernel_size": "kernel",
    "expand_ratio": "expansion",
    "num_layers": "layers",
}

NUM_LISTED = 10
MIN_BEST, BEST_SHARE = 10, 0.1

OUTCOME_NAMES: dict[Outcome, str] = {
    "whole": "trained to their end",
    "pruned": "pruned",
    "failed": "failed",
    "reused": "chosen again, result taken over",
    "twin": "left to another worker",
    "cut short": "cut short",
    "running": "under way",
}

OPERATORS = {"mbconv": "MBConv", "fused_mbconv": "Fused-MBConv"}


def best_trials(record: SearchRecord) -> list[TrialRecord]:
    """Return the best tenth of the networks by reward, at least ten if there are as many."""
    ranked = sorted(record.whole, key=lambda trial: -(trial.reward or 0.0))
    return ranked[: max(MIN_BEST, round(BEST_SHARE * len(ranked)))]


def shares(
    space: SearchSpace, trials: Sequence[TrialRecord], parameter: str
) -> dict[Choice, float]:
    """Return how often each choice of a parameter was taken, as a fraction.

    A stage without layers is not asked for its operator, kernel and expansion.
    """
    stage, _, kind = parameter.partition(".")
    asked = [t for t in trials if kind == "num_layers" or t.chosen[f"{stage}.num_layers"]]
    counts = Counter(trial.chosen[parameter] for trial in asked)
    return {c: counts[c] / max(len(asked), 1) for c in space.parameters[parameter]}


def outcomes_table(record: SearchRecord) -> Table:
    """Count the trials by what came of them."""
    counted = Counter[Outcome](trial.outcome for trial in record.trials)
    rows = tuple((OUTCOME_NAMES[outcome], str(count)) for outcome, count in counted.most_common())
    return Table(("networks", "trials"), rows, frozenset({"networks"}))


def found_table(record: SearchRecord) -> Table:
    """Lay the found network out stage by stage."""
    assert record.best is not None
    rows = tuple(
        (
            str(number),
            OPERATORS[stage.operator],
            str(stage.kernel_size),
            str(stage.stride),
            str(stage.expand_ratio),
            str(stage.num_layers),
            str(stage.out_channels),
        )
        for number, stage in enumerate(record.best.stages, start=1)
    )
    columns = ("stage", "operator", "kernel", "stride", "expansion", "layers", "channels")
    return Table(columns, rows, frozenset({"operator"}))


def networks_table(record: SearchRecord, trials: Sequence[TrialRecord]) -> Table:
    """List networks that were trained to their end."""
    has_latency = record.setting["target_artifact"] is not None
    columns = ("trial", "reward", "top-1", "step x", "noise", "size x", "parameters")
    columns += ("latency x",) if has_latency else ()
    rows: list[tuple[str, ...]] = []
    for trial in trials:
        cells = (
            str(trial.number),
            f"{trial.reward:.4f}",
            format_percent(trial.top1 or 0.0),
            f"{trial.step_ratio:.2f}",
            f"± {format_percent(trial.step_noise or 0.0)}",
            f"{trial.size_ratio:.2f}",
            f"{trial.parameters:,}",
        )
        cells += (f"{trial.latency_ratio:.2f}",) if has_latency else ()
        rows.append((*cells, _in_short(trial, record.space)))
    return Table((*columns, "stages"), tuple(rows), frozenset({"stages"}))


def _in_short(trial: TrialRecord, space: SearchSpace) -> str:
    parts: list[str] = []
    for stage in space.network(trial.chosen).stages:
        kind = "F" if stage.operator == "fused_mbconv" else "M"
        parts.append(f"{stage.num_layers}x{kind}{stage.expand_ratio}k{stage.kernel_size}")
    return " ".join(parts)


def choices_table(record: SearchRecord) -> Table:
    """Lay out how often each choice appears among the best, and in brackets among all."""
    # A worker that died, or was given up, while it chose left a part of a network.
    best, every = best_trials(record), [t for t in record.trials if t.network]
    rows: list[tuple[str, ...]] = []
    for number in range(1, len(record.space.backbone.stages) + 1):
        cells: list[str] = []
        for kind in KINDS:
            name = f"stage{number}.{kind}"
            own, all_of = shares(record.space, best, name), shares(record.space, every, name)
            cells.append(
                ", ".join(f"{c}: {100 * own[c]:.0f} % ({100 * all_of[c]:.0f})" for c in own)
            )
        rows.append((str(number), *cells))
    return Table(("stage", *KINDS.values()), tuple(rows), frozenset(KINDS.values()))


def compared_table(record: SearchRecord) -> Table:
    """Lay out what was trained in the end, over its seeds, beside the found network."""
    names = list(dict.fromkeys((run.role, run.name) for run in record.compared))
    has_latency = any(run.latency_ratio is not None for run in record.compared)
    rows: list[tuple[str, ...]] = []
    for role, name in names:
        runs = [run for run in record.compared if (run.role, run.name) == (role, name)]
        latency = [spread([run.latency_ratio or 0.0 for run in runs]).text(2)] * has_latency
        gains = [] if role == "found" else differences(record.compared, name)
        rows.append(
            (
                f"{name} ({role})",
                spread([100 * run.top1 for run in runs]).text(),
                spread([run.step_ratio for run in runs]).text(2),
                f"{runs[0].size_ratio:.2f}",
                *latency,
                spread([run.reward for run in runs]).text(4),
                spread(gains).with_margin("+.4f") if gains else NOTHING,
            )
        )
    columns = ("network", "top-1 %", "step x", "size x", *(["latency x"] * has_latency))
    columns += ("reward", "found is better by (margin)")
    return Table(columns, tuple(rows), frozenset({"network"}))
