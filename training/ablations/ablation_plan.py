"""What is to be compared -> rows, and for each seed a run of each row, with its flags."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from efficientnet.command import require_least
from efficientnet.errors import PipelineError
from efficientnet.network.variants import get_variant
from training.recipe.config import Schedule, TrainConfig
from training.recipe.recipes import DIGITS_RECIPE
from training.running.command_line import parse
from training.studies.config import StudyFlags

Experiment = Literal["schedules", "magnitudes"]

PROGRESSIVE_ADAPTIVE = "progressive + adaptive"
PROGRESSIVE, FIXED = "progressive", "fixed"
RANDOM, RANDOM_ADAPTIVE = "random resize", "random resize + adaptive"
SCHEDULES = (PROGRESSIVE_ADAPTIVE, PROGRESSIVE, FIXED, RANDOM, RANDOM_ADAPTIVE)
NUM_STAGES, NUM_RANDOM_STAGES = 4, 8  # sizes in random order change more often: every few epochs


class AblationError(PipelineError):
    """A run that failed, or that is not the one that was asked for."""


@dataclass(frozen=True)
class AblationConfig(StudyFlags):
    """What to train, how often, and where it goes."""

    kind = "ablation"

    variant: tyro.conf.Positional[str] = "v2-b0"

    image_sizes: tuple[int, int, int] = (32, 48, 64)
    """Pixels, rising. schedules: from the first to the last. magnitudes: each of them."""

    magnitudes: tuple[float, float, float] = (5.0, 10.0, 15.0)
    """Of RandAugment, rising; for the experiment of that name only."""

    seeds: int = 3
    """Rounds. More of them may be asked for later."""

    epochs: int | None = None
    """None = the recipe's."""

    batch_size: int | None = None
    """None = the recipe's."""

    minival: float | None = None
    """As in training/run.py."""

    recipe: str = DIGITS_RECIPE
    """Of all runs; the ends of its regularisation are those of the adaptive rows, and the last
    value is that of the others."""

    flags: str = ""
    """More of training/run.py for all runs, as --flags="--horizontal-flip --precision bf16"; what
    the rows set themselves (sizes, stages, schedule, seed) cannot be changed."""

    experiments: Literal["both", "schedules", "magnitudes"] = "both"

    jobs: int = 1
    """Runs at once, which share the cores; more than one makes their times less certain."""

    def __post_init__(self) -> None:
        get_variant(self.variant)
        for name in ("image_sizes", "magnitudes"):
            values = getattr(self, name)
            if not values[0] < values[1] < values[2]:
                raise ValueError(f"{name} are {values}, expected three rising ones")
        require_least(self, seeds=1, jobs=1)
        super().__post_init__()


@dataclass(frozen=True)
class Row:
    """What all seeds of a row have in common."""

    experiment: Experiment
    name: str
    image_size: int
    """Of the evaluation, pixels."""
    flags: tuple[str, ...]
    magnitude: float | None = None
    """None among the schedules."""


@dataclass(frozen=True)
class PlannedRun:
    """One training."""

    row: Row
    seed: int
    directory: Path
    arguments: tuple[str, ...]
    """Of training/run.py."""

    @property
    def config(self) -> TrainConfig:
        """The recipe that the arguments stand for."""
        config = parse(list(self.arguments))
        assert isinstance(config, TrainConfig)
        return config


def plan_rows(config: AblationConfig) -> tuple[Row, ...]:
    """Lay out the rows of the experiments.

    Raises:
        ValueError: the recipe has no range of regularisation, or values that no run may have.
    """
    common = common_flags(config)
    base = parse([config.variant, *common, "--progressive.num-stages", "1"])
    if not isinstance(base, TrainConfig):
        raise ValueError("--flags cannot have --resume: start the same ablation again instead")
    pairs = {
        kind: getattr(base.progressive, kind)
        for kind in ("randaugment_magnitude", "mixup_alpha", "cutmix_alpha", "dropout_rate")
    }
    last = {kind: (pair[1], pair[1]) for kind, pair in pairs.items()}
    if pairs == last and config.experiments != "magnitudes":
        raise ValueError(
            f"the recipe {base.recipe} of {config.variant} has one regularisation for all sizes; "
            'give a range, as --flags="--progressive.randaugment-magnitude 5 15"'
        )

    def flags(schedule: Schedule, num_stages: int, sizes: Sequence[int], regularisation: dict):
        num_stages = min(num_stages, base.steps or base.epochs)
        parts = ["--schedule", schedule, "--progressive.num-stages", num_stages]
        parts += ["--progressive.image-size", *sizes, "--eval-image-size", sizes[1]]
        for kind, pair in regularisation.items():
            parts += [f"--progressive.{kind.replace('_', '-')}", *(f"{v:g}" for v in pair)]
        return (*common, *map(str, parts))

    rows: list[Row] = []
    first_size, _, last_size = config.image_sizes
    if config.experiments != "magnitudes":
        schedules: tuple[tuple[str, Schedule, int, dict], ...] = (
            (PROGRESSIVE_ADAPTIVE, "paper", NUM_STAGES, pairs),
            (PROGRESSIVE, "paper", NUM_STAGES, last),
            (FIXED, "fixed", 1, last),
            (RANDOM, "random", NUM_RANDOM_STAGES, last),
            (RANDOM_ADAPTIVE, "random", NUM_RANDOM_STAGES, pairs),
        )
        for name, schedule, num_stages, regularisation in schedules:
            values = flags(schedule, num_stages, (first_size, last_size), regularisation)
            rows.append(Row("schedules", name, last_size, values))
    if config.experiments != "schedules":
        for magnitude in config.magnitudes:
            for size in config.image_sizes:
                regularisation = last | {"randaugment_magnitude": (magnitude, magnitude)}
                values = flags("fixed", 1, (size, size), regularisation)
                name = magnitude_row(magnitude, size)
                rows.append(Row("magnitudes", name, size, values, magnitude))
    for row in rows:
        parse([config.variant, *row.flags])
    return tuple(rows)


def common_flags(config: AblationConfig) -> list[str]:
    """Return the flags that all runs share."""
    values = {
        "--recipe": config.recipe,
        "--data": config.data,
        "--epochs": config.epochs,
        "--batch-size": config.batch_size,
        "--minival": config.minival,
    }
    given = [str(p) for flag, v in values.items() if v is not None for p in (flag, v)]
    return [*given, *shlex.split(config.flags)]


def magnitude_row(magnitude: float, image_size: int) -> str:
    """Name the row of a magnitude and a size."""
    return f"magnitude {magnitude:g} at {image_size} px"


def plan_rounds(config: AblationConfig, rows: Sequence[Row]) -> list[PlannedRun]:
    """Lay out all runs: all rows of a seed before those of the next.

    Each round begins with another row, so that a machine that gets slower or faster favors nobody.
    """
    folder, stride = config.directory / "runs", -(-len(rows) // config.seeds)
    planned: list[PlannedRun] = []
    for seed in range(config.seeds):
        shift = seed * stride % len(rows)
        for row in (*rows[shift:], *rows[:shift]):
            name = f"{'-'.join(row.name.replace('+', ' ').split())}-seed{seed}"
            place = ("--seed", str(seed), "--output", str(folder), "--name", name)
            arguments = (config.variant, *row.flags, *place)
            planned.append(PlannedRun(row, seed, folder / name, arguments))
    return planned
