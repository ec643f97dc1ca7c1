"""Complete runs -> AblationRecord and the statistics over its seeds; the numbers of the paper."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from scipy import stats

from efficientnet.errors import first_problem
from efficientnet.formats.checkpoint import read_checkpoint
from efficientnet.machine.environment import EnvironmentRecord
from training.recipe.config import changed_values, config_to_json
from training.recipe.stages import plan_stages
from training.running.metrics import read_metrics
from training.running.run_folder import CHECKPOINT, REPORT_FILE
from training.studies.ablation_plan import (
    FIXED,
    PROGRESSIVE,
    PROGRESSIVE_ADAPTIVE,
    RANDOM,
    RANDOM_ADAPTIVE,
    AblationConfig,
    AblationError,
    Experiment,
    PlannedRun,
    Row,
    magnitude_row,
)

# Tan and Le 2021. Table 12: EfficientNet-B4, top-1 and hours. Table 13: top-1. Table 5: top-1 and
# std of three runs, by magnitude and image size.
PAPER_B4 = {FIXED: (82.9, 20.8), PROGRESSIVE_ADAPTIVE: (83.1, 9.4)}
PAPER_TOP1 = {PROGRESSIVE_ADAPTIVE: 85.1, PROGRESSIVE: 84.3, RANDOM: 83.5, RANDOM_ADAPTIVE: 84.2}
PAPER_SIZES, PAPER_MAGNITUDES = (128, 192, 300), (5.0, 10.0, 15.0)
PAPER_MEANS = ((78.3, 81.2, 82.5), (78.0, 81.6, 82.7), (77.7, 81.5, 83.2))
PAPER_NUM_RUNS = 3
PAPER_STDS = ((0.16, 0.06, 0.05), (0.08, 0.08, 0.08), (0.15, 0.05, 0.09))


class RunRecord(BaseModel):
    """What came out of one training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    experiment: Experiment
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
    """ablation.json: the complete rounds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = 1
    name: str
    variant: str
    data: str
    image_sizes: tuple[int, int, int]
    magnitudes: tuple[float, float, float]
    num_rounds: int
    num_rounds_planned: int
    jobs: int
    """Runs at once, when the last of them were made."""
    num_images_evaluated: int
    finished_at: datetime
    environments: tuple[EnvironmentRecord, ...]
    runs: tuple[RunRecord, ...]

    def of(self, row: str) -> list[RunRecord]:
        """Return a row's runs by seed."""
        return sorted((run for run in self.runs if run.row == row), key=lambda run: run.seed)

    def has(self, experiment: Experiment) -> bool:
        """Tell whether there are runs of an experiment."""
        return any(run.experiment == experiment for run in self.runs)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over the seeds."""

    mean: float
    std: float | None
    """None with one seed."""
    num_seeds: int

    @property
    def margin(self) -> float | None:
        """Half of the 95 % confidence interval of the mean (Student's t); None with one seed."""
        if self.std is None:
            return None
        quantile = float(stats.t.ppf(0.975, self.num_seeds - 1))
        return quantile * self.std / math.sqrt(self.num_seeds)

    def text(self) -> str:
        """Write both."""
        return f"{self.mean:,.1f}" + ("" if self.std is None else f" ± {self.std:.1f}")


def read_record(path: Path) -> AblationRecord:
    """Read an ablation.json."""
    text = path.read_bytes()
    try:
        return AblationRecord.model_validate_json(text)
    except ValidationError as error:
        raise AblationError(
            f"{path} is damaged or not the record of an ablation ({first_problem(error)}); give an "
            "ablation.json that training/ablation.py wrote"
        ) from None


def read_result(run: PlannedRun) -> RunRecord:
    """Read what a complete run came to, under the first of its rows.

    Raises:
        AblationError: the run was trained with other values.
    """
    config = run.config
    trained = read_checkpoint(run.directory / CHECKPOINT).train_config
    if changes := changed_values(trained, config_to_json(config)):
        raise AblationError(
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


def _named(result: RunRecord, row: Row) -> RunRecord:
    names = {"experiment": row.experiment, "row": row.name, "magnitude": row.magnitude}
    return result.model_copy(update=names)


def seconds_left(planned: Sequence[PlannedRun], results: dict[Path, RunRecord]) -> float:
    """Estimate the training time that is left: a run takes what its row took, or else all rows."""
    known: dict[str, list[float]] = {}
    for result in results.values():
        known.setdefault(result.row, []).append(result.seconds)
    overall = statistics.fmean(result.seconds for result in results.values())
    left = [run.row.name for run in planned if run.directory not in results]
    return sum(statistics.fmean(known[row]) if row in known else overall for row in left)


def collect_rounds(
    config: AblationConfig, planned: Sequence[PlannedRun], results: dict[Path, RunRecord]
) -> AblationRecord:
    """Put together the rounds that are complete."""
    seeds = {run.seed for run in planned} - {
        run.seed for run in planned if run.directory not in results
    }
    shown = [run for run in planned if run.seed in seeds]
    checkpoints = [read_checkpoint(run.directory / CHECKPOINT) for run in shown]
    newest = max((run.directory / REPORT_FILE).stat().st_mtime for run in shown)
    return AblationRecord(
        name=config.title,
        variant=config.variant,
        data=config.data_name,
        image_sizes=config.image_sizes,
        magnitudes=config.magnitudes,
        num_rounds=len(seeds),
        num_rounds_planned=config.seeds,
        jobs=config.jobs,
        num_images_evaluated=checkpoints[0].num_images_evaluated,
        finished_at=datetime.fromtimestamp(newest, UTC),
        environments=tuple(
            {c.environment.model_dump_json(): c.environment for c in checkpoints}.values()
        ),
        runs=tuple(_named(results[run.directory], row) for run in shown for row in run.rows),
    )


def spread(values: Sequence[float]) -> Spread:
    """Return mean and sample standard deviation."""
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), std, len(values))


