"""A name or a folder -> labelled images as encoded bytes, split into train and val.

`digits` is the data that comes with a dependency: 1,797 handwritten digits of 8 x 8 pixels (UCI
"Optical Recognition of Handwritten Digits", as packaged by scikit-learn).
"""

import hashlib
import io
import random
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from efficientnet.environment import num_usable_cores
from efficientnet.preprocess import ImageError, decode_image

DIGITS = "digits"

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})

# Part of the data's definition, not a setting: train and val must be the same in every command.
SPLIT_SEED = 0
VAL_FRACTION = 0.2
MAX_BROKEN_FRACTION = 0.01


class DatasetError(ValueError):
    """Labelled images that cannot be used: nothing there, one class only, too many broken files."""


@dataclass(frozen=True)
class Sample:
    """One labelled image, in memory (bytes) or on disk (a path)."""

    name: str
    """Stable within its dataset, for messages and predictions."""
    label: int
    source: bytes | Path

    def read(self) -> bytes:
        """Return the encoded image."""
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()


@dataclass(frozen=True)
class Dataset:
    """Train and val images of the same classes."""

    source: str
    """What load_dataset was given: `digits` or an absolute folder."""
    class_names: tuple[str, ...]
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    broken: tuple[str, ...] = ()
    """Files that were left out because they cannot be decoded."""


def load_dataset(source: str | Path) -> Dataset:
    """Load `digits`, or a folder of images.

    The folder holds one folder per class, which is split 80 / 20 within each class with a fixed
    seed, or a `train/` and a `val/` of such folders.

    Raises:
        FileNotFoundError: there is no such folder.
        DatasetError: empty class, one class only, or classes that differ between train and val.
    """
    if str(source) == DIGITS:
        return _load_digits()
    folder = Path(source).expanduser().resolve()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no data at {folder}: expected '{DIGITS}', "
            "or a folder with one folder of images per class"
        )
    if (folder / "train").is_dir() != (folder / "val").is_dir():
        missing = "val" if (folder / "train").is_dir() else "train"
        raise DatasetError(
            f"{folder} has no '{missing}' folder beside its other half; give both, "
            "or one folder per class to have it split"
        )
    if (folder / "train").is_dir():
        train_names, train = _read_classes(folder / "train")
        val_names, val = _read_classes(folder / "val")
        if train_names != val_names:
            only_train = sorted(set(train_names) - set(val_names))
            only_val = sorted(set(val_names) - set(train_names))
            raise DatasetError(
                f"the classes of {folder} differ: only in train: {_shorten(only_train)}; "
                f"only in val: {_shorten(only_val)}; both need the same class folders"
            )
        return Dataset(str(folder), train_names, train, val)
    class_names, samples = _read_classes(folder)
    train, val = _split(samples, class_names)
    return Dataset(str(folder), class_names, train, val)


def without_broken_images(dataset: Dataset) -> Dataset:
    """Decode every file once and leave out those that fail, each of them named in `broken`.

    Shows a progress bar on a terminal. Images in memory are not checked.

    Raises:
        DatasetError: at least 1 % of the files are broken, or a class has none left.
    """
    paths = [s for s in (*dataset.train, *dataset.val) if isinstance(s.source, Path)]
    if not paths:
        return dataset

    def problem(sample: Sample) -> str | None:
        try:
            decode_image(sample.read())
        except (ImageError, OSError) as error:
            return f"{sample.name}: {error}"
        return None

    with ThreadPoolExecutor(num_usable_cores()) as pool:
        checks = pool.map(problem, paths)
        problems = list(tqdm(checks, "checking images", len(paths), disable=None, leave=False))
    broken = {
        id(sample): text for sample, text in zip(paths, problems, strict=True) if text is not None
    }
    if len(broken) >= MAX_BROKEN_FRACTION * len(paths) and broken:
        raise DatasetError(
            f"{len(broken)} of {len(paths)} images under {dataset.source} cannot be decoded, and "
            f"{MAX_BROKEN_FRACTION:.0%} or more is an error: {_shorten(list(broken.values()))}"
        )
    checked = Dataset(
        dataset.source,
        dataset.class_names,
        tuple(s for s in dataset.train if id(s) not in broken),
        tuple(s for s in dataset.val if id(s) not in broken),
        tuple(broken.values()),
    )
    _require_images_of_every_class(checked)
    return checked


