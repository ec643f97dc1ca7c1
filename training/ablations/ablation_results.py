"""Complete runs -> AblationRecord and what is told of its seeds; the numbers of the paper."""

import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from efficientnet.errors import first_problem
from efficientnet.formats.checkpoint import read_checkpoint
from efficientnet.machine.environment import EnvironmentRecord
from training.ablations import ablation_plan as plan
from training.recipe.config import changed_values, config_to_json
from training.recipe.stages import plan_stages
from training.running.metrics import read_metrics
from training.running.run_folder import CHECKPOINT, REPORT_FILE
from training.studies.spread import Spread, spread

# Tan and Le 2021. Table 12: EfficientNet-B4, top-1 and hours. Table 13: top-1. Table 5: top-1 and
# std of three runs, by magnitude and image size.
PAPER_B4 = {plan.FIXED: (82.9, 20.8), plan.PROGRESSIVE_ADAPTIVE: (83.1, 9.4)}
PAPER_TOP1 = {
    plan.PROGRESSIVE_ADAPTIVE: 85.1,
    plan.PROGRESSIVE: 84.3,
    plan.RANDOM: 83.5,
    plan.RANDOM_ADAPTIVE: 84.2,
}
PAPER_SIZES, PAPER_MAGNITUDES = (128, 192, 300), (5.0, 10.0, 15.0)
PAPER_MEANS = ((78.3, 81.2, 82.5), (78.0, 81.6, 82.7), (77.7, 81.5, 83.2))
PAPER_NUM_RUNS = 3
PAPER_STDS = ((0.16, 0.06, 0.05), (0.08, 0.08, 0.08), (0.15, 0.05, 0.09))


class RunRecord(BaseModel):
    """What came out of one training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    experiment: plan.Experiment
    row: str
    image_size: int
    """Of the evaluation, pixels."""
    magnitude: float | None
    seed: int
    top1: float
    """Of the averaged weights after the last epoch, as top5."""
    top5: float
    seconds: float
    """In training, evaluation excluded."""
    images_per_s: float
    mean_pixels: float
    """Of a training image, over all stages."""
    flags: tuple[str, ...]


class AblationRecord(BaseModel):
    """ablation.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = 1
    name: str
    variant: str
    data: str
    image_sizes: tuple[int, int, int]
    magnitudes: tuple[float, float, float]
    num_rounds: int
    jobs: int
    """Runs at once, when the last of them were made."""
    num_images_evaluated: int
    finished_at: datetime
    environments: tuple[EnvironmentRecord, ...]
    runs: tuple[RunRecord, ...]

    def of(self, row: str) -> list[RunRecord]:
        """Return a row's runs by seed."""
        return sorted((run for run in self.runs if run.row == row), key=lambda run: run.seed)

    def has(self, experiment: plan.Experiment) -> bool:
        """Tell whether there are runs of an experiment."""
        return any(run.experiment == experiment for run in self.runs)


def read_record(path: Path) -> AblationRecord:
    """Read an ablation.json."""
    text = path.read_bytes()
    try:
        return AblationRecord.model_validate_json(text)
    except ValidationError as error:
        raise plan.AblationError(
            f"{path} is damaged or not the record of an ablation ({first_problem(error)}); give an "
            "ablation.json that training/ablation.py wrote"
        ) from None


def read_result(run: plan.PlannedRun) -> RunRecord:
    """Read what a complete run came to; AblationError if it had other values."""
    config = run.config
    trained = read_checkpoint(run.directory / CHECKPOINT).train_config
    if changes := changed_values(trained, config_to_json(config)):
        raise plan.AblationError(
            f"{run.directory} was trained with {'; '.join(changes)}: give another --name or "
            "--output, or the same values"
        )
    epochs = read_metrics(run.directory)
    seconds, step = 0.0, 0
    for epoch in epochs:
        seconds += (epoch.step - step) * config.batch_size / epoch.images_per_s
        step = epoch.step
    stages = plan_stages(config.progressive, config.seed)
    return RunRecord(
        experiment=run.row.experiment,
        row=run.row.name,
        image_size=run.row.image_size,
        magnitude=run.row.magnitude,
        seed=run.seed,
        top1=epochs[-1].top1,
        top5=epochs[-1].top5,
        seconds=seconds,
        images_per_s=step * config.batch_size / seconds,
        mean_pixels=statistics.fmean(stage.image_size**2 for stage in stages),
        flags=(*run.row.flags, "--seed", str(run.seed)),
    )


def collect(
    config: plan.AblationConfig,
    planned: Sequence[plan.PlannedRun],
    results: dict[Path, RunRecord],
) -> AblationRecord:
    """Put together what all runs came to."""
    checkpoints = [read_checkpoint(run.directory / CHECKPOINT) for run in planned]
    newest = max((run.directory / REPORT_FILE).stat().st_mtime for run in planned)
    environments = {c.environment.model_dump_json(): c.environment for c in checkpoints}
    return AblationRecord(
        name=config.title,
        variant=config.variant,
        data=config.data_name,
        image_sizes=config.image_sizes,
        magnitudes=config.magnitudes,
        num_rounds=config.seeds,
        jobs=config.jobs,
        num_images_evaluated=checkpoints[0].num_images_evaluated,
        finished_at=datetime.fromtimestamp(newest, UTC),
        environments=tuple(environments.values()),
        runs=tuple(results[run.directory] for run in planned),
    )


def points(record: AblationRecord, row: str) -> list[float]:
    """Return a row's top-1 in percent, by seed."""
    return [100 * run.top1 for run in record.of(row)]


def gains(record: AblationRecord, row: str, other: str) -> list[float]:
    """Return by how many points a row is better than another, by seed."""
    pairs = zip(points(record, row), points(record, other), strict=True)
    return [value - reference for value, reference in pairs]


def time_saved(record: AblationRecord, row: str) -> list[float]:
    """Return how much of the fixed schedule's training time a row saves, in %, by seed."""
    pairs = zip(record.of(row), record.of(plan.FIXED), strict=True)
    return [100 * (1 - own.seconds / fixed.seconds) for own, fixed in pairs]


def magnitude_gains(record: AblationRecord, size: int) -> list[float]:
    """Return by how many points the strongest magnitude is better than the weakest, by seed."""
    weak, _, strong = record.magnitudes
    return gains(record, plan.magnitude_row(strong, size), plan.magnitude_row(weak, size))


def magnitude_trend(record: AblationRecord) -> list[float]:
    """Return by how many points that gain is larger at the largest size than at the smallest."""
    small, _, large = record.image_sizes
    pairs = zip(magnitude_gains(record, small), magnitude_gains(record, large), strict=True)
    return [at_large - at_small for at_small, at_large in pairs]


def magnitude_grid(record: AblationRecord) -> list[list[Spread]]:
    """Return top-1 in percent by magnitude (row) and size (column)."""
    return [
        [spread(points(record, plan.magnitude_row(m, size))) for size in record.image_sizes]
        for m in record.magnitudes
    ]


def paper_grid() -> list[list[Spread]]:
    """Return the same of the paper's Table 5."""
    return [
        [Spread(mean, std, PAPER_NUM_RUNS) for mean, std in zip(means, stds, strict=True)]
        for means, stds in zip(PAPER_MEANS, PAPER_STDS, strict=True)
    ]
