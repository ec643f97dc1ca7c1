"""Bytes of a picture -> an error where decoding would cost too much, counted before it begins.

A few bytes can make a decoder work for minutes: each scan of a progressive JPEG goes through all
pixels anew, and Pillow reads markers, chunks and sub-blocks one by one in Python.
"""

import contextlib
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

MAX_PIXELS = 50_000_000

# Encoders write 10 or so; each costs as much as 3 ms for 50 megapixels when nothing is in it.
MAX_JPEG_SCANS = 100
# Of the segments of a photo, most hold parts of a color profile or of XMP, 64 kB each.
MAX_JPEG_SEGMENTS = 1000
# Before markers, and bytes that are none; Pillow reads each by itself.
MAX_JPEG_FILL_BYTES = 10_000
MAX_PNG_CHUNKS = 20_000
MAX_GIF_BLOCKS = 10_000
MAX_ICO_PICTURES = 100
# Rows of 50 megapixels, each a strip of its own, are fewer; so are tiles of 16 x 16.
MAX_TIFF_STRIPS = 250_000
# What the tags of a TIFF or of EXIF say that they hold, as a multiple of the file: several may
# share bytes, and Pillow copies those for each.
MAX_TIFF_COPIES = 4

TIFF_SIZES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
}
TIFF_STRIP_TAGS = (273, 279, 324, 325)
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
EXIF_HEAD = b"Exif\0\0"

START_OF_SCAN = 0xDA
END_OF_IMAGE = 0xD9
# Start and end of the picture, restarts, and what is reserved: markers that nothing belongs to.
BARE_MARKERS = frozenset({0x01, 0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)})

FILL = re.compile(rb"\xff+")
MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


class TiffTag(NamedTuple):
    """An entry of a TIFF's directory."""

    tag: int
    kind: int
    """Of its values; see TIFF_SIZES."""
    number: int
    """Of its values."""
    order: str
    """Of the file's bytes, as struct names it."""
    place: int
    """Of its value, or of where that is when it is longer than four bytes."""


class ImageError(ValueError):
    """Bytes that cannot be used as an image: damaged, of an unknown kind, or too large."""


class ImageTooLargeError(ImageError):
    """An image of more pixels, or of more parts, than are decoded."""


def require_affordable(data: bytes, max_pixels: int = MAX_PIXELS) -> None:
    """Count what makes a picture costly before Pillow opens it; damage is left to the decoders.

    Takes microseconds for a photo.

    Raises:
        ImageTooLargeError: more scans, segments, chunks, nested pictures or pixels of those than
            any camera or program writes.
    """
    try:
        if data.startswith(b"\xff\xd8\xff"):
            _count_jpeg(data)
        elif data.startswith(PNG_MAGIC):
            _count_png(data)
        elif data.startswith((b"GIF87a", b"GIF89a")):
            _count_gif(data)
        elif data.startswith(b"\0\0\1\0"):
            _count_ico(data, max_pixels)
        elif data.startswith((b"II*\0", b"MM\0*")):
            _count_tiff(data)
    except (struct.error, IndexError):  # it ends early, which its decoder will tell
        return


