"""A checkpoint -> the fastest mixture of int8 and float layers on this machine, within the gate.

The runtime's own profile tells which layers it computes faster in float: depthwise convolutions,
say, or those with few channels. One that is faster alone may still cost more than it spares, since
its maps are converted on both sides; so mixtures by layer and by block are built, and measured
beside the int8 program without any.
"""

import logging
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from efficientnet.formats.artifact import new_artifact_directory
from efficientnet.network.model import ConvNormAct, EfficientNet
from efficientnet.reporting.tables import Table, format_ms
from efficientnet.runtimes import open_runtime
from export.builders.measuring import Infer, measure_callables, profile
from export.checks.gate import AccuracyDropError, require_gate_images
from export.checks.logit_agreement import ParityError
from export.checks.sensitivity import named_blocks
from export.inputs.config import MixedConfig
from export.inputs.reference import Reference

# Profiles are the fastest of this many calls; what is not faster by more is noise.
NUM_CALLS = 20
LEAST_GAIN = 0.05

SECONDS = 6.0
TURNS = 12
NUM_IMAGES = 16

log = logging.getLogger(__name__)

Config = TypeVar("Config", bound=MixedConfig)


def fastest_within_drop(
    reference: Reference,
    kinds: Mapping[str, Config],
    in_float: Config,
    output: Path,
    export: Callable[[Reference, Config], Path],
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Build every kind of int8 artifact, with and without float layers, and write the fastest.

    `kinds` are settings of int8 by name, `in_float` those of the layers that are not int8, and
    `export` writes the artifact of settings to their output.
    """
    require_gate_images(reference)
    with new_artifact_directory(output) as directory:
        root = directory / "tried"
        plain = {kind: replace(config, search=False) for kind, config in kinds.items()}
        float_precision = in_float.precision
        log.info("all layers in %s, to compare with", float_precision)
        all_float = export(reference, replace(in_float, output=root / float_precision))
        found: list[Path] = []

        def tried(name: str, config: Config) -> Path | None:
            log.info("%s%s", name, "".join(f"\n    {layer}" for layer in config.float_layers))
            try:
                found.append(export(reference, replace(config, output=root / name)))
            except (AccuracyDropError, ParityError) as error:
                log.info("left out: %s", error)
                return None
            return found[-1]

        for kind, config in plain.items():
            in_int8 = tried(kind, config)
            if in_int8 is not None:
                paths = (all_float, in_int8)
                batch_size = config.tuned_batch_size
                profiles = profile(paths, NUM_CALLS, batch_size, config.data)
                times = [
                    [(layer["module"], layer["ms"]) for layer in p["layers"]] for p in profiles
                ]
                for level, layers in faster_in_float(reference.model, *times).items():
                    tried(
                        f"{kind}, {level} in {float_precision}",
                        replace(config, float_layers=layers),
                    )
        if not found:
            raise AccuracyDropError(
                "no kind of int8 artifact is within --max-drop; export in "
                f"{float_precision}, or allow more with --max-drop"
            )
        for file in measured_fastest(reference, found, all_float, in_float).iterdir():
            file.rename(directory / file.name)
        shutil.rmtree(root)
        if finish is not None:
            finish(directory)
    return output


# The modules that a runtime's nodes belong to, with the milliseconds of each node.
Times = Sequence[tuple[str, float]]


def faster_in_float(
    model: EfficientNet, in_float: Times, in_int8: Times
) -> dict[str, tuple[str, ...]]:
    """Choose layers, and blocks, that take less time in float: names by "layers" and "blocks".

    Without a level that has none, or the same as another.
    """
    levels = {
        "layers": [name for name, m in model.named_modules() if isinstance(m, ConvNormAct)],
        "blocks": [name for name, _ in named_blocks(model)],
    }
    chosen: dict[str, tuple[str, ...]] = {}
    for level, names in levels.items():
        faster = tuple(
            name
            for name in names
            if time_of(name, in_float) < (1 - LEAST_GAIN) * time_of(name, in_int8)
        )
        if faster and faster not in chosen.values():
            chosen[level] = faster
    return chosen


def time_of(name: str, times: Times) -> float:
    """Add up the times of a module and of all within it."""
    return sum(ms for module, ms in times if f"{module}.".startswith(f"{name}."))


def measured_fastest(
    reference: Reference, found: Sequence[Path], in_float: Path, config: MixedConfig
) -> Path:
    """Measure all in turns, log their times, and return the fastest of `found`."""
    paths = [*found, in_float]
    batch_size = config.tuned_batch_size
    images = reference.parity_images[: max(batch_size, NUM_IMAGES)]
    images = np.resize(images, (max(batch_size, len(images)), *images.shape[1:]))
    openers = {path.name: partial(open_infer, path) for path in paths}
    measured = measure_callables(openers, images, SECONDS, TURNS, batch_size)
    times = {path: statistics.median(measured[path.name]) for path in paths}
    ordered = sorted(paths, key=lambda path: times[path])
    rows = [(path.name, format_ms(times[path])) for path in ordered]
    table = Table(("layers", "p50 ms"), tuple(rows), frozenset(("layers",)))
    log.info("\nmeasured in turns, batch %d\n%s", batch_size, table.aligned_text())
    best = min(found, key=lambda path: times[path])
    if times[in_float] < times[best]:
        log.info(
            "none is faster than all layers in %s: on this machine int8 spares memory, not time",
            in_float.name,
        )
    return best


def open_infer(path: Path) -> Infer:
    """Open an artifact in the process that measures it."""
    return open_runtime(path).infer
