"""The family as a table, or one of its members stage by stage.

python -m efficientnet
python -m efficientnet --layers v2-s
python -m efficientnet --layers b0 --image-size 320
python -m efficientnet --variant-file FOUND.json
python -m efficientnet --variant-file FOUND.json --phi 2 --save LARGER.json
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from efficientnet.command import parse_flags, run_command
from efficientnet.network import variants
from efficientnet.network.cost import Cost, layer_costs, network_cost, total_cost
from efficientnet.network.scaling import compound_scale
from efficientnet.network.variant_file import read_variant_file, write_variant_file
from efficientnet.reporting.tables import NOTHING, Table, format_percent


@dataclass(frozen=True)
class FamilyConfig:
    """What to print."""

    layers: str | None = None
    """A variant, to print stage by stage; None = the whole family."""

    variant_file: Path | None = None
    """A table of stages of one's own, to print stage by stage."""

    phi: float | None = None
    """Make it larger: 2^phi times its cost, about."""

    rule: variants.ScalingRule = "v2"
    """v2: evaluation at 480 px at most, and more layers in the late stages instead. v1: all alike.
    With --phi."""

    save: Path | None = None
    """Write the larger one as a variant file."""

    image_size: int | None = None
    """Pixels at which costs are counted; None = each variant's eval size."""

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"--image-size is {self.image_size}, expected at least 1 pixel")
        if self.layers is not None and self.variant_file is not None:
            raise ValueError("--layers and --variant-file are given: give one of the two")
        if self.phi is not None and self.layers is None and self.variant_file is None:
            raise ValueError("--phi is given: say of which network, by --layers or --variant-file")
        if self.save is not None and self.phi is None:
            raise ValueError("--save writes what --phi makes: give that, too")


def main(config: FamilyConfig) -> str:
    """Return the table."""
    if config.variant_file is not None:
        spec = read_variant_file(config.variant_file)
    elif config.layers is not None:
        spec = variants.get_variant(config.layers)
    else:
        return family_table(config.image_size)
    if config.phi is not None:
        name = f"{spec.name}-phi-{config.phi:g}"
        scale = compound_scale(config.phi)
        origin = {"scaled from": spec.name, "phi": config.phi, "rule": config.rule}
        spec = variants.scale_up(spec, scale, config.rule, name)
        if config.save is not None:
            write_variant_file(config.save, spec, origin)
    return stage_table(spec, config.image_size or spec.eval_image_size)


def family_table(image_size: int | None) -> str:
    """Lay out one row per variant; 1,000 classes."""
    rows: list[dict[str, str]] = []
    for spec in variants.VARIANTS.values():
        cost = network_cost(spec, image_size or spec.eval_image_size)
        published = spec.published or variants.PublishedResult("", top1=0.0)
        rows.append(
            {
                "variant": spec.name,
                "parameters": f"{cost.num_parameters:,}",
                "multiply-adds": f"{cost.multiply_adds / 1e9:.4f} G",
                "train px": str(spec.train_image_size),
                "eval px": str(spec.eval_image_size),
                "dropout": f"{spec.dropout_rate:g}",
                "top-1": format_percent(published.top1) if published.top1 else NOTHING,
                "latency": f"{published.latency_ms:g} ms" if published.latency_ms else NOTHING,
                "training": (
                    f"{published.training_hours:g} h" if published.training_hours else NOTHING
                ),
                "source": published.source or NOTHING,
            }
        )
    where = f"at {image_size} px" if image_size else "at the eval size"
    notes = (
        f"1,000 classes; multiply-adds of one image {where} (the papers call them FLOPs). Top-1 on",
        "ImageNet, latency of a batch of 16 on a V100 in FP16, training on 32 TPU cores: as the",
        "papers report them.",
    )
    return "\n".join((_text(rows, {"variant", "source"}), "", *notes))


def stage_table(spec: variants.VariantSpec, image_size: int) -> str:
    """Lay out one row per stage, from the stem to the classifier; 1,000 classes, one image."""
    rows: list[dict[str, str]] = []
    layers = layer_costs(spec, image_size)
    total = total_cost(layers)
    for stage, group in groupby(layers, key=lambda layer: layer.stage):
        own = list(group)
        maps = [layer for layer in own if layer.operator != "linear"]
        shape = {
            "channels": f"{own[0].in_channels} > {maps[-1].out_channels}",
            "output px": str(maps[-1].output_size),
        }
        rows.append(_describe(spec, stage) | shape | _cost_cells(total_cost(own), total))
    empty = dict.fromkeys(rows[0], "")
    rows.append(
        empty | {"stage": "sum", "blocks": str(spec.num_blocks)} | _cost_cells(total, total)
    )
    notes = (
        f"{spec.name} at {image_size} px, 1,000 classes, one image. Statistics: batch norm's "
        "running means and",
        "variances, not trained. Activations: float32 maps, read and written once by each "
        "convolution.",
    )
    return "\n".join((_text(rows, {"stage", "operator"}), "", *notes))


def _cost_cells(cost: Cost, total: Cost) -> dict[str, str]:
    return {
        "parameters": f"{cost.num_parameters:,}",
        "statistics": f"{cost.num_statistics:,}",
        "multiply-adds": f"{cost.multiply_adds:,}",
        "share": format_percent(cost.multiply_adds / total.multiply_adds),
        "activations": f"{cost.activation_bytes / 1e6:.1f} MB",
    }


def _describe(spec: variants.VariantSpec, stage: int) -> dict[str, str]:
    columns = ("stage", "operator", "kernel", "stride", "expand", "squeeze", "blocks")
    if stage == 0:
        cells = ("Conv (stem)", 3, 2, NOTHING, NOTHING, NOTHING)
    elif stage > len(spec.stages):
        cells = ("Conv, pool, linear", 1, 1, NOTHING, NOTHING, NOTHING)
    else:
        row = spec.stages[stage - 1]
        operator = {"mbconv": "MBConv", "fused_mbconv": "Fused-MBConv"}[row.operator]
        cells = (operator, row.kernel_size, row.stride, row.expand_ratio)
        cells += (row.squeeze_ratio or NOTHING, row.num_layers)
    return dict(zip(columns, (str(stage), *map(str, cells)), strict=True))


def _text(rows: Sequence[dict[str, str]], words: set[str]) -> str:
    table = Table(
        tuple(rows[0]), tuple(tuple(row.values()) for row in rows), words=frozenset(words)
    )
    return table.aligned_text()


if __name__ == "__main__":
    run_command(lambda: parse_flags(FamilyConfig, __doc__), main)
