"""WebDataset tar shards, here or elsewhere -> labelled images, each at its place in a shard.

A shard is read through once for its headers and labels; images are then read where they lie, in
any order, so shards are shuffled, split and resumed as exactly as files. Remote shards are fetched
once, into $EFFICIENTNET_CACHE (default ~/.cache/efficientnet).
"""

import glob
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple, NoReturn

from efficientnet.images.brace_expansion import expand_braces
from efficientnet.images.fetching import CLASSES_FILE, fetch_shards, is_remote
from efficientnet.images.tar_index import (
    IMAGE_SUFFIXES,
    DatasetError,
    TarMember,
    is_hidden,
    walk_tar,
)
from efficientnet.machine.threads import map_in_threads

# Little more than a header: large images are jumped over, small ones still come many to a read.
READ_BYTES = 16 * 1024
# Waiting for a disk or a file server, not computing.
NUM_INDEXING_THREADS = 4

# Up to the first dot of the file's name, which is WebDataset's rule.
_MEMBER_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_IMAGE_KEY = re.compile(
    rf"#((?:[^/#\s]*\.)?(?:{'|'.join(suffix[1:] for suffix in sorted(IMAGE_SUFFIXES))}))",
    re.IGNORECASE,
)
# A label in a .txt; what is longer is a caption.
MAX_LABEL_BYTES = 200
_VAL_WORD = re.compile(r"(?<![a-z])(?:val|valid|validation|test)(?![a-z])", re.IGNORECASE)

log = logging.getLogger(__name__)


class Label(NamedTuple):
    """What a shard says of an image's class, and which of its files says it."""

    value: int | str
    """The class's number, or its name."""
    file: str


class IndexedShard(NamedTuple):
    """What one shard holds."""

    images: list[tuple[str, Label, TarMember]]
    """Name, with that of the shard; label; place."""
    num_hidden: int
    """Images that were passed over."""


class LabelledMember(NamedTuple):
    """One labelled image in a shard."""

    name: str
    """Shard and name within it, e.g. `train-0003.tar/000123.jpg`."""
    label: int
    member: TarMember


@dataclass(frozen=True)
class ShardImages:
    """What a set of shards holds, in the order of the shards' names."""

    source: str
    """The absolute folder or pattern, with its #IMAGE_KEY; the given string for remote shards."""
    class_names: tuple[str, ...]
    train: tuple[LabelledMember, ...]
    val: tuple[LabelledMember, ...]
    """Of the shards with val, valid, validation or test as a word in their name, or in that of a
    folder which not all shards are in."""


def split_image_key(source: str) -> tuple[str, str | None]:
    """Split SHARDS#left.png, which says which image of each key is meant, in two."""
    found = _IMAGE_KEY.search(source)
    if found is None or found.end() < len(source) or Path(source).expanduser().exists():
        return source, None
    return source[: found.start()], found[1].lower()


def with_image_key(source: str, image_key: str) -> str:
    """Return SHARDS#left.png.

    Raises:
        DatasetError: these are no shards, or that is no end of an image's name.
    """
    if not is_shard_source(source):
        raise DatasetError(
            f"image_key {image_key} is for tar shards, and {source} is none: leave it out"
        )
    made = f"{source}#{image_key}"
    if split_image_key(made)[1] is None:
        raise DatasetError(
            f"image_key is {image_key!r}, expected what follows the first dot of the images' "
            "names, e.g. left.png"
        )
    return made


def is_shard_source(source: str) -> bool:
    """Tell whether `source` stands for tar shards: a folder of them, a pattern, URLs or pipe:."""
    source, _ = split_image_key(source)
    if is_remote(source):
        return True
    folder = Path(source).expanduser()
    if folder.is_dir():
        entries = [entry for entry in folder.iterdir() if not is_hidden([entry.name])]
        return any(entry.suffix == ".tar" for entry in entries) and not any(
            entry.is_dir() for entry in entries
        )
    return source.endswith(".tar") or any(letter in source for letter in "*?[{")


