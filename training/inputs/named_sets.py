"""The name of one of torchvision's sets -> a folder of tar shards (ImageNet: of class folders).

What is fetched, or has to be brought by hand, lies in `torchvision/` beside the sets; the shards
made of it do not need it any more.
"""

import errno
import io
import itertools
import json
import logging
import socket
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision import datasets
from torchvision.datasets.imagenet import ARCHIVE_META, META_FILE
from tqdm import tqdm

from efficientnet.images.datasets import DatasetError
from efficientnet.images.fetching import CLASSES_FILE, file_lock
from efficientnet.machine.atomic import replaced_directory

IMAGES_PER_SHARD = 5000
CONNECTION_TIMEOUT_S = 60.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NamedSet:
    """One of torchvision's sets, and which of its splits are train and val."""

    dataset: Callable[..., Any]
    """torchvision's class; its items are (image, label), and it has `classes`."""
    train: tuple[Mapping[str, Any], ...]
    """Arguments of `dataset` for each of the splits that are train together."""
    val: tuple[Mapping[str, Any], ...]
    by_hand: str
    """What to bring when it cannot be fetched; {root} is torchvision's folder."""
    can_download: bool = True
    has_files: bool = True
    """Whether the images are files, which are taken as they are; if not, they become PNG."""


def _cifar(dataset: type[datasets.CIFAR10]) -> NamedSet:
    by_hand = f"download {dataset.url} to {{root}}"
    return NamedSet(dataset, ({"train": True},), ({"train": False},), by_hand, has_files=False)


NAMED_SETS: Mapping[str, NamedSet] = {
    "cifar10": _cifar(datasets.CIFAR10),
    "cifar100": _cifar(datasets.CIFAR100),
    # Its 1,020 + 1,020 images of train and val are the papers' 2,040 for training.
    "flowers102": NamedSet(
        datasets.Flowers102,
        train=({"split": "train"}, {"split": "val"}),
        val=({"split": "test"},),
        by_hand=(
            "download 102flowers.tgz, imagelabels.mat and setid.mat from "
            "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/ to {root}/flowers-102"
        ),
    ),
    "stanford_cars": NamedSet(
        datasets.StanfordCars,
        train=({"split": "train"},),
        val=({"split": "test"},),
        by_hand=(
            "its address is gone, so bring the set from elsewhere: the folders cars_train and "
            "cars_test with the images, cars_test_annos_withlabels.mat, and "
            "devkit/cars_train_annos.mat and devkit/cars_meta.mat, all to {root}/stanford_cars"
        ),
        can_download=False,
    ),
    "imagenet": NamedSet(
        datasets.ImageNet,
        train=({"split": "train"},),
        val=({"split": "val"},),
        by_hand=(
            f"download {', '.join(name for name, _ in ARCHIVE_META.values())} from "
            "https://image-net.org/challenges/LSVRC/2012/2012-downloads.php to {root}"
        ),
        can_download=False,
    ),
}


def prepare_named_set(
    name: str, root: Path, named_sets: Mapping[str, NamedSet] = NAMED_SETS
) -> Path:
    """Return the folder of a set below `root`, made now if it is not there; for load_dataset.

    Several processes may ask for the same set at once: one makes it, the others wait. DatasetError
    tells what cannot be fetched and has to be brought by hand.
    """
    if name not in named_sets:
        raise ValueError(f"no set is called '{name}'; there are {', '.join(named_sets)}")
    folder = root / name
    named_set = named_sets[name]
    with file_lock(root / f".{name}.lock"):
        if name == "imagenet":
            _unpack_imagenet(named_set, folder)
        elif not (folder / CLASSES_FILE).is_file():
            _write_shards(name, named_set, root / "torchvision", folder)
    return folder


def _write_shards(name: str, named_set: NamedSet, source: Path, folder: Path) -> None:
    log.info("make the shards of %s in %s", name, folder)
    source.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"root": source}
    if named_set.can_download:
        options["download"] = True
    if named_set.has_files:
        options["loader"] = _read_file
    train, val = (
        [_open(name, named_set, source, **options, **split) for split in splits]
        for splits in (named_set.train, named_set.val)
    )
    with replaced_directory(folder) as fresh:
        for part, opened in (("train", train), ("val", val)):
            _write_part(fresh, part, opened)
        classes = [str(class_name) for class_name in train[0].classes]
        # Last, so that its presence means that the shards are whole.
        (fresh / CLASSES_FILE).write_text(json.dumps(classes), encoding="utf-8")


def _read_file(path: str | Path) -> bytes:
    return Path(path).read_bytes()


def _open(name: str, named_set: NamedSet, source: Path, **options: Any) -> Any:
    timeout = socket.getdefaulttimeout()
    try:
        # A firewall that drops packets would hold the command for minutes.
        socket.setdefaulttimeout(CONNECTION_TIMEOUT_S)
        return named_set.dataset(**options)
    except (RuntimeError, ValueError, OSError, HTTPException) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        reason = str(getattr(error, "reason", error)).strip() or type(error).__name__
        raise DatasetError(
            f"torchvision cannot give {name}: {reason.splitlines()[0]}\n"
            f"By hand: {named_set.by_hand.format(root=source)}; then start the command again"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def _write_part(folder: Path, part: str, opened: list[Any]) -> None:
    total = sum(len(dataset) for dataset in opened)
    images = enumerate(tqdm(_images(opened), f"writing {part}", total, disable=None, leave=False))
    for number in range(-(-total // IMAGES_PER_SHARD)):
        with tarfile.open(folder / f"{part}-{number:04d}.tar", "w") as shard:
            for index, (image, label) in itertools.islice(images, IMAGES_PER_SHARD):
                suffix = "png" if image.startswith(b"\x89PNG") else "jpg"
                _add(shard, f"{index:06d}.{suffix}", image)
                _add(shard, f"{index:06d}.cls", str(label).encode())


def _images(opened: list[Any]) -> Iterator[tuple[bytes, int]]:
    for dataset in opened:
        for index in range(len(dataset)):  # torchvision's sets end by no IndexError
            image, label = dataset[index]
            if isinstance(image, Image.Image):
                content = io.BytesIO()
                image.save(content, "PNG")
                image = content.getvalue()
            yield image, int(label)


def _add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    shard.addfile(info, io.BytesIO(content))


def _unpack_imagenet(named_set: NamedSet, folder: Path) -> None:
    # torchvision takes a part for whole when its folder is there, also after an interruption.
    for part, leftovers in (("train", "*.tar"), ("val", "*.JPEG")):
        if (folder / part).is_dir() and (
            any((folder / part).glob(leftovers)) or not any((folder / part).iterdir())
        ):
            raise DatasetError(
                f"{folder / part} was not unpacked to its end; expected class folders only: "
                "remove it, and start the command again"
            )
    wanted = [part for part in ("train", "val") if not (folder / part).is_dir()]
    if not wanted:
        return
    has_devkit = (folder / META_FILE).is_file()
    archives = [ARCHIVE_META[part][0] for part in (*([] if has_devkit else ["devkit"]), *wanted)]
    missing = [archive for archive in archives if not (folder / archive).is_file()]
    if missing:
        raise DatasetError(
            f"{folder} lacks {' and '.join(missing)}: {named_set.by_hand.format(root=folder)}, "
            "and start the command again"
        )
    log.info("unpack %s in %s", " and ".join(archives), folder)
    for split in (*named_set.train, *named_set.val):
        if split["split"] in wanted:
            _open("imagenet", named_set, folder, root=folder, **split)
