"""A variant -> the names of its tensors in the layouts of weight files.

torchvision's are those of model.py. efficientnet_pytorch is the layout of the package of that name
(lukemelas/EfficientNet-PyTorch) and of those that were made of it.
"""

from collections.abc import Callable, Collection
from typing import Literal, get_args

from efficientnet.network.variants import StageSpec, VariantSpec

Layout = Literal["timm", "torchvision", "efficientnet_pytorch"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

# Part of a batch norm layer that no prediction depends on; TensorFlow has no such thing.
COUNTER = "num_batches_tracked"
_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var", COUNTER)

# The first convolution, by which a network in a file is found.
STEM_WEIGHTS = ("conv_stem.weight", "features.0.0.weight", "_conv_stem.weight")

CLASSIFIERS: dict[Layout, str] = {
    "timm": "classifier",
    "torchvision": "classifier.1",
    "efficientnet_pytorch": "_fc",
}

_BEGINNINGS: dict[Layout, tuple[str, ...]] = {
    "timm": ("blocks.", "conv_stem.", "conv_head."),
    "torchvision": ("features.",),
    "efficientnet_pytorch": ("_blocks.", "_conv_stem.", "_conv_head."),
}

# Convolution and batch norm for each layer of our block; None = squeeze-excite.
_Block = list[tuple[str, str] | None]


def layouts_of(names: Collection[str]) -> list[Layout]:
    """Return the layouts that tensors of these names may be in."""
    return [
        layout
        for layout, beginnings in _BEGINNINGS.items()
        if any(name.startswith(beginnings) for name in names)
    ]


def names_in(layout: Layout, spec: VariantSpec) -> dict[str, str] | None:
    """Map the names of model.py to a layout's; None where it has none (fused blocks)."""
    if layout == "torchvision":
        return {name: name for name in timm_names(spec)}
    if layout == "timm":
        return timm_names(spec)
    if any(stage.operator == "fused_mbconv" for stage in spec.stages):
        return None
    blocks = [
        (i, layer) for i, stage in enumerate(spec.stages) for layer in range(stage.num_layers)
    ]
    numbers = {block: number for number, block in enumerate(blocks)}
    return _names(
        spec,
        ends=(("_conv_stem", "_bn0"), ("_conv_head", "_bn1"), CLASSIFIERS[layout]),
        block=lambda stage, layer: f"_blocks.{numbers[stage, layer]}.",
        parts=_efficientnet_pytorch_block,
        squeeze=("_se_reduce", "_se_expand"),
    )


def timm_names(spec: VariantSpec) -> dict[str, str]:
    """Map the names of model.py (and torchvision) to timm's, in the order of the network."""
    return _names(
        spec,
        ends=(("conv_stem", "bn1"), ("conv_head", "bn2"), CLASSIFIERS["timm"]),
        block=lambda stage, layer: f"blocks.{stage}.{layer}.",
        parts=_timm_block,
        squeeze=("se.conv_reduce", "se.conv_expand"),
    )


def _names(
    spec: VariantSpec,
    ends: tuple[tuple[str, str], tuple[str, str], str],
    block: Callable[[int, int], str],
    parts: Callable[[StageSpec], _Block],
    squeeze: tuple[str, str],
) -> dict[str, str]:
    stem, head, classifier = ends
    names: dict[str, str] = {}

    def add(ours: str, theirs: str, tensors: tuple[str, ...]) -> None:
        names.update({f"{ours}.{tensor}": f"{theirs}.{tensor}" for tensor in tensors})

    def add_conv_norm(ours: str, prefix: str, conv: str, norm: str) -> None:
        add(f"{ours}.0", prefix + conv, ("weight",))
        add(f"{ours}.1", prefix + norm, _NORM_TENSORS)

    add_conv_norm("features.0", "", *stem)
    for index, stage in enumerate(spec.stages):
        for layer in range(stage.num_layers):
            prefix = block(index, layer)
            for position, part in enumerate(parts(stage)):
                ours = f"features.{index + 1}.{layer}.block.{position}"
                if part is None:
                    add(f"{ours}.fc1", prefix + squeeze[0], ("weight", "bias"))
                    add(f"{ours}.fc2", prefix + squeeze[1], ("weight", "bias"))
                else:
                    add_conv_norm(ours, prefix, *part)
    add_conv_norm(f"features.{len(spec.stages) + 1}", "", *head)
    add("classifier.1", classifier, ("weight", "bias"))
    return names


def _timm_block(stage: StageSpec) -> _Block:
    if stage.operator == "fused_mbconv":
        is_single = stage.expand_ratio == 1
        return [("conv", "bn1")] if is_single else [("conv_exp", "bn1"), ("conv_pwl", "bn2")]
    squeeze: _Block = [] if stage.squeeze_ratio is None else [None]
    if stage.expand_ratio == 1:
        return [("conv_dw", "bn1"), *squeeze, ("conv_pw", "bn2")]
    return [("conv_pw", "bn1"), ("conv_dw", "bn2"), *squeeze, ("conv_pwl", "bn3")]


def _efficientnet_pytorch_block(stage: StageSpec) -> _Block:
    expand: _Block = [] if stage.expand_ratio == 1 else [("_expand_conv", "_bn0")]
    squeeze: _Block = [] if stage.squeeze_ratio is None else [None]
    return [*expand, ("_depthwise_conv", "_bn1"), *squeeze, ("_project_conv", "_bn2")]