def load_shards(source: str) -> ShardImages:
    """Index the shards of `source`; fetch them first if they are remote and not in the cache.

    Args:
        source: a folder of *.tar; a pattern with braces and globs
            (`/data/{train-{000..009},val-{000..001}}.tar`); http(s) URLs with braces; or
            `pipe:COMMAND` with braces, for a command that writes a shard to stdout. Each may end in
            `#left.png`, which of several images of a key is taken.

    Raises:
        DatasetError: no shards, a shard that is damaged or cannot be fetched, or images and labels
            that do not belong together.
    """
    shard_source, image_key = split_image_key(source)
    origin, shards = _locate(shard_source)
    indexed = map_in_threads(
        lambda shard: _index_shard(shard[0], shard[1], image_key),
        shards,
        NUM_INDEXING_THREADS,
        "reading shards",
    )
    if num_hidden := sum(shard.num_hidden for shard in indexed):
        log.info("passed over %d hidden images in the shards", num_hidden)
    class_names = _class_names([path for _, path in shards], indexed)
    numbers: dict[int | str, int] = {name: number for number, name in enumerate(class_names)}
    numbers |= {number: number for number in range(len(class_names))}
    parts: dict[bool, list[LabelledMember]] = {False: [], True: []}
    for (name, _), shard in zip(shards, indexed, strict=True):
        parts[_VAL_WORD.search(name) is not None] += [
            LabelledMember(image, numbers[label.value], member)
            for image, label, member in shard.images
        ]
    origin += f"#{image_key}" if image_key else ""
    return ShardImages(origin, class_names, tuple(parts[False]), tuple(parts[True]))


def list_shard_images(source: str) -> list[tuple[str, TarMember]]:
    """Return name and place of each image in the shards, with a label or without.

    Args:
        source: as in load_shards.

    Raises:
        DatasetError: see load_shards.
    """
    shard_source, image_key = split_image_key(source)
    _, shards = _locate(shard_source)
    listed = map_in_threads(
        lambda shard: _images_of(*shard, image_key), shards, NUM_INDEXING_THREADS, "reading shards"
    )
    return [image for images in listed for image in images]


def _images_of(shard: str, path: Path, image_key: str | None) -> list[tuple[str, TarMember]]:
    with path.open("rb", buffering=READ_BYTES) as file:
        return [
            (f"{shard}/{name}", TarMember(path, offset, size))
            for name, offset, size in walk_tar(file, str(path))
            if Path(name).suffix.lower() in IMAGE_SUFFIXES
            and not is_hidden(name.split("/"))
            and (image_key is None or Path(name).name.partition(".")[2].lower() == image_key)
        ]


def _locate(source: str) -> tuple[str, list[tuple[str, Path]]]:
    """Return what `source` is called in records, and short name and path of each shard."""
    if is_remote(source):
        fetched = fetch_shards(source)
        origin, places = source, [place for place, _ in fetched]
        paths = [path for _, path in fetched]
    else:
        origin, paths = _find_shards(source)
        places = paths
    return origin, sorted(zip(_short_names(places), paths, strict=True))


def _find_shards(source: str) -> tuple[str, list[Path]]:
    folder = Path(source).expanduser()
    if folder.is_dir():
        folder = folder.resolve()
        return str(folder), [p for p in folder.glob("*.tar") if not is_hidden([p.name])]
    pattern = os.path.expanduser(source)
    if not all(Path(path).is_absolute() for path in expand_braces(pattern)):
        pattern = str(Path.cwd() / pattern)
    paths: list[Path] = []
    missing: list[str] = []
    expanded = expand_braces(pattern)
    for text in expanded:
        # A file of that very name first: folders may have brackets in their names.
        found = [text] if Path(text).is_file() else sorted(glob.glob(text))
        files = [Path(path) for path in found if path.endswith(".tar") and Path(path).is_file()]
        paths += files
        if not files:
            missing.append(text)
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise DatasetError(
            f"no shards match {some} ({len(missing)} of the {len(expanded)} paths that {source} "
            "stands for); expected .tar files there: correct the pattern, or bring what is missing"
        )
    return pattern, list(dict.fromkeys(paths))


def _short_names(paths: Sequence[PurePath]) -> list[str]:
    # File names, as far as they tell the shards apart; moving all of them changes no name.
    top = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(top)) for path in paths]


