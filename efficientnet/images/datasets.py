"""A name, a folder or tar shards -> encoded images with their labels, split into train and val.

Two names stand for what comes with a dependency (sample_images.py): `digits`, and `sample-photos`,
which have no labels: enough to check and to time a network that was trained elsewhere.
"""

import hashlib
import logging
import math
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from efficientnet.images.brace_expansion import expand_braces
from efficientnet.images.fetching import is_remote, remote_path
from efficientnet.images.preprocess import ImageError, decode_image
from efficientnet.images.sample_images import CALIBRATION_SEED, digit_images, photo_crops
from efficientnet.images.shards import LabelledMember, is_shard_source, load_shards, split_image_key
from efficientnet.images.tar_index import IMAGE_SUFFIXES, DatasetError, TarMember, is_hidden
from efficientnet.machine.environment import num_usable_cores
from efficientnet.machine.threads import map_in_threads

DIGITS = "digits"
SAMPLE_PHOTOS = "sample-photos"

# WordNet number and name of the 1,000 classes, in the order of the logits.
IMAGENET_CLASSES = Path(__file__).with_name("imagenet_classes.txt")

WORDNET_NUMBER = re.compile(r"n\d{8}(?=[_.])")

# Part of the data's definition, not a setting: train and val must be the same in every command.
SPLIT_SEED = 0
VAL_FRACTION = 0.2
MAX_BROKEN_FRACTION = 0.01
MAX_HELD_OUT_FRACTION = 0.5

# Other tools call it so; the first of them that stands beside train/ is taken.
VAL_FOLDERS = ("val", "valid", "validation", "test")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled image, in memory (bytes) or on disk (a path, or a place in a tar)."""

    name: str
    """Stable within its dataset and different for each of its images, for messages, predictions
    and to leave images out. Of a file: its path below the dataset's folder, with train/ or val/."""
    label: int
    source: bytes | Path | TarMember

    def read(self) -> bytes:
        """Return the encoded image."""
        if isinstance(self.source, bytes):
            return self.source
        return (
            self.source.read() if isinstance(self.source, TarMember) else self.source.read_bytes()
        )


@dataclass(frozen=True)
class Dataset:
    """Train and val images of the same classes."""

    source: str
    """What gives the same again: `digits`, `sample-photos`, an absolute folder or pattern, or the
    URLs or the command of remote shards."""
    class_names: tuple[str, ...]
    """None for images without labels."""
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    broken: tuple[str, ...] = ()
    """Files that were left out because they cannot be decoded."""


def load_dataset(source: str | Path, is_split: bool = True) -> Dataset:
    """Load `digits`, `sample-photos`, a folder of images, or WebDataset tar shards.

    Args:
        source: a name; a folder that holds one folder per class, or files that begin with the
            WordNet number of their class (n01440764_tench.JPEG), or a `train/` and a `val/` (or
            another of VAL_FOLDERS) of one of these; or what shards.load_shards accepts.
        is_split: whether one folder per class, or shards none of which are val's, are split 80 / 20
            within each class, with a fixed seed; if not, all images are val's.

    Raises:
        FileNotFoundError: there is no such folder.
        DatasetError: empty class, one class only, a class that only val has, or shards that
            cannot be used.
    """
    if str(source) == DIGITS:
        return _load_digits()
    if str(source) == SAMPLE_PHOTOS:
        return _load_sample_photos()
    if is_shard_source(str(source)):
        dataset = _load_shards(str(source), is_split)
    else:
        dataset = _load_folder(Path(source).expanduser().resolve(), is_split)
    if dataset.train and dataset.val:
        _warn_of_classes_without_val(dataset)
    return dataset


def find_image_files(folder: Path) -> tuple[list[Path], int]:
    """Return the images below a folder, sorted, and how many hidden ones were passed over."""
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
    )
    found = [path for path in paths if not is_hidden(path.relative_to(folder).parts)]
    return found, len(paths) - len(found)


def read_photos(folder: Path) -> list[bytes]:
    """Read all images below a folder, in the order of their paths.

    Raises:
        DatasetError: there are none.
    """
    paths, _ = find_image_files(folder)
    if not paths:
        raise DatasetError(f"no images in {folder}; give a folder of JPEG files")
    return [path.read_bytes() for path in paths]


