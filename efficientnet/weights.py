"""Published weight file (timm's or torchvision's layout) -> the tensors of model.py, all checked.

What a file does not hold -- padding, epsilon, preprocessing -- is not decided here: see
training/published.py.
"""

import errno
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from efficientnet.errors import PipelineError
from efficientnet.model import build_model
from efficientnet.variants import VARIANTS, StageSpec, VariantSpec

Layout = Literal["timm", "torchvision"]

SAFETENSORS_SUFFIX = ".safetensors"
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".tar")

# Part of a batch norm layer that no prediction depends on; TensorFlow has no such thing.
_COUNTER = "num_batches_tracked"
_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var", _COUNTER)

log = logging.getLogger(__name__)


class WeightsError(PipelineError):
    """Weights that cannot be had, or that are not those of the variant."""


def read_weights_file(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file onto the CPU, without running code that may be in it.

    Raises:
        WeightsError: no such file, damaged, of another kind, or more than one level of names.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing there"
        raise WeightsError(
            f"no weights file at {path} ({found}): expected a {SAFETENSORS_SUFFIX} or .pth file"
        )
    if path.suffix not in (SAFETENSORS_SUFFIX, *TORCH_SUFFIXES):
        raise WeightsError(
            f"{path} is not known by its name: expected it to end in {SAFETENSORS_SUFFIX} "
            f"or one of {' '.join(TORCH_SUFFIXES)}"
        )
    if path.stat().st_size == 0:
        raise WeightsError(f"{path} is empty (0 bytes): download or copy it again")
    content = _load_safetensors(path) if path.suffix == SAFETENSORS_SUFFIX else _load_torch(path)
    if not isinstance(content, dict) or not content:
        raise WeightsError(
            f"{path} holds {_kind(content)}, expected names with their tensors: "
            "save model.state_dict()"
        )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise WeightsError(f"{path}: {_what_is_nested(path, content, name)}")
    return content


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise WeightsError(
            f"{path} is truncated, damaged or no safetensors file ({error}): "
            "download or copy it again"
        ) from None


def _load_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # of torch, about foreign pickles
            return torch.load(path, map_location="cpu", weights_only=True)
    # Damaged files raise whatever the zip reader or the unpickler stumble over, among it an invalid
    # seek; torch's own text is long, and advises to run the code.
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found:
            raise WeightsError(
                f"{path} is a pickle of Python objects, which may run code when it is loaded "
                f"({found.group(1)}), expected tensors only: where the file comes from, "
                "save model.state_dict() and nothing else"
            ) from None
        raise WeightsError(
            f"{path} is truncated, damaged or no PyTorch file: download or copy it again"
        ) from None


def _kind(content: object) -> str:
    return "nothing" if content == {} else f"a {type(content).__name__}"


def _what_is_nested(path: Path, content: dict[Any, Any], name: object) -> str:
    inner = [
        key
        for key, value in content.items()
        if isinstance(value, dict) and any(isinstance(part, Tensor) for part in value.values())
    ]
    if not inner:
        return f"{name!r} is {_kind(content[name])}, expected a tensor: save model.state_dict()"
    load = f"torch.load({path.name!r}, weights_only=True)[{inner[0]!r}]"
    return (
        f"a training checkpoint with the entries {', '.join(map(str, content))}, expected weights "
        f"only; there are weights under {' and '.join(repr(key) for key in inner)}, "
        f"save those you mean: torch.save({load}, 'weights.pth')"
    )


def recognize_layout(tensors: dict[str, Tensor]) -> Layout:
    """Tell the layout by the names of the tensors.

    Raises:
        WeightsError: the names are of neither layout, or of both.
    """
    is_torchvision = any(name.startswith("features.") for name in tensors)
    is_timm = any(name.startswith(("blocks.", "conv_stem.", "conv_head.")) for name in tensors)
    if is_torchvision != is_timm:
        return "torchvision" if is_torchvision else "timm"
    first = next(iter(tensors), "none")
    hint = ": saved from a wrapped model, save model.module.state_dict()"
    raise WeightsError(
        f"the tensors are named in {'both layouts' if is_timm else 'no known layout'} (the first: "
        f"{first}{hint if first.startswith(('module.', '_orig_mod.')) else ''}), expected names "
        "like conv_stem.weight (timm) or features.0.0.weight (torchvision)"
    )


def timm_names(spec: VariantSpec) -> dict[str, str]:
    """Map the names of model.py (and torchvision) to timm's, in the order of the network."""
    names: dict[str, str] = {}

    def add(ours: str, theirs: str, tensors: tuple[str, ...]) -> None:
        names.update({f"{ours}.{tensor}": f"{theirs}.{tensor}" for tensor in tensors})

    def add_conv_norm(ours: str, prefix: str, conv: str, norm: str) -> None:
        add(f"{ours}.0", prefix + conv, ("weight",))
        add(f"{ours}.1", prefix + norm, _NORM_TENSORS)

    add_conv_norm("features.0", "", "conv_stem", "bn1")
    for index, stage in enumerate(spec.stages):
        for layer in range(stage.num_layers):
            prefix = f"blocks.{index}.{layer}."
            for position, part in enumerate(_timm_block(stage)):
                ours = f"features.{index + 1}.{layer}.block.{position}"
                if part is None:
                    add(f"{ours}.fc1", f"{prefix}se.conv_reduce", ("weight", "bias"))
                    add(f"{ours}.fc2", f"{prefix}se.conv_expand", ("weight", "bias"))
                else:
                    add_conv_norm(ours, prefix, *part)
    add_conv_norm(f"features.{len(spec.stages) + 1}", "", "conv_head", "bn2")
    add("classifier.1", "classifier", ("weight", "bias"))
    return names


def _timm_block(stage: StageSpec) -> list[tuple[str, str] | None]:
    # timm's convolution and batch norm for each layer of our block; None = squeeze-excite.
    if stage.operator == "fused_mbconv":
        is_single = stage.expand_ratio == 1
        return [("conv", "bn1")] if is_single else [("conv_exp", "bn1"), ("conv_pwl", "bn2")]
    squeeze: list[tuple[str, str] | None] = [] if stage.squeeze_ratio is None else [None]
    if stage.expand_ratio == 1:
        return [("conv_dw", "bn1"), *squeeze, ("conv_pw", "bn2")]
    return [("conv_pw", "bn1"), ("conv_dw", "bn2"), *squeeze, ("conv_pwl", "bn3")]


def convert_weights(
    tensors: dict[str, Tensor], spec: VariantSpec, num_classes: int | None
) -> dict[str, Tensor]:
    """Return the state dict of build_model(spec, num_classes), float32, in its own order.

    What may differ is told in the log: other float types are made float32, and batch norm's
    counters, which TensorFlow lacks, begin at 0.

    Args:
        tensors: of a file, in either layout.
        spec: the variant they must be of.
        num_classes: length that the classifier must have; None = whatever it has.

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
        log.info("%d batch norm counters (%s) are absent and begin at 0", num_absent, _COUNTER)
    for dtype in {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}:
        if dtype != torch.float32:
            log.info("the file has %s tensors: made float32", str(dtype).removeprefix("torch."))
    return converted


def _file_names(spec: VariantSpec, layout: Layout) -> dict[str, str]:
    names = timm_names(spec)
    return names if layout == "timm" else {name: name for name in names}


def _expected_tensors(spec: VariantSpec, num_classes: int) -> dict[str, Tensor]:
    with torch.device("meta"):  # shapes and types, no memory
        return build_model(spec, num_classes).state_dict()


def _num_classes(tensors: dict[str, Tensor], layout: Layout) -> int | None:
    bias = tensors.get("classifier.bias" if layout == "timm" else "classifier.1.bias")
    return bias.shape[0] if bias is not None and bias.ndim == 1 else None


def _misfits(
    tensors: dict[str, Tensor], names: dict[str, str], expected: dict[str, Tensor]
) -> Iterator[str]:
    for ours, theirs in names.items():
        if theirs in tensors:
            problem = _problem(theirs, tensors[theirs], expected[ours])
            if problem:
                yield f"{theirs} {problem}"
        elif not theirs.endswith(_COUNTER):
            yield f"{theirs} is missing, expected it with shape {list(expected[ours].shape)}"
    known = set(names.values())
    for name, tensor in tensors.items():
        if name not in known:
            yield f"{name} {list(tensor.shape)} is extra, no tensor of the network has this name"


def _problem(name: str, tensor: Tensor, expected: Tensor) -> str | None:
    if tensor.layout is not torch.strided or tensor.is_meta:
        return "holds no plain values (sparse, or on the meta device)"
    if tensor.is_floating_point() != expected.is_floating_point():
        wanted = "floating-point" if expected.is_floating_point() else "whole"
        return f"has values of type {tensor.dtype}, expected {wanted} numbers"
    if tensor.shape != expected.shape:
        found, wanted = list(tensor.shape), list(expected.shape)
        if name.startswith("classifier.") and found[1:] == wanted[1:]:
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
        names = _file_names(spec, layout)
        required = {name for name in names.values() if not name.endswith(_COUNTER)}
        if spec.name != but.name and required <= set(tensors) <= set(names.values()):
            expected = _expected_tensors(spec, num_classes)
            if not any(_misfits(tensors, names, expected)):
                return spec.name
    return None