def _class_names(paths: Sequence[Path], indexed: Sequence[IndexedShard]) -> tuple[str, ...]:
    files = [folder / CLASSES_FILE for folder in dict.fromkeys(path.parent for path in paths)]
    listed = {file: _read_classes(file) for file in files if file.is_file()}
    listed = {file: names for file, names in listed.items() if names is not None}
    if len(set(listed.values())) > 1:
        raise DatasetError(
            f"{' and '.join(map(str, listed))} name different classes; the shards of one set "
            "need the same"
        )
    # One image of each label: a million have a thousand.
    labels = {
        label.value: (label, member)
        for shard in indexed
        for _, label, member in reversed(shard.images)
    }
    numbers = sorted(value for value in labels if isinstance(value, int))
    given = sorted(value for value in labels if isinstance(value, str))
    if listed:
        file, names = next(iter(listed.items()))
        for value in (*numbers, *given):
            label, member = labels[value]
            if isinstance(value, int) and value >= len(names):
                raise DatasetError(
                    f"{member.path}: {label.file} has the label {value}, but {file} names "
                    f"{len(names)} classes, so labels end at {len(names) - 1}; correct one of the "
                    "two (labels count from 0)"
                )
            if isinstance(value, str) and value not in names:
                raise DatasetError(
                    f"{member.path}: {label.file} has the class {value!r}, which is none of the "
                    f"{len(names)} in {file}; correct one of the two"
                )
    elif numbers and given:
        (number, shard), (name, other) = labels[numbers[0]], labels[given[0]]
        raise DatasetError(
            f"{shard.path}: {number.file} has a class's number, {numbers[0]}, and {other.path}: "
            f"{name.file} a class's name, {given[0]!r}; expected numbers only, names only, or a "
            f"list of the names in {files[0]}"
        )
    elif given:
        names = tuple(given)
    else:
        names = tuple(str(number) for number in range(numbers[-1] + 1))
        log.warning(
            "the shards have no list of class names at %s: the classes are called 0 to %d; "
            'to name them, put one there, as ["cat", "dog", ...] in the order of the labels',
            " or ".join(map(str, files)),
            numbers[-1],
        )
    if len(names) < 2:
        raise DatasetError(f"{paths[0].parent} has one class only; at least two are needed")
    return names


def _read_classes(file: Path) -> tuple[str, ...] | None:
    try:
        names: Any = json.loads(file.read_bytes())
    except ValueError as error:
        raise DatasetError(f"{file} is not JSON ({error}); expected a list of names") from None
    if names is None:  # what a server without the file leaves in the cache
        return None
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not is_list or len(set(names)) != len(names):
        raise DatasetError(
            f'{file} is not a list of different names; expected ["cat", "dog", ...], '
            "in the order of the labels"
        )
    return tuple(names)


def _index_shard(shard: str, path: Path, image_key: str | None) -> IndexedShard:
    images: dict[str, tuple[str, TarMember]] = {}
    others: dict[str, list[str]] = {}  # images of a key that have more than a suffix: left.png
    labels: dict[str, dict[str, bytes]] = {"cls": {}, "json": {}, "txt": {}}
    first, num_hidden = None, 0
    with path.open("rb", buffering=READ_BYTES) as file:
        for name, offset, size in walk_tar(file, str(path)):
            first = first or name
            if is_hidden(name.split("/")):
                num_hidden += Path(name).suffix.lower() in IMAGE_SUFFIXES
                continue
            match = _MEMBER_NAME.fullmatch(name)
            if match is None:
                continue
            key, extension = match[1], match[2].lower()
            is_image = f".{extension.rpartition('.')[2]}" in IMAGE_SUFFIXES
            if is_image and extension == (image_key or extension.rpartition(".")[2]):
                if key in images:
                    _refuse_twice(path, key, images[key][0], name)
                images[key] = (name, TarMember(path, offset, size))
            elif is_image:
                others.setdefault(key, []).append(extension)
            elif extension in labels and (extension != "txt" or size <= MAX_LABEL_BYTES):
                if extension != "txt" and key in labels[extension]:
                    _refuse_twice(path, key, f"{key}.{extension}", name)
                labels[extension][key] = file.read(size)
    if not images and not any(labels.values()):
        found = f"its first file is {first}" if first else "it has no files"
        raise DatasetError(
            f"{path} holds no labelled images ({found}); expected pairs like 000123.jpg and "
            "000123.cls, the same up to the first dot; pack it again, or leave it out"
        )
    _require_images(path, images, others, labels, image_key)
    return IndexedShard(
        [
            (f"{shard}/{name}", _label_of(path, name, key, labels), member)
            for key, (name, member) in images.items()
        ],
        num_hidden,
    )