def choose_source(trained_on: str, data: str | Path | None) -> str:
    """Return `data`, or where there is none what a checkpoint or a manifest names.

    But no command: files come from elsewhere, too, and to open one must run nothing.
    """
    if data is not None:
        return str(data)
    if trained_on.startswith("pipe:"):
        raise DatasetError(
            f"it was trained on '{trained_on}'; a command that a file names is not run: read it, "
            "then give it, or other images, with --data"
        )
    return trained_on


def data_name(source: str | None) -> str:
    """Name data for people and records: no path of this machine, no query or command of a source.

    The name of the folder or of the pattern of the shards; of a command, that of its shards only.
    """
    if source is None:
        return DIGITS
    source, _ = split_image_key(source)
    name = _last_part(source)
    if name.count("{") != name.count("}"):  # the braces had folders in them
        name = _last_part(expand_braces(source)[0])
    return name or ("pipe" if source.startswith("pipe:") else "data")


def _last_part(source: str) -> str:
    if is_remote(source):
        return PurePosixPath(remote_path(source)).name
    name = Path(source).name
    return Path(source).resolve().name if name in ("", "..") else name


def hold_out(dataset: Dataset, fraction: float) -> Dataset:
    """Hold out a part of train in the place of val, which is left out: the "minival" of the papers.

    Settings are chosen on it, so that val has no part in any choice. `fraction` of each class's
    train images, rounded up, at least one; drawn with a fixed seed: the same images each time.

    Raises:
        ValueError: the fraction is not above 0 and at most 0.5.
        DatasetError: a class has one train image only, or there are none at all.
    """
    if not 0 < fraction <= MAX_HELD_OUT_FRACTION:
        raise ValueError(
            f"the fraction to hold out is {fraction}, expected more than 0 and at most "
            f"{MAX_HELD_OUT_FRACTION}, e.g. 0.1"
        )
    if not dataset.train:
        raise DatasetError(f"{dataset.source} has no train images; there is nothing to hold out")
    train, val = _split(dataset.train, dataset.class_names, fraction)
    return replace(dataset, train=train, val=val)


def load_held_out(
    trained_on: str, data: str | Path | None, class_names: Sequence[str], needs_labels: bool = False
) -> Dataset:
    """Load what a trained network is checked and measured with; its images are in `val`.

    Args:
        trained_on: the data that its checkpoint or manifest names.
        data: other data, which may have some of the classes only; None = what it was trained on.
        class_names: of the network; the labels of the result count in them. The folders of
            ImageNet's classes may have WordNet's numbers (n01440764) as names.
        needs_labels: whether images without labels are of no use.
    """
    # Weights that were trained elsewhere have seen none of it.
    dataset = load_dataset(choose_source(trained_on, data), is_split=trained_on != SAMPLE_PHOTOS)
    if not dataset.class_names:
        if needs_labels:
            raise DatasetError(
                f"the images of {dataset.source} have no labels; give images with --data FOLDER, "
                "one folder for each class, named by the class"
            )
        return replace(dataset, class_names=tuple(class_names))
    if dataset.class_names == tuple(class_names):
        return dataset
    indices = _class_indices(dataset.class_names, class_names)
    if indices is None:
        raise DatasetError(
            f"the classes of {dataset.source} are not those of the network: "
            f"{_shorten(dataset.class_names, ', ')} against {_shorten(class_names, ', ')}; "
            "give the data it was trained for with --data"
        )
    train, val = (
        tuple(replace(sample, label=indices[sample.label]) for sample in part)
        for part in (dataset.train, dataset.val)
    )
    return replace(dataset, class_names=tuple(class_names), train=train, val=val)