def sha256_of_samples(samples: Sequence[Sample]) -> str:
    """Hash images and labels in order: the identity of what an accuracy was measured on."""
    digest = hashlib.sha256()
    for sample in samples:
        data = sample.read()
        digest.update(f"{sample.label} {len(data)} ".encode())
        digest.update(data)
    return digest.hexdigest()


def _load_digits() -> Dataset:
    # scikit-learn is a training dependency; the service imports this module without it.
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    samples: list[Sample] = []
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        # Values are 0..16; 255 / 16 maps them on the full range.
        image = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        samples.append(Sample(f"digits/{index:04d}.png", int(label), buffer.getvalue()))
    class_names = tuple(str(name) for name in digits.target_names)
    train, val = _split(tuple(samples), class_names)
    return Dataset(DIGITS, class_names, train, val)


def _read_classes(folder: Path) -> tuple[tuple[str, ...], tuple[Sample, ...]]:
    classes = sorted(
        entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    if len(classes) < 2:
        found = f"only '{classes[0].name}'" if classes else "none"
        raise DatasetError(f"{folder} needs at least two class folders with images, found {found}")
    samples: list[Sample] = []
    for label, class_folder in enumerate(classes):
        files = sorted(
            path
            for path in class_folder.rglob("*")
            if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
        )
        if not files:
            raise DatasetError(
                f"the class folder {class_folder} holds no images "
                f"({', '.join(sorted(IMAGE_SUFFIXES))}); fill it or remove it"
            )
        samples += [Sample(str(path.relative_to(folder)), label, path) for path in files]
    return tuple(entry.name for entry in classes), tuple(samples)


def _split(
    samples: tuple[Sample, ...], class_names: tuple[str, ...]
) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    by_label: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_label[sample.label].append(sample)
    for label, members in by_label.items():
        if len(members) < 2:
            raise DatasetError(
                f"class '{class_names[label]}' has one image; at least two are needed to split it"
            )
        random.Random(SPLIT_SEED + label).shuffle(members)
    num_val = _largest_remainder(
        {label: len(members) * VAL_FRACTION for label, members in by_label.items()}
    )
    train = [s for label, members in by_label.items() for s in members[num_val[label] :]]
    val = [s for label, members in by_label.items() for s in members[: num_val[label]]]
    return tuple(sorted(train, key=lambda s: s.name)), tuple(sorted(val, key=lambda s: s.name))


def _largest_remainder(shares: dict[int, float]) -> dict[int, int]:
    # Whole numbers that add up to the rounded-up total, each class within one of its exact share
    # and at least 1, so that 1,797 digits give 360 held-out ones.
    counts = {label: max(1, int(share)) for label, share in shares.items()}
    missing = -int(-sum(shares.values()) // 1) - sum(counts.values())
    by_remainder = sorted(shares, key=lambda label: (int(shares[label]) - shares[label], label))
    for label in by_remainder[: max(0, missing)]:
        counts[label] += 1
    return counts


def _require_images_of_every_class(dataset: Dataset) -> None:
    for part, samples in (("train", dataset.train), ("val", dataset.val)):
        present = {sample.label for sample in samples}
        for label, name in enumerate(dataset.class_names):
            if label not in present:
                raise DatasetError(f"class '{name}' has no readable image in {part}")


def _shorten(items: list[str], limit: int = 5) -> str:
    if not items:
        return "none"
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return "; ".join(items[:limit]) + rest
