"""Small files that would take a decoder minutes, for tests of what is counted beforehand."""

import io
import struct
import zlib

from PIL import Image

CHUNK = struct.Struct(">I4s")


def progressive_jpeg(side: int, num_scans: int, between: bytes = b"") -> bytes:
    """Write a gray progressive JPEG, one DC scan of zeros and then scans without any data.

    Args:
        side: height and width, pixels.
        num_scans: all scans.
        between: what stands before each scan but the first.
    """
    size = struct.pack(">HH", side, side)
    num_blocks = ((side + 7) // 8) ** 2
    one_code = bytes([1, *[0] * 15])
    head = segment(0xDB, b"\0" + b"\1" * 64)
    head += segment(0xC2, b"\x08" + size + b"\1\1\x11\0")
    head += segment(0xC4, b"\0" + one_code + b"\0") + segment(0xC4, b"\x10" + one_code + b"\xe0")
    zeros = bytes((num_blocks + 7) // 8)
    first = segment(0xDA, b"\1\1\0\0\0\0") + zeros
    more = between + segment(0xDA, b"\1\1\0\1\x3f\0")
    return b"\xff\xd8" + head + first + more * (num_scans - 1) + b"\xff\xd9"


def segment(marker: int, content: bytes) -> bytes:
    """Write a marker of a JPEG with its length."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def jpeg_with(inserted: bytes) -> bytes:
    """Write a JPEG with something behind its first marker."""
    return b"\xff\xd8" + inserted + encoded("JPEG")[2:]


def encoded(file_format: str) -> bytes:
    """Encode a small picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (10, 120, 240)).save(buffer, file_format)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    """Write a chunk of a PNG."""
    check = struct.pack(">I", zlib.crc32(kind + content))
    return CHUNK.pack(len(content), kind) + content + check


def png_of_zeros(width: int, height: int) -> bytes:
    """Write a PNG of black pixels, one bit each."""
    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND")
    return b"\x89PNG\r\n\x1a\n" + chunks


def ico_of(picture: bytes, num_pictures: int = 1) -> bytes:
    """Write an icon whose entries all are one picture, and say that it has 32 x 32 pixels."""
    place = 6 + 16 * num_pictures
    entry = struct.pack("<BBBBHHII", 32, 32, 0, 0, 1, 32, len(picture), place)
    return struct.pack("<HHH", 0, 1, num_pictures) + entry * num_pictures + picture


def tags(num_tags: int, num_bytes: int) -> bytes:
    """Write a directory of TIFF whose tags all share the same bytes."""
    directory = b"".join(
        struct.pack("<HHII", 40000 + index, 7, num_bytes, 8) for index in range(num_tags)
    )
    return b"II*\0" + struct.pack("<IH", 8, num_tags) + directory + bytes(4) + bytes(num_bytes)