def without_broken_images(dataset: Dataset) -> Dataset:
    """Decode every file once and leave out those that fail, each of them named in `broken`.

    Shows a progress bar on a terminal. Images in memory are not checked.
    """
    on_disk = [s for s in (*dataset.train, *dataset.val) if not isinstance(s.source, bytes)]
    if not on_disk:
        return dataset

    def problem(sample: Sample) -> str | None:
        try:
            decode_image(sample.read())
        except (ImageError, OSError) as error:
            return f"{sample.name}: {error}"
        return None

    problems = map_in_threads(problem, on_disk, num_usable_cores(), "checking images")
    broken = {
        id(sample): text for sample, text in zip(on_disk, problems, strict=True) if text is not None
    }
    if len(broken) >= MAX_BROKEN_FRACTION * len(on_disk) and broken:
        raise DatasetError(
            f"{len(broken)} of {len(on_disk)} images under {dataset.source} cannot be decoded, and "
            f"{MAX_BROKEN_FRACTION:.0%} or more is an error: {_shorten(list(broken.values()))}"
        )
    checked = Dataset(
        dataset.source,
        dataset.class_names,
        tuple(s for s in dataset.train if id(s) not in broken),
        tuple(s for s in dataset.val if id(s) not in broken),
        tuple(broken.values()),
    )
    _require_no_class_lost(dataset, checked)
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
    class_names, images = digit_images()
    samples = tuple(Sample(name, label, data) for name, label, data in images)
    train, val = _split(samples, class_names, VAL_FRACTION)
    return Dataset(DIGITS, class_names, train, val)


def _load_sample_photos() -> Dataset:
    samples = tuple(Sample(name, 0, data) for name, data in photo_crops())
    return Dataset(SAMPLE_PHOTOS, (), (), samples)


def _load_folder(folder: Path, is_split: bool) -> Dataset:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no data at {folder}: expected '{DIGITS}', '{SAMPLE_PHOTOS}', "
            "a folder with one folder of images per class (or train/ and val/ of those), or tar "
            "shards: a folder of *.tar, a pattern like 'DIR/train-{0000..0009}.tar', "
            "'https://...' or 'pipe:COMMAND'"
        )
    if not (folder / "train").is_dir():
        if (folder / "val").is_dir():
            raise DatasetError(
                f"{folder} has no 'train' folder beside its 'val'; give both, "
                "or one folder per class to have it split"
            )
        class_names, samples = _read_classes(folder, folder)
        train, val = _split(samples, class_names, VAL_FRACTION) if is_split else ((), samples)
        return Dataset(str(folder), class_names, train, val)
    held_out = [name for name in VAL_FOLDERS if (folder / name).is_dir()]
    if not held_out:
        raise DatasetError(
            f"{folder} has no 'val' folder beside its 'train' (nor {', '.join(VAL_FOLDERS[1:])}); "
            "give both, or one folder per class to have it split"
        )
    if held_out[0] != "val" or len(held_out) > 1:
        unused = f"; {' and '.join(held_out[1:])} is not used" if held_out[1:] else ""
        log.info("held-out images are those of %s%s", folder / held_out[0], unused)
    class_names, train = _read_classes(folder / "train", folder)
    _, val = _read_classes(folder / held_out[0], folder, class_names)
    return Dataset(str(folder), class_names, train, val)


def _warn_of_classes_without_val(dataset: Dataset) -> None:
    missing = {sample.label for sample in dataset.train} - {s.label for s in dataset.val}
    if missing:
        log.warning(
            "no held-out images of %d of the %d classes: %s; accuracy says nothing about them",
            len(missing),
            len(dataset.class_names),
            _shorten([dataset.class_names[label] for label in sorted(missing)]),
        )


def sample_photos_to_calibrate(count: int) -> tuple[Sample, ...]:
    """Return crops of the sample photographs that are not among those of `sample-photos`."""
    return tuple(Sample(name, 0, data) for name, data in photo_crops(count, CALIBRATION_SEED))


def _load_shards(source: str, is_split: bool) -> Dataset:
    shards = load_shards(source)
    train, val = _samples(shards.train), _samples(shards.val)
    if not val and is_split:
        train, val = _split(train, shards.class_names, VAL_FRACTION)
    elif not val:
        train, val = (), train
    elif not train and is_split:
        raise DatasetError(
            f"all shards of {shards.source} are for validation, by their names; expected some "
            "without val, valid, validation or test in them, for training: add those"
        )
    return Dataset(shards.source, shards.class_names, train, val)


def _samples(members: Sequence[LabelledMember]) -> tuple[Sample, ...]:
    return tuple(Sample(*member) for member in members)


def _class_indices(folders: Sequence[str], class_names: Sequence[str]) -> list[int] | None:
    # By name, or by WordNet's number where the classes are ImageNet's; None if one has no class.
    indices = {name: index for index, name in enumerate(class_names)}
    lines = IMAGENET_CLASSES.read_text(encoding="utf-8").splitlines()
    for synset, _, name in (line.partition(" ") for line in lines):
        if name in indices:
            indices[synset] = indices[name]
    if not all(folder in indices for folder in folders):
        return None
    return [indices[folder] for folder in folders]