def refuse_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raise an ImageTooLargeError for more pixels than are decoded."""
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"the image has {width} x {height} pixels, "
            f"more than the {max_pixels / 1e6:g} megapixels allowed"
        )


def first_directory(data: bytes) -> Iterator[TiffTag]:
    """Read the tags of a TIFF's first directory, or of EXIF's; other bytes have none.

    Raises:
        struct.error: it ends early.
    """
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (num_tags,) = struct.unpack_from(f"{order}H", data, start)
    for place in range(start + 2, start + 2 + 12 * num_tags, 12):
        tag, kind, number = struct.unpack_from(f"{order}HHI", data, place)
        yield TiffTag(tag, kind, number, order, place + 8)


def _refuse(found: str, allowed: int) -> None:
    raise ImageTooLargeError(
        f"the image has {found}, more than the {allowed} allowed: decoding it could take minutes; "
        "save it anew with another program"
    )


def _count_jpeg(data: bytes) -> None:
    place, num_segments, num_fill, exif = 2, 0, 0, b""
    while True:
        start = data.find(b"\xff", place)
        if start < 0:
            return
        run = FILL.match(data, start)
        assert run is not None
        num_fill += start - place + run.end() - start - 1
        if num_fill > MAX_JPEG_FILL_BYTES:
            _refuse(f"{num_fill} fill bytes between its markers", MAX_JPEG_FILL_BYTES)
        marker, place = data[run.end()], run.end() + 1
        num_segments += 1
        if num_segments > MAX_JPEG_SEGMENTS:
            _refuse(f"{num_segments} segments before its pixels", MAX_JPEG_SEGMENTS)
        if marker == START_OF_SCAN:
            break
        if marker in BARE_MARKERS or marker == 0:
            continue
        (length,) = struct.unpack_from(">H", data, place)
        if marker == 0xE1 and data.startswith(EXIF_HEAD, place + 2):
            exif += data[place + 8 : place + length]
        place += max(length, 2)
    with contextlib.suppress(struct.error):  # EXIF that ends early
        _count_tiff(exif)
    # In coded pixels the byte after FF is 0 or a restart, so this counts scans and some bytes of
    # thumbnails and profiles: at least as many as there are.
    if _num_pairs(data, 0xDAFF) > MAX_JPEG_SCANS:
        _count_scans(data, place)


def _num_pairs(data: bytes, pair: int) -> int:
    # A quarter of the time of bytes.count: 0.3 ms for a photo of 1 MB.
    places = (np.frombuffer(data, "<u2", (len(data) - start) // 2, start) for start in (0, 1))
    return sum(int(np.count_nonzero(words == pair)) for words in places)


def _count_scans(data: bytes, place: int) -> None:
    """Walk from the length of the first scan to the end of the picture."""
    num_scans, num_segments, marker = 1, 0, START_OF_SCAN
    while marker != END_OF_IMAGE:
        if marker not in BARE_MARKERS:
            (length,) = struct.unpack_from(">H", data, place)
            place += length
        found = MARKER_IN_SCAN.search(data, place)
        if found is None:
            return
        marker, place = found[0][1], found.end()
        num_scans += marker == START_OF_SCAN
        num_segments += marker != START_OF_SCAN
        if num_scans > MAX_JPEG_SCANS:
            _refuse(f"more than {MAX_JPEG_SCANS} scans", MAX_JPEG_SCANS)
        if num_segments > MAX_JPEG_SEGMENTS:
            _refuse(f"{num_segments} segments between its scans", MAX_JPEG_SEGMENTS)


def _count_png(data: bytes) -> None:
    place, num_chunks = len(PNG_MAGIC), 0
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind == b"IEND":
            return
        num_chunks += 1
        if num_chunks > MAX_PNG_CHUNKS:
            _refuse(f"more than {MAX_PNG_CHUNKS} chunks", MAX_PNG_CHUNKS)
        place += 12 + length


def _count_gif(data: bytes) -> None:
    flags = data[10]
    place, num_blocks = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0), 0
    while data[place] == 0x21:  # an extension: a label, and blocks until an empty one
        place += 2
        while data[place]:
            place += 1 + data[place]
            num_blocks += 1
            if num_blocks > MAX_GIF_BLOCKS:
                _refuse(f"more than {MAX_GIF_BLOCKS} blocks before its pixels", MAX_GIF_BLOCKS)
        place += 1
        num_blocks += 1


def _count_ico(data: bytes, max_pixels: int) -> None:
    (num_pictures,) = struct.unpack_from("<H", data, 4)
    if num_pictures > MAX_ICO_PICTURES:
        _refuse(f"{num_pictures} pictures in it", MAX_ICO_PICTURES)
    for index in range(num_pictures):
        (place,) = struct.unpack_from("<I", data, 6 + 16 * index + 12)
        if data.startswith(PNG_MAGIC, place):
            width, height = struct.unpack_from(">II", data, place + 16)
            _count_png(data[place:])
        else:
            (header_size,) = struct.unpack_from("<I", data, place)
            sizes = struct.unpack_from("<HH" if header_size == 12 else "<ii", data, place + 4)
            # The mask stands below the picture and counts as its height.
            width, height = abs(sizes[0]), abs(sizes[1]) // 2
        refuse_pixels(width, height, max_pixels)


def _count_tiff(data: bytes) -> None:
    """Count what the first directory of a TIFF, or of EXIF, says that it holds."""
    total, allowed = 0, MAX_TIFF_COPIES * len(data)
    for tag, kind, number, _, _ in first_directory(data):
        # Pillow reads no more than there is.
        total += min(number * TIFF_SIZES.get(kind, 1), len(data))
        if total > allowed:
            _refuse(f"tags of more than {total} bytes", allowed)
        if tag in TIFF_STRIP_TAGS and number > MAX_TIFF_STRIPS:
            _refuse(f"{number} strips or tiles", MAX_TIFF_STRIPS)
