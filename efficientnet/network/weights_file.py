"""Weight file, as training programs leave it on disk -> the state dict of one network in it."""

import argparse
import errno
import logging
import pathlib
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from efficientnet.errors import PipelineError
from efficientnet.network.layouts import STEM_WEIGHTS

SAFETENSORS_SUFFIX = ".safetensors"
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".tar", ".ckpt")

# Beside tensors and plain values, what programs store of their command line; these hold values
# only, and to make one runs no code.
PLAIN_CLASSES = [argparse.Namespace, pathlib.PosixPath]

log = logging.getLogger(__name__)


class WeightsError(PipelineError):
    """Weights that cannot be had, or that are not those of the variant."""


def read_weights_file(
    path: Path, entry: str | None = None, drop: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Read the tensors of a network onto the CPU, without running code that may be in the file.

    A training checkpoint's state dict is taken out of it, and the prefix that wrappers put before
    all names is taken off; the log says so.

    Args:
        path: of the file.
        entry: of a checkpoint, the name that the state dict is under; None = the only one.
        drop: tensors, or the beginnings of their dotted names, that are not the network's.
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
    try:
        return _only_network(_state_dict(content, path.name, entry), drop)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None


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
        with (
            warnings.catch_warnings(action="ignore"),  # of torch, about foreign pickles
            torch.serialization.safe_globals(PLAIN_CLASSES),
        ):
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


def _state_dict(content: Any, file: str, entry: str | None) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not content:
        raise WeightsError(
            f"it holds {_kind(content)}, expected names with their tensors: save model.state_dict()"
        )
    if _is_state_dict(content):
        if entry is not None:
            raise WeightsError(f"it is a state dict, with no entries: leave --entry {entry} out")
        return dict(content)
    inner = {name: value for name, value in content.items() if _is_state_dict(value)}
    if not inner:
        name = next(n for n, v in content.items() if not isinstance(v, Tensor))
        raise WeightsError(
            f"{name!r} is {_kind(content[name])}, expected a tensor: save model.state_dict()"
        )
    names = " and ".join(map(str, inner))
    if entry is None and len(inner) > 1:
        raise WeightsError(
            f"it holds {len(inner)} state dicts, {names}; say which one is meant with --entry, "
            f"e.g. --entry {list(inner)[-1]} (of training/import_weights.py)"
        )
    if entry is not None and entry not in inner:
        raise WeightsError(f"it has no state dict under --entry {entry}, there is {names}")
    chosen = entry or next(iter(inner))
    beside = ", ".join(str(name) for name in content if name != chosen) or "nothing"
    log.info("the weights are those under '%s' of %s; beside it: %s", chosen, file, beside)
    return dict(inner[chosen])


def _is_state_dict(value: object) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in value.items())
    )


def _kind(content: object) -> str:
    return "nothing" if content == {} else f"a {type(content).__name__}"


def _only_network(tensors: dict[str, Tensor], drop: Sequence[str]) -> dict[str, Tensor]:
    for start in drop:
        dropped = [n for n in tensors if n == start or n.startswith(f"{start.rstrip('.')}.")]
        if not dropped:
            raise WeightsError(f"--drop {start} names no tensor of it; the first: {_some(tensors)}")
        log.info("left out, as asked: %s", ", ".join(dropped))
        tensors = {n: t for n, t in tensors.items() if n not in dropped}
    prefixes = {
        name.removesuffix(stem)
        for name in tensors
        for stem in STEM_WEIGHTS
        if name == stem or name.endswith(f".{stem}")
    }
    if len(prefixes) > 1:
        found = " and ".join(repr(prefix) for prefix in sorted(prefixes))
        raise WeightsError(
            f"it holds {len(prefixes)} networks, whose names begin with {found}: leave all but one "
            f"out, e.g. --drop {max(prefixes).rstrip('.')} (of training/import_weights.py)"
        )
    prefix = next(iter(prefixes), "")
    others = [name for name in tensors if not name.startswith(prefix)]
    if others:
        raise WeightsError(
            f"{others[0]} {list(tensors[others[0]].shape)} is beside the network, whose names "
            f"begin with '{prefix}' (there are {len(others)} such tensors); leave it out with "
            f"--drop {others[0].partition('.')[0]} (of training/import_weights.py)"
        )
    if prefix:
        log.info("all names begin with '%s', which is taken off", prefix)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _some(tensors: dict[str, Tensor]) -> str:
    return ", ".join(list(tensors)[:5]) or "none"
