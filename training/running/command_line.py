"""Command line of training/run.py -> the recipe to train, or the run to go on with."""

import argparse
import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import tyro

from efficientnet.command import describe
from efficientnet.network.variant_file import read_variant_file
from efficientnet.network.variants import get_variant
from training.recipe.config import (
    Schedule,
    TrainConfig,
)
from training.recipe.recipes import DIGITS_RECIPE, FITTED_RECIPES, choose_recipe, recipes_for

# What other tools call a flag.
FLAGS_ELSEWHERE = {
    "--lr": "--optimizer.learning-rate",
    "--learning-rate": "--optimizer.learning-rate",
    "--wd": "--optimizer.weight-decay",
    "--weight-decay": "--optimizer.weight-decay",
    "--opt": "--optimizer.name",
    "--bs": "--batch-size",
    "--batch": "--batch-size",
    "--imgsz": "--progressive.image-size",
    "--img-size": "--progressive.image-size",
    "--image-size": "--progressive.image-size",
    "--workers": "--num-workers",
    "--pretrained": "--weights",
    "--amp": "--precision bf16",
    "--data-dir": "--data",
}


@dataclass(frozen=True)
class ResumeConfig:
    """Go on with a run."""

    resume: Path
    """The run's directory, or one of its checkpoints; it keeps its recipe."""

    variant: str | None = None
    """May be given, and must then be the run's."""

    config: TrainConfig | None = None
    """The run's recipe with the flags that were given; they must say the same, but for what does
    not change what is computed, and for where the data is."""


def parse(args: list[str], doc: str | None = None) -> TrainConfig | ResumeConfig:
    """Read the command line; the values depend on --recipe, --schedule, and the data.

    Raises:
        ValueError: unknown variant, with the nearest names, or a value outside its limits.
        FileNotFoundError, DatasetError: the data cannot be used.
    """
    for argument in args:
        if (here := FLAGS_ELSEWHERE.get(argument.partition("=")[0])) is not None:
            raise ValueError(f"there is no {argument.partition('=')[0]}; here it is {here}")
    chosen, rest = _peek(args, "--recipe")
    asked, rest = _peek(rest, "--variant-file")
    given, _ = _peek(rest, "--resume", "--data", "--schedule", "--weights", "--image-key")
    if given.resume is not None:
        if asked.variant_file is not None:
            raise ValueError("--resume keeps the run's variant: leave --variant-file out")
        return _parse_resume(Path(given.resume), args, doc)
    is_named, table = bool(rest) and not rest[0].startswith("-"), None
    if asked.variant_file is not None:
        table = read_variant_file(Path(asked.variant_file))
        if is_named and rest[0] != table.name:
            raise ValueError(
                f"{asked.variant_file} holds the variant {table.name!r}, and {rest[0]!r} was asked "
                "for: give one of the two"
            )
        rest = rest if is_named else [table.name, *rest]
    elif is_named:
        get_variant(rest[0])
    schedule = given.schedule or "paper"
    if schedule not in get_args(Schedule):
        raise ValueError(f"no schedule {schedule!r}; there are {', '.join(get_args(Schedule))}")
    recipe, reason, facts = chosen.recipe, "", None
    if recipe is None and given.data is None:
        recipe, reason = DIGITS_RECIPE, "no --data"
    elif recipe is None or recipe in FITTED_RECIPES:
        facts = replace(
            _late("inputs.training_data").look_at(given.data, given.image_key),
            **_asked_values(rest),
        )
        if given.weights is not None:
            facts = replace(
                facts,
                start_image_size=_late("inputs.initial_weights").start_image_size(given.weights),
            )
        if recipe is None:
            recipe, reason = choose_recipe(facts, given.weights is not None)
    recipes = recipes_for(recipe, cast(Schedule, schedule), facts, table)
    recipes = {name: replace(values, recipe_reason=reason) for name, values in recipes.items()}
    described = {name: (f"train {name}", values) for name, values in recipes.items()}
    return tyro.extras.overridable_config_cli(described, description=describe(doc), args=rest)


def _asked_values(args: list[str]) -> dict[str, int]:
    # What is asked for in numbers that other values of a recipe follow from. What is none is
    # refused with the other flags.
    asked, _ = _peek(args, "--epochs", "--steps", "--batch-size", "--micro-batch-size")
    return {
        name: int(value)
        for name, value in vars(asked).items()
        if value is not None and value.isdecimal() and int(value)
    }


def _parse_resume(run: Path, args: list[str], doc: str | None) -> ResumeConfig:
    given, flags = _peek(args, "--resume", "--recipe")
    variant = flags.pop(0) if flags and not flags[0].startswith("-") else None
    if not flags and given.recipe is None:
        return ResumeConfig(run, variant)
    begun = _late("running.run_folder").read_recipe(run)
    asked = replace(begun, recipe=given.recipe or begun.recipe)
    # As a recipe's flags are read, but for their defaults, which are the run's own.
    asked = tyro.cli(
        TrainConfig,
        default=asked,
        args=flags,
        description=describe(doc),
        config=(tyro.conf.AvoidSubcommands,),
    )
    return ResumeConfig(run, variant, asked)


def _peek(args: list[str], *flags: str) -> tuple[argparse.Namespace, list[str]]:
    """Return the flags' values, None where not given, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in flags:
        parser.add_argument(flag, *({flag.replace("-", "_").replace("__", "--", 1)} - {flag}))
    return parser.parse_known_args(args)


def _late(module: str) -> Any:
    # Torch is loaded for what reads data, weights or a run, so that --help takes no time.
    return importlib.import_module(f"training.{module}")
