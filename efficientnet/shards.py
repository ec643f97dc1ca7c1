"""WebDataset tar shards, here or elsewhere -> labelled images, each at its place in a shard.

A shard is read through once for its headers and labels; images are then read where they lie, in
any order, so shards are shuffled, split and resumed as exactly as files. Remote shards are fetched
once, into $EFFICIENTNET_CACHE (default ~/.cache/efficientnet).
"""

import glob
import itertools
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple, NoReturn

from efficientnet.braces import expand_braces
from efficientnet.fetching import CLASSES_FILE, fetch_shards, is_remote
from efficientnet.tar_index import IMAGE_SUFFIXES, DatasetError, TarMember, walk_tar
from efficientnet.threads import map_in_threads

# Little more than a header: large images are jumped over, small ones still come many to a read.
READ_BYTES = 16 * 1024
# Waiting for a disk or a file server, not computing.
NUM_INDEXING_THREADS = 4

# Up to the first dot of the file's name, which is WebDataset's rule.
_MEMBER_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_VAL_WORD = re.compile(r"(?<![a-z])(?:val|valid|validation|test)(?![a-z])", re.IGNORECASE)

log = logging.getLogger(__name__)


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
    """The absolute folder or pattern; the given string for remote shards."""
    class_names: tuple[str, ...]
    train: tuple[LabelledMember, ...]
    val: tuple[LabelledMember, ...]
    """Of the shards with val, valid, validation or test as a word in their name, or in that of a
    folder which not all shards are in."""


def is_shard_source(source: str) -> bool:
    """Tell whether `source` stands for tar shards: a folder of them, a pattern, URLs or pipe:."""
    if is_remote(source):
        return True
    folder = Path(source).expanduser()
    if folder.is_dir():
        entries = list(folder.iterdir())
        return any(entry.suffix == ".tar" for entry in entries) and not any(
            entry.is_dir() and not entry.name.startswith(".") for entry in entries
        )
    return source.endswith(".tar") or any(letter in source for letter in "*?[{")


def load_shards(source: str) -> ShardImages:
    """Index the shards of `source`; fetch them first if they are remote and not in the cache.

    Args:
        source: a folder of *.tar; a pattern with braces and globs
            (`/data/{train-{000..009},val-{000..001}}.tar`); http(s) URLs with braces; or
            `pipe:COMMAND` with braces, for a command that writes a shard to stdout.

    Raises:
        DatasetError: no shards, a shard that is damaged or cannot be fetched, or images and labels
            that do not belong together.
    """
    if is_remote(source):
        origin, fetched = source, fetch_shards(source)
        places, paths = [place for place, _ in fetched], [path for _, path in fetched]
    else:
        origin, paths = _find_shards(source)
        places = paths
    shards = sorted(zip(_short_names(places), paths, strict=True))
    indexed = map_in_threads(
        lambda shard: _index_shard(*shard), shards, NUM_INDEXING_THREADS, "reading shards"
    )
    class_names = _class_names([path for _, path in shards], indexed)
    parts: dict[bool, list[LabelledMember]] = {False: [], True: []}
    for (name, _), members in zip(shards, indexed, strict=True):
        parts[_VAL_WORD.search(name) is not None] += members
    return ShardImages(origin, class_names, tuple(parts[False]), tuple(parts[True]))


def _find_shards(source: str) -> tuple[str, list[Path]]:
    folder = Path(source).expanduser()
    if folder.is_dir():
        folder = folder.resolve()
        return str(folder), list(folder.glob("*.tar"))
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