def points(record: AblationRecord, row: str) -> list[float]:
    """Return a row's top-1 in percent, by seed."""
    return [100 * run.top1 for run in record.of(row)]


def differences(record: AblationRecord, row: str, other: str) -> list[float]:
    """Return by how many points a row is better than another, by seed."""
    pairs = zip(points(record, row), points(record, other), strict=True)
    return [value - reference for value, reference in pairs]


def difference(record: AblationRecord, row: str, other: str) -> Spread:
    """Return by how many points a row is better than another, seed by seed."""
    return spread(differences(record, row, other))


def time_saved(record: AblationRecord, row: str) -> Spread:
    """Return how much of the fixed schedule's training time a row saves, in %, seed by seed."""
    pairs = zip(record.of(row), record.of(FIXED), strict=True)
    return spread([100 * (1 - own.seconds / fixed.seconds) for own, fixed in pairs])


def magnitude_gain(record: AblationRecord, size: int) -> Spread:
    """Return by how many points the strongest magnitude is better than the weakest at a size."""
    return spread(_magnitude_gains(record, size))


def magnitude_trend(record: AblationRecord) -> Spread:
    """Return by how many points that gain is larger at the largest size than at the smallest."""
    small, _, large = record.image_sizes
    pairs = zip(_magnitude_gains(record, small), _magnitude_gains(record, large), strict=True)
    return spread([at_large - at_small for at_small, at_large in pairs])


def _magnitude_gains(record: AblationRecord, size: int) -> list[float]:
    weak, _, strong = record.magnitudes
    return differences(record, magnitude_row(strong, size), magnitude_row(weak, size))


def magnitude_grid(record: AblationRecord) -> list[list[Spread]]:
    """Return top-1 in percent by magnitude (row) and size (column)."""
    return [
        [spread(points(record, magnitude_row(m, size))) for size in record.image_sizes]
        for m in record.magnitudes
    ]


def paper_grid() -> list[list[Spread]]:
    """Return the same of the paper's Table 5."""
    return [
        [Spread(mean, std, PAPER_NUM_RUNS) for mean, std in zip(means, stds, strict=True)]
        for means, stds in zip(PAPER_MEANS, PAPER_STDS, strict=True)
    ]