def _require_images(
    path: Path,
    images: dict[str, tuple[str, TarMember]],
    others: dict[str, list[str]],
    labels: dict[str, dict[str, bytes]],
    image_key: str | None,
) -> None:
    # Each label has its image.
    strays = [key for key in labels["cls"] if key not in images]
    strays += [
        key
        for key, text in labels["json"].items()
        if key not in images and _document_label(text) is not None
    ]
    strays += [] if images or strays else [key for key in labels["txt"] if key in others]
    if not strays:
        return
    key = strays[0]
    if key in others:
        found, asked = others[key], f"no {image_key}, but " if image_key else ""
        several = f"{len(found)} images" if len(found) > 1 else "an image"
        raise DatasetError(
            f"{path}: the key {key} has {asked}{several} ({', '.join(found)}); say which one is "
            f"meant, with --image-key {found[0]} in training, or #{found[0]} at the end of the "
            "shards' name"
        )
    file = f"{key}.cls" if key in labels["cls"] else f"{key}.json"
    expected = image_key or ", ".join(sorted(IMAGE_SUFFIXES))
    raise DatasetError(
        f"{path}: {file} is the label of no image: expected one of the same name with "
        f"{expected} in the same shard; pack it again"
    )


def _refuse_twice(path: Path, key: str, first: str, second: str) -> NoReturn:
    suffix = Path(first).name.partition(".")[2]
    choose = (
        f"; or take one of them with --image-key {suffix}"
        if first != second and suffix not in ("cls", "json")
        else ""
    )
    raise DatasetError(
        f"{path} holds the key {key} twice ({first} and {second}); expected one image and one "
        "label for each key, which is the name up to its first dot; give the images different "
        f"keys{choose}"
    )


def _label_of(path: Path, name: str, key: str, labels: dict[str, dict[str, bytes]]) -> Label:
    stem, file_name = Path(key).name, Path(name).name
    if (text := labels["cls"].get(key)) is not None:
        return Label(_parse_label(path, f"{stem}.cls", text), file_name)
    if (text := labels["json"].get(key)) is not None:
        label = _document_label(text)
        if label is not None and (isinstance(label, str) or label >= 0):
            return Label(label, file_name)
    if (text := labels["txt"].get(key)) is not None:
        return Label(_parse_label(path, f"{stem}.txt", text), file_name)
    if key in labels["json"]:
        raise DatasetError(
            f"{path}: {file_name} has no label: {stem}.json is no object with a whole "
            f'number from 0, or a name, as "label"; correct it, or add {stem}.cls'
        )
    raise DatasetError(
        f"{path}: {file_name} has no label: expected {stem}.cls or {stem}.txt with the class's "
        f'number or name, or {stem}.json with {{"label": number}}; pack it again'
    )


def _parse_label(path: Path, name: str, text: bytes) -> int | str:
    try:
        label = _number_or_name(text.decode("utf-8"))
    except UnicodeDecodeError:
        label = None
    if label is None:
        raise DatasetError(
            f"{path}: {name} holds {text[:20]!r}; expected a class as a whole number from 0, or "
            "as a name in one line"
        )
    return label


def _number_or_name(text: str) -> int | str | None:
    text = text.strip()
    try:
        return int(text) if int(text) >= 0 else None
    except ValueError:
        # Interned: of a million labels there are a thousand different ones.
        return sys.intern(text) if text and "\n" not in text else None


def _document_label(document: bytes) -> int | str | None:
    try:
        content: Any = json.loads(document)
    except ValueError:
        return None
    label = content.get("label") if isinstance(content, dict) else None
    if isinstance(label, str):
        return _number_or_name(label)
    return label if type(label) is int else None  # True is an int to isinstance
