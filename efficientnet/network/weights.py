"""Tensors of a published weight file, in whatever layout -> those of model.py, all checked.

What a file does not hold -- padding, epsilon, preprocessing -- is not decided here: see
training/inputs/published_weights.py.
"""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from efficientnet.network.layouts import CLASSIFIERS, COUNTER, LAYOUTS, Layout, layouts_of, names_in
from efficientnet.network.model import build_model
from efficientnet.network.variants import VARIANTS, VariantSpec
from efficientnet.network.weights_file import WeightsError

NUM_NAMES_SHOWN = 5

log = logging.getLogger(__name__)


def recognize_layout(tensors: dict[str, Tensor]) -> Layout:
    """Tell the layout by the names of the tensors."""
    found = layouts_of(tensors)
    if len(found) == 1:
        return found[0]
    first = ", ".join(list(tensors)[:NUM_NAMES_SHOWN]) or "none"
    raise WeightsError(
        f"the tensors are named in {'several layouts' if found else 'no known layout'} (the first: "
        f"{first}); tried {', '.join(LAYOUTS)}, expected names like conv_stem.weight (timm), "
        "features.0.0.weight (torchvision) or _conv_stem.weight (efficientnet_pytorch)"
    )


def convert_weights(
    tensors: dict[str, Tensor], spec: VariantSpec, num_classes: int | None
) -> dict[str, Tensor]:
    """Return the state dict of build_model(spec, num_classes), float32, in its own order.

    What may differ is told in the log: other float types are made float32, and batch norm's
    counters, which TensorFlow lacks, begin at 0. `num_classes` None = whatever the classifier has.

    Raises:
        WeightsError: names the first tensor, in the order of the network, that does not fit.
    """
    layout = recognize_layout(tensors)
    names = _file_names(spec, layout)
    expected = _expected_tensors(spec, num_classes or _num_classes(tensors, layout) or 1000)
    misfits = list(_misfits(tensors, names, expected))
    if misfits:
        more = f" (and {len(misfits) - 1} more tensors do not fit)" if len(misfits) > 1 else ""
        other = _variant_that_fits(tensors, layout, spec)
        hint = f"; it looks like {other}, not {spec.name}" if other else ""
        raise WeightsError(f"these are not the weights of {spec.name}: {misfits[0]}{more}{hint}")

    converted = {
        ours: tensors[theirs].detach().to(expected[ours].dtype).contiguous()
        if theirs in tensors
        else torch.zeros_like(expected[ours], device="cpu")
        for ours, theirs in names.items()
    }
    num_absent = sum(theirs not in tensors for theirs in names.values())
    if num_absent:
        log.info("%d batch norm counters (%s) are absent and begin at 0", num_absent, COUNTER)
    for dtype in {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}:
        if dtype != torch.float32:
            log.info("the file has %s tensors: made float32", str(dtype).removeprefix("torch."))
    return converted


def _file_names(spec: VariantSpec, layout: Layout) -> dict[str, str]:
    names = names_in(layout, spec)
    if names is None:
        raise WeightsError(
            f"the tensors are named as in {layout}, which has no {spec.name}: it is another network"
        )
    return names


def _expected_tensors(spec: VariantSpec, num_classes: int) -> dict[str, Tensor]:
    with torch.device("meta"):  # shapes and types, no memory
        return build_model(spec, num_classes).state_dict()


def _num_classes(tensors: dict[str, Tensor], layout: Layout) -> int | None:
    bias = tensors.get(f"{CLASSIFIERS[layout]}.bias")
    return bias.shape[0] if bias is not None and bias.ndim == 1 else None


def _misfits(
    tensors: dict[str, Tensor], names: dict[str, str], expected: dict[str, Tensor]
) -> Iterator[str]:
    for ours, theirs in names.items():
        if theirs in tensors:
            problem = _problem(theirs, tensors[theirs], expected[ours])
            if problem:
                yield f"{theirs} {problem}"
        elif not theirs.endswith(COUNTER):
            yield f"{theirs} is missing, expected it with shape {list(expected[ours].shape)}"
    known = set(names.values())
    for name, tensor in tensors.items():
        if name not in known:
            yield (
                f"{name} {list(tensor.shape)} is extra, no tensor of the network has this name; "
                f"--drop {name} of training/import_weights.py leaves it out"
            )


def _problem(name: str, tensor: Tensor, expected: Tensor) -> str | None:
    if tensor.layout is not torch.strided or tensor.is_meta:
        return "holds no plain values (sparse, or on the meta device)"
    if tensor.is_floating_point() != expected.is_floating_point():
        wanted = "floating-point" if expected.is_floating_point() else "whole"
        return f"has values of type {tensor.dtype}, expected {wanted} numbers"
    if tensor.shape != expected.shape:
        found, wanted = list(tensor.shape), list(expected.shape)
        if name.startswith(tuple(CLASSIFIERS.values())) and found[1:] == wanted[1:]:
            return f"has {found[0]} classes, expected {wanted[0]}"
        return f"has shape {found}, expected {wanted}"
    if not tensor.is_floating_point():
        return None
    values = tensor.detach().float()
    num_bad = int((~values.isfinite()).sum())
    if num_bad:
        return f"has {num_bad} of {values.numel()} values that are NaN or infinite"
    if name.endswith("running_var") and bool((values < 0).any()):
        return f"has a negative variance, {values.min():g}"
    return None


def _variant_that_fits(tensors: dict[str, Tensor], layout: Layout, but: VariantSpec) -> str | None:
    num_classes = _num_classes(tensors, layout)
    if num_classes is None:
        return None
    for spec in VARIANTS.values():
        names = names_in(layout, spec)
        if names is None:
            continue
        required = {name for name in names.values() if not name.endswith(COUNTER)}
        if spec.name != but.name and required <= set(tensors) <= set(names.values()):
            expected = _expected_tensors(spec, num_classes)
            if not any(_misfits(tensors, names, expected)):
                return spec.name
    return None
