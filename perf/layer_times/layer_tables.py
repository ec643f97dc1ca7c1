"""Times of an artifact's layers -> their sums by kind, and tables."""

import logging
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from efficientnet.precision import Precision
from efficientnet.reporting.tables import NOTHING, Table, format_ms, format_percent, format_rate
from perf.layer_times.layer_profile import CLASSIFIER, LayerTime, gop_per_s, share_of_peak
from perf.layer_times.native_limits import LIMITS

log = logging.getLogger(__name__)

NUM_SLOWEST = 15


class KindTime(BaseModel):
    """All layers of one kind."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    ms: float
    share: float
    """Of the sum over all layers, 0..1."""
    num_layers: int
    operations: int
    """Of the convolutions or the classifier in them: two for each multiply-add."""
    gop_per_s: float | None
    share_of_peak: float | None


class ProgramLayers(BaseModel):
    """One artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    program_sha256: str
    variant: str
    runtime: str
    precision: Precision
    image_size: int
    kinds: tuple[KindTime, ...]
    """The slowest first."""
    layers: tuple[LayerTime, ...]
    """In the order in which they run."""
    layers_ms: float
    """Sum over the layers."""
    call_ms: float
    """Fastest call without a profile."""
    median_call_ms: float
    profiled_call_ms: float
    """Fastest call with one."""
    operations_per_s: float | None
    """What the CPU does at most in this precision; None where that is not known."""


def kind_times(layers: Sequence[LayerTime], operations_per_s: float | None) -> tuple[KindTime, ...]:
    """Add the layers of each kind up, the slowest kind first."""
    total_ms = sum(layer.ms for layer in layers)
    kinds: list[KindTime] = []
    for kind in dict.fromkeys(layer.kind for layer in layers):
        members = [layer for layer in layers if layer.kind == kind]
        ms, operations = sum(x.ms for x in members), sum(x.operations for x in members)
        kinds.append(
            KindTime(
                kind=kind,
                ms=ms,
                share=ms / total_ms,
                num_layers=len(members),
                operations=operations,
                gop_per_s=gop_per_s(operations, ms),
                share_of_peak=share_of_peak(operations, ms, operations_per_s),
            )
        )
    return tuple(sorted(kinds, key=lambda kind: -kind.ms))


def log_tables(program: ProgramLayers) -> None:
    """Log the kinds, the slowest layers, and the sum beside a call."""
    log.info("\n%s\n%s", program.path, kinds_table(program).aligned_text())
    log.info("\nslowest layers\n%s", slowest_table(program).aligned_text())
    if program.layers[0].limits_ms:
        log.info("\nleast ms, by what limits it\n%s", limits_table(program).aligned_text())
    log.info(
        "\nlayers: %s ms in all; a call: %s ms without a profile (median %s), %s ms with one",
        format_ms(program.layers_ms),
        format_ms(program.call_ms),
        format_ms(program.median_call_ms),
        format_ms(program.profiled_call_ms),
    )


def kinds_table(program: ProgramLayers) -> Table:
    """Lay out the sums of the kinds, and of all layers."""
    rows = [
        (
            kind.kind,
            format_ms(kind.ms),
            format_percent(kind.share),
            str(kind.num_layers),
            *_rates(kind.gop_per_s, kind.share_of_peak),
        )
        for kind in program.kinds
    ]
    operations = sum(layer.operations for layer in program.layers)
    rows.append(
        (
            "all",
            format_ms(program.layers_ms),
            format_percent(1),
            str(len(program.layers)),
            *_rates(
                gop_per_s(operations, program.layers_ms),
                share_of_peak(operations, program.layers_ms, program.operations_per_s),
            ),
        )
    )
    columns = ("kind", "ms", "share", "layers", "GOP/s", "of peak")
    return Table(columns, tuple(rows), frozenset(("kind",)))


def slowest_table(program: ProgramLayers) -> Table:
    """Lay out the layers that take most time."""
    slowest = sorted(program.layers, key=lambda layer: -layer.ms)[:NUM_SLOWEST]
    rows = [
        (
            _where(layer),
            layer.kind,
            layer.kernel,
            format_ms(layer.ms),
            format_percent(layer.ms / program.layers_ms),
            *_rates(layer.gop_per_s, layer.share_of_peak),
        )
        for layer in slowest
    ]
    columns = ("module", "kind", "kernel", "ms", "share", "GOP/s", "of peak")
    return Table(columns, tuple(rows), frozenset(columns[:3]))


def limits_table(program: ProgramLayers) -> Table:
    """Lay out a native program's layers beside their limits, those of like blocks together."""
    groups: dict[tuple[str, ...], list[LayerTime]] = {}
    for layer in program.layers:
        if layer.limits_ms:
            groups.setdefault(_likeness(layer.module), []).append(layer)
    rows: list[tuple[str, ...]] = []
    least_ms = 0.0
    for layers in groups.values():
        ms = sum(layer.ms for layer in layers)
        limits = {
            name: sum(layer.limits_ms[name] for layer in layers if layer.limits_ms)
            for name in layers[0].limits_ms or ()
        }
        nearest = max(limits, key=lambda name: limits[name])
        least_ms += limits[nearest]
        rows.append(
            (
                layers[0].module,
                layers[0].kind,
                str(len(layers)),
                f"{ms:.3f}",
                *(f"{limit:.3f}" for limit in limits.values()),
                nearest,
                format_percent(limits[nearest] / ms),
            )
        )
    total_ms = sum(layer.ms for layer in program.layers)
    total = ("all", "", str(len(program.layers)), f"{total_ms:.3f}", *[""] * len(LIMITS), "")
    rows.append((*total, format_percent(least_ms / total_ms)))
    columns = ("first of them", "kind", "layers", "ms", *LIMITS, "nearest limit", "reached")
    return Table(columns, tuple(rows), frozenset(("first of them", "kind", "nearest limit")))


def least_ms(program: ProgramLayers, layer: LayerTime) -> float | None:
    """Return below what its limits do not let a layer go; None where they are not known."""
    if layer.limits_ms:
        return max(layer.limits_ms.values())
    if layer.operations and program.operations_per_s:
        return 1e3 * layer.operations / program.operations_per_s
    return None


def _likeness(module: str) -> tuple[str, ...]:
    # Blocks of a stage but the first are alike: features.3.0.block.1.0, features.3.1.block.1.0, ...
    parts = module.split(".")
    if len(parts) < 4:
        return tuple(parts)
    return (*parts[:2], "first" if parts[2] == "0" else "later", *parts[3:])


def side_by_side_table(programs: Sequence[ProgramLayers]) -> Table:
    """Lay out the milliseconds of each kind, a column for each artifact."""
    times = [{kind.kind: kind.ms for kind in program.kinds} for program in programs]
    kinds = dict.fromkeys(kind for own in times for kind in own)
    rows = [(kind, *(format_ms(own.get(kind)) for own in times)) for kind in kinds]
    rows.append(("all layers", *(format_ms(program.layers_ms) for program in programs)))
    rows.append(("a call", *(format_ms(program.call_ms) for program in programs)))
    columns = ("kind", *(program.path for program in programs))
    return Table(columns, tuple(rows), frozenset(("kind",)))


def _rates(rate: float | None, share: float | None) -> tuple[str, str]:
    return (
        NOTHING if rate is None else format_rate(rate),
        NOTHING if share is None else format_percent(share),
    )


def _where(layer: LayerTime) -> str:
    if layer.module in layer.name or layer.kind == CLASSIFIER:
        return layer.module or layer.name
    return f"{layer.name} after {layer.module}"
