"""A tar -> name and place of each file in it, from its headers; and the bytes at such a place."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})

BLOCK_BYTES = 512
ZERO_BLOCK = bytes(BLOCK_BYTES)
CHUNK_BYTES = 1024 * 1024


def is_hidden(parts: Iterable[str]) -> bool:
    """Tell whether a file is none of the data's, by one of the names on the way to it.

    Editors, file managers and archivers leave copies and thumbnails under such names.
    """
    return any(
        (part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in parts
    )


class DatasetError(ValueError):
    """Labelled images that cannot be used: nothing there, one class only, too many broken files."""


@dataclass(frozen=True, slots=True)
class TarMember:
    """The bytes of one file in a tar."""

    path: Path
    """Of the tar."""
    offset: int
    """Of the first byte, from the beginning of the tar."""
    size: int
    """In bytes."""

    def read(self) -> bytes:
        """Return the file's content.

        Raises:
            DatasetError: the tar has become shorter since it was indexed.
        """
        with self.path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), self.size, self.offset)
            while len(data) < self.size:  # one call may return less, on file servers and past 2 GiB
                more = os.pread(file.fileno(), self.size - len(data), self.offset + len(data))
                if not more:
                    raise DatasetError(
                        f"{self.path} ends within {self.size} bytes at {self.offset}: "
                        "it was replaced since it was read first; start the command again"
                    )
                data += more
        return data


def walk_tar(file: IO[bytes], shard: str) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and size of each regular file, with `file` at its first byte.

    Five times as fast as tarfile's list of members, which is lenient, too, with tars that are cut
    short.

    Args:
        file: the tar, on a disk.
        shard: what messages call it.

    Raises:
        DatasetError: no tar, a damaged one or one that is cut short; an image or a label in it is
            a link or a sparse file.
    """
    total = os.fstat(file.fileno()).st_size
    position, long_name, long_size = 0, None, None
    while True:
        file.seek(position)
        header = file.read(BLOCK_BYTES)
        if len(header) < BLOCK_BYTES:
            _refuse_short(shard, total, position + 2 * BLOCK_BYTES)
        if header == ZERO_BLOCK:
            _require_zeros(file, shard, position, total)
            return
        name, kind, size = _parse_header(header, shard, position)
        offset = position + BLOCK_BYTES
        if kind in b"xXgLK":
            extra = file.read(size)
            if len(extra) < size:
                _refuse_short(shard, total, offset + size)
            if kind == ord("L"):
                long_name = _text(extra)
            elif kind in b"xX":
                records = _pax_records(extra, shard, position)
                long_name = records.get("path", long_name)
                long_size = records.get("size", long_size)
        else:
            name, long_name = long_name or name, None
            size, long_size = size if long_size is None else int(long_size), None
            is_folder = kind in b"5\0" and (kind == ord("5") or name.endswith("/"))
            if kind in b"123456" or is_folder:
                is_data = Path(name).suffix.lower() in IMAGE_SUFFIXES | {".cls"}
                if kind in b"12" and is_data and not is_hidden(name.split("/")):
                    advice = "pack it with tar --dereference --hard-dereference"
                    _refuse(shard, f"holds {name} as a link; {advice}")
                size = 0
            elif offset + size > total:
                _refuse_short(shard, total, offset + size, name)
            else:
                yield name, offset, size
        position = offset + -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _parse_header(header: bytes, shard: str, position: int) -> tuple[str, int, int]:
    try:
        checksum = _octal(header[148:156])
        size = _octal(header[124:136])
    except ValueError:
        checksum, size = -1, 0
    # The checksum's own field counts as spaces.
    if checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        if position == 0:
            advice = "it is compressed: decompress it first"
            if header[:2] != b"\x1f\x8b" and header[:4] != b"\x28\xb5\x2f\xfd":
                advice = "bring the shard again"
            _refuse(shard, f"is not a tar (it begins with {header[:16]!r}); {advice}")
        _refuse(shard, f"is damaged: byte {position} begins no tar header; bring it again")
    kind = header[156]
    if kind == ord("S"):
        _refuse(shard, "holds a sparse file; pack it without --sparse")
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:
        name = f"{_text(header[345:500])}/{name}"
    return name, kind, size


def _octal(field: bytes) -> int:
    if field[0] & 0x80:  # GNU's form for more than 8 GiB: a binary number
        return int.from_bytes(field[1:])
    return int(field.partition(b"\0")[0] or b"0", 8)  # int() allows spaces around it


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="backslashreplace")


def _pax_records(data: bytes, shard: str, position: int) -> dict[str, str]:
    # Each is "LENGTH KEY=VALUE\n", and the length counts all of it.
    records: dict[str, str] = {}
    while data.strip(b"\0"):
        length = data.partition(b" ")[0]
        if not length.isdigit() or not int(length):
            _refuse(shard, f"is damaged: no pax header at byte {position}; bring it again")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        records[_text(key)] = _text(value)
        data = data[int(length) :]
    if any(key.startswith("GNU.sparse") for key in records):
        _refuse(shard, "holds a sparse file; pack it without --sparse")
    return records


def _require_zeros(file: IO[bytes], shard: str, position: int, total: int) -> None:
    if total % BLOCK_BYTES:
        _refuse(
            shard,
            f"is cut short: it has {total} bytes, expected a multiple of {BLOCK_BYTES}; "
            "bring the shard again",
        )
    while chunk := file.read(CHUNK_BYTES):
        if chunk.strip(b"\0"):
            _refuse(
                shard,
                f"goes on after its end at byte {position}, like tars that were joined; "
                "join them with tar --concatenate, or give each by itself",
            )


def _refuse_short(shard: str, total: int, expected: int, name: str = "") -> NoReturn:
    if total == 0:
        _refuse(shard, "is empty (0 bytes); expected a tar: bring the shard again")
    within = f" within {name}" if name else ""
    _refuse(
        shard,
        f"is cut short: it has {total} bytes and ends{within} without an end-of-archive mark, "
        f"expected at least {expected} bytes; bring the shard again",
    )


def _refuse(shard: str, problem: str) -> NoReturn:
    raise DatasetError(f"{shard} {problem}")
