"""The found network, the backbone and variants of the family -> each trained by several seeds.

The best of many trials owes part of its accuracy to luck. So it is trained again like the others,
for as many epochs, and judged by images that no choice was made by.
"""

import logging

from efficientnet.network.variants import VariantSpec, get_variant
from efficientnet.reporting.tables import format_percent
from training.searching.experiment import train
from training.searching.search_record import COMPARISON, ComparedRun, Role
from training.searching.study import best_trial
from training.searching.worker import Worker

log = logging.getLogger(__name__)


def contestants(worker: Worker) -> list[tuple[Role, VariantSpec]]:
    """Return what is compared; nothing, while no network is whole."""
    best = best_trial(worker.trials())
    if best is None:
        return []
    backbone, found = worker.space.backbone, worker.space.network(best.params)
    rows: list[tuple[Role, VariantSpec]] = [("found", found), ("reference", backbone)]
    for name in worker.config.rivals:
        if name != backbone.name:
            rows.append(("rival", get_variant(name)))
    return rows


def compare(worker: Worker) -> None:
    """Train what is not yet compared, seed by seed, and tell the study."""
    config, study = worker.config, worker.study
    rows = contestants(worker)
    for seed in range(1, config.seeds + 1):
        for role, spec in rows:
            key = f"{COMPARISON}{role} {spec.name} {seed}"
            if key in study.user_attrs:
                continue
            run = _run(worker, role, spec, worker.experiment.base.seed + seed)
            study.set_user_attr(key, run.model_dump(mode="json"))
            log.info(
                "%s %s, seed %d of %d: top-1 %s, step x %.2f, size x %.2f, reward %.4f",
                *(role, spec.name, seed, config.seeds, format_percent(run.top1)),
                *(run.step_ratio, run.size_ratio, run.reward),
            )


def _run(worker: Worker, role: Role, spec: VariantSpec, seed: int) -> ComparedRun:
    experiment = worker.experiment
    step_time = worker.step_ratio_of(spec)
    minival_top1, state = train(experiment, spec, seed)
    state.model.load_state_dict(state.average.tensors)
    top1 = experiment.top1(state.model, experiment.held_out)
    latency_ratio = None
    if worker.bench is not None:
        name = f"{role}-{spec.name}-{seed}"
        latency_ratio = worker.bench.measure(spec, state.average.tensors, name).value
    size_ratio = worker.size_ratio_of(spec)
    return ComparedRun(
        name=spec.name,
        role=role,
        seed=seed,
        top1=top1,
        minival_top1=minival_top1,
        step_ratio=step_time.value,
        step_noise=step_time.noise,
        size_ratio=size_ratio,
        parameters=experiment.num_parameters(spec),
        latency_ratio=latency_ratio,
        reward=worker.config.reward(top1, step_time.value, size_ratio, latency_ratio),
    )