def _read_classes(
    folder: Path, top: Path, known: tuple[str, ...] | None = None
) -> tuple[tuple[str, ...], tuple[Sample, ...]]:
    # Labels count in the `known` classes, where these are given; then some may be missing.
    entries = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    found = {e.name: find_image_files(e) for e in entries if not is_hidden([e.name])}
    num_hidden = sum(num for _, num in found.values())
    for entry in entries:
        if is_hidden([entry.name]):
            files, num = find_image_files(entry)
            num_hidden += len(files) + num
    if num_hidden:
        log.info("passed over %d hidden images under %s", num_hidden, folder)
    if not found and known is None and (numbered := _read_numbered(folder, top)):
        return numbered
    class_names = tuple(found) if known is None else known
    if unknown := sorted(set(found) - set(class_names)):
        raise DatasetError(
            f"the classes of {folder} are not those of train: only {folder.name} has "
            f"{_shorten(unknown)}; add them to train, or remove them"
        )
    if len(class_names) < 2:
        only = f"only '{class_names[0]}'" if class_names else "none"
        raise DatasetError(f"{folder} needs at least two class folders with images, found {only}")
    samples: list[Sample] = []
    for label, name in enumerate(class_names):
        files, _ = found.get(name, ([], 0))
        if not files and known is None:
            raise DatasetError(
                f"the class folder {folder / name} holds no images "
                f"({', '.join(sorted(IMAGE_SUFFIXES))}); fill it or remove it"
            )
        samples += [Sample(str(path.relative_to(top)), label, path) for path in files]
    if not samples:
        raise DatasetError(f"{folder} holds no images of train's classes; fill it or remove it")
    return class_names, tuple(samples)


def _read_numbered(folder: Path, top: Path) -> tuple[tuple[str, ...], tuple[Sample, ...]] | None:
    # Photographs of ImageNet that lie side by side; None if one file is named otherwise.
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    found = [WORDNET_NUMBER.match(path.name) for path in files]
    numbers = [match.group() for match in found if match]
    names = sorted(set(numbers))
    if len(numbers) < len(files) or len(names) < 2:
        return None
    labels = {name: label for label, name in enumerate(names)}
    return tuple(names), tuple(
        Sample(str(path.relative_to(top)), labels[number], path)
        for path, number in zip(files, numbers, strict=True)
    )


def _split(
    samples: tuple[Sample, ...], class_names: tuple[str, ...], fraction: float
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
    sizes = {label: len(members) for label, members in by_label.items()}
    num_val = _largest_remainder(sizes, fraction)
    train = [s for label, members in by_label.items() for s in members[num_val[label] :]]
    val = [s for label, members in by_label.items() for s in members[: num_val[label]]]
    return tuple(sorted(train, key=lambda s: s.name)), tuple(sorted(val, key=lambda s: s.name))


def _largest_remainder(sizes: dict[int, int], fraction: float) -> dict[int, int]:
    # Whole numbers that add up to the rounded-up total, each class within one of its exact share
    # and at least 1, so that 1,797 digits give 360 held-out ones. None is a whole class.
    shares = {label: size * fraction for label, size in sizes.items()}
    counts = {label: max(1, int(share)) for label, share in shares.items()}
    # Rounded before: 0.1 + 0.2 is more than 0.3, and a sum of shares would have one image more.
    missing = math.ceil(round(sum(sizes.values()) * fraction, 6)) - sum(counts.values())
    by_remainder = sorted(
        (label for label in shares if counts[label] + 1 < sizes[label]),
        key=lambda label: (int(shares[label]) - shares[label], label),
    )
    for label in by_remainder[: max(0, missing)]:
        counts[label] += 1
    return counts


def _require_no_class_lost(before: Dataset, after: Dataset) -> None:
    # Val may have some of the classes only.
    for part in ("train", "val"):
        had, has = ({s.label for s in getattr(dataset, part)} for dataset in (before, after))
        for label in sorted(had - has):
            raise DatasetError(
                f"class '{before.class_names[label]}' has no readable image in {part}"
            )


def _shorten(items: Sequence[str], comma: str = "; ", limit: int = 5) -> str:
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return comma.join(items[:limit]) + rest
