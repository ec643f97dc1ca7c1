"""The found network, the backbone and variants of the family -> each trained by several seeds.

The best of many trials owes part of its accuracy to luck. So it is trained again like the others,
for as many epochs, and judged by images that no choice was made by.
"""

import logging
from typing import Literal, NamedTuple

from efficientnet.network.variants import VariantSpec, get_variant
from efficientnet.reporting.tables import format_percent
from training.batches.loader import eval_batches
from training.learning.evaluation import evaluate
from training.searching.experiment import EVAL_BATCH_SIZE, train_to_end
from training.searching.reward import Ratio
from training.searching.search_record import COMPARISON, ComparedRun
from training.searching.study import best_trial
from training.searching.worker import Worker

log = logging.getLogger(__name__)


class Contestant(NamedTuple):
    """One of those that are compared."""

    role: Literal["found", "reference", "rival"]
    spec: VariantSpec


def contestants(worker: Worker) -> list[Contestant]:
    """Return what is compared; nothing, while no network is whole."""
    best = best_trial(worker.trials())
    if best is None:
        return []
    backbone = worker.space.backbone
    rivals = [get_variant(name) for name in worker.config.rivals if name != backbone.name]
    return [
        Contestant("found", worker.space.network(best.params)),
        Contestant("reference", backbone),
        *(Contestant("rival", spec) for spec in rivals),
    ]


def compare(worker: Worker) -> None:
    """Train what is not yet compared, seed by seed, and tell the study."""
    config, study = worker.config, worker.study
    rows = contestants(worker)
    for seed in range(1, config.seeds + 1):
        for row in rows:
            key = f"{COMPARISON}{row.role} {row.spec.name} {seed}"
            if key in study.user_attrs:
                continue
            run = _run(worker, row, worker.experiment.base.seed + seed)
            study.set_user_attr(key, run.model_dump(mode="json"))
            log.info(
                "%s %s, seed %d of %d: top-1 %s, step x %.2f, size x %.2f, reward %.4f",
                run.role,
                run.name,
                seed,
                config.seeds,
                format_percent(run.top1),
                run.step_ratio,
                run.size_ratio,
                run.reward,
            )


def _run(worker: Worker, row: Contestant, seed: int) -> ComparedRun:
    experiment = worker.experiment
    time_of = worker.step_ratio_of(row.spec)
    minival_top1, state = train_to_end(experiment, row.spec, seed)
    state.model.load_state_dict(state.average.tensors)
    images = eval_batches(
        experiment.held_out, experiment.preprocess, EVAL_BATCH_SIZE, experiment.num_workers
    )
    top1 = evaluate(state.model, images, experiment.device).top1
    latency: Ratio | None = None
    if worker.bench is not None:
        name = f"{row.role}-{row.spec.name}-{seed}"
        latency = worker.bench.measure(row.spec, state.average.tensors, name)
    size_ratio = worker.size_ratio_of(row.spec)
    latency_ratio = latency.value if latency else None
    return ComparedRun(
        name=row.spec.name,
        role=row.role,
        seed=seed,
        top1=top1,
        minival_top1=minival_top1,
        step_ratio=time_of.value,
        step_noise=time_of.noise,
        size_ratio=size_ratio,
        parameters=experiment.num_parameters(row.spec),
        latency_ratio=latency_ratio,
        reward=worker.exponents.reward(top1, time_of.value, size_ratio, latency_ratio),
    )