def _class_names(
    paths: Sequence[Path], indexed: Sequence[Sequence[LabelledMember]]
) -> tuple[str, ...]:
    files = [folder / CLASSES_FILE for folder in dict.fromkeys(path.parent for path in paths)]
    listed = {file: _read_classes(file) for file in files if file.is_file()}
    listed = {file: names for file, names in listed.items() if names is not None}
    if len(set(listed.values())) > 1:
        raise DatasetError(
            f"{' and '.join(map(str, listed))} name different classes; the shards of one set "
            "need the same"
        )
    highest = max(image.label for members in indexed for image in members)
    if not listed:
        names = tuple(str(label) for label in range(highest + 1))
        log.warning(
            "the shards have no list of class names at %s: the classes are called 0 to %d; "
            'to name them, put one there, as ["cat", "dog", ...] in the order of the labels',
            " or ".join(map(str, files)),
            highest,
        )
    else:
        file, names = next(iter(listed.items()))
        for image in itertools.chain.from_iterable(indexed) if highest >= len(names) else ():
            if image.label >= len(names):
                raise DatasetError(
                    f"{image.member.path}: {Path(image.name).name} has the label {image.label}, "
                    f"but {file} names {len(names)} classes, so labels end at {len(names) - 1}; "
                    "correct one of the two (labels count from 0)"
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


def _index_shard(shard: str, path: Path) -> list[LabelledMember]:
    images: dict[str, tuple[str, TarMember]] = {}
    labels: dict[str, int] = {}
    documents: dict[str, bytes] = {}
    first = None
    with path.open("rb", buffering=READ_BYTES) as file:
        for name, offset, size in walk_tar(file, str(path)):
            first = first or name
            match = _MEMBER_NAME.fullmatch(name)
            if match is None:
                continue
            key, extension = match[1], match[2].lower()
            if f".{extension}" in IMAGE_SUFFIXES:
                if key in images:
                    _refuse_twice(path, key, f"{images[key][0]} and {name}")
                images[key] = (name, TarMember(path, offset, size))
            elif extension == "cls":
                if key in labels:
                    _refuse_twice(path, key, name)
                labels[key] = _parse_label(path, name, file.read(size))
            elif extension == "json":
                if key in documents:
                    _refuse_twice(path, key, name)
                documents[key] = file.read(size)
    if not images and not labels:
        found = f"its first file is {first}" if first else "it has no files"
        raise DatasetError(
            f"{path} holds no labelled images ({found}); expected pairs like 000123.jpg and "
            "000123.cls, the same up to the first dot; pack it again, or leave it out"
        )
    members: list[LabelledMember] = []
    for key, (name, member) in images.items():
        label = labels.pop(key, None)
        if label is None:
            label = _label_of_document(path, name, key, documents.pop(key, None))
        members.append(LabelledMember(f"{shard}/{name}", label, member))
    strays = [f"{key}.cls" for key in labels] or [
        f"{key}.json"
        for key, document in documents.items()
        if key not in images and _document_label(document) is not None
    ]
    if strays:
        raise DatasetError(
            f"{path}: {strays[0]} is the label of no image: expected one of the same name with "
            f"{', '.join(sorted(IMAGE_SUFFIXES))} in the same shard; pack it again"
        )
    return members


def _refuse_twice(path: Path, key: str, names: str) -> NoReturn:
    raise DatasetError(
        f"{path} holds the key {key} twice ({names}); expected one image and one label for each "
        "key, which is the name up to its first dot; give the images different keys"
    )


def _parse_label(path: Path, name: str, text: bytes) -> int:
    try:
        label = int(text)
    except ValueError:
        label = -1
    if label < 0:
        raise DatasetError(
            f"{path}: {name} holds {text[:20]!r}; expected a class as a whole number from 0"
        )
    return label


def _label_of_document(path: Path, name: str, key: str, document: bytes | None) -> int:
    file_name = Path(name).name
    if document is None:
        raise DatasetError(
            f"{path}: {file_name} has no label: expected {Path(key).name}.cls with the class as a "
            f'whole number, or {Path(key).name}.json with {{"label": number}}; pack it again'
        )
    label = _document_label(document)
    if label is None or label < 0:
        raise DatasetError(
            f"{path}: {file_name} has no label: {Path(key).name}.json is no object with a whole "
            f'number from 0 as "label"; correct it, or add {Path(key).name}.cls'
        )
    return label


def _document_label(document: bytes) -> int | None:
    try:
        content: Any = json.loads(document)
    except ValueError:
        return None
    label = content.get("label") if isinstance(content, dict) else None
    return label if type(label) is int else None  # True is an int to isinstance
