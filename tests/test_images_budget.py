import io
import struct

import numpy as np
import pytest
from costly_pictures import (
    chunk,
    encoded,
    ico_of,
    jpeg_with,
    png_of_zeros,
    progressive_jpeg,
    segment,
    tags,
)
from facts import raises_naming
from PIL import Image

from efficientnet.images.budget import (
    MAX_GIF_BLOCKS,
    MAX_ICO_PICTURES,
    MAX_JPEG_FILL_BYTES,
    MAX_JPEG_SCANS,
    MAX_JPEG_SEGMENTS,
    MAX_PNG_CHUNKS,
    MAX_TIFF_STRIPS,
    ImageError,
    ImageTooLargeError,
    require_affordable,
)
from efficientnet.images.decoding import decode_image, read_jpeg_header

GIF_HEAD = encoded("GIF")[: 13 + 3 * 2 ** ((encoded("GIF")[10] & 7) + 1)]
GIF_REST = encoded("GIF")[len(GIF_HEAD) :]
PNG = encoded("PNG")
PNG_HEAD, PNG_REST = PNG[:33], PNG[33:]
COMMENT = b"\x21\xfe" + b"\1x" * 50 + b"\0"
STRIPS = b"II*\0" + struct.pack("<IHHHII", 8, 1, 273, 4, MAX_TIFF_STRIPS + 1, 8) + bytes(4)

# Each is counted and refused; without the count each takes from seconds to minutes, or gigabytes.
COSTLY = {
    "scans": (progressive_jpeg(7000, 45_000), "100 scans"),
    "scans of a small picture": (progressive_jpeg(64, MAX_JPEG_SCANS + 1), "100 scans"),
    "tables between scans": (
        progressive_jpeg(64, 51, segment(0xFE, b"\xff\xda") * 21),
        "1001 segments between",
    ),
    "empty segments": (jpeg_with(segment(0xE0, b"") * 1_000_000), "1001 segments before"),
    "fill bytes": (jpeg_with(b"\xff" * 19_000_000), "fill bytes"),
    "junk between segments": (jpeg_with(segment(0xE5, b"") + b"\0" * 19_000_000), "fill bytes"),
    "exif that shares its bytes": (
        jpeg_with(segment(0xE1, b"Exif\0\0" + tags(2000, 30_000))),
        "tags of more than",
    ),
    "chunks": (PNG_HEAD + chunk(b"teXt") * 1_000_000 + PNG_REST, "20000 chunks"),
    "blocks of a comment": (
        GIF_HEAD + b"\x21\xfe" + b"\1x" * 9_000_000 + b"\0" + GIF_REST,
        "10000 blocks",
    ),
    "a large picture in an icon": (
        ico_of(png_of_zeros(17_000, 10_000)),
        "17000 x 10000 .* 50 megapixels",
    ),
    "chunks in an icon": (
        ico_of(PNG_HEAD + chunk(b"teXt") * 100_000 + PNG_REST),
        "20000 chunks",
    ),
    "many pictures in an icon": (ico_of(PNG, 60_000), "60000 pictures"),
    "tags that share their bytes": (tags(5000, 1_000_000), "tags of more than"),
    "strips": (STRIPS + bytes(2_000_000), "250001 strips"),
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_picture_that_would_take_minutes_is_refused_before_it_is_decoded(name: str):
    data, reason = COSTLY[name]
    with pytest.raises(ImageTooLargeError, match=reason):
        require_affordable(data)
    with pytest.raises(ImageTooLargeError, match=reason):
        decode_image(data)
    if data.startswith(b"\xff\xd8"):
        with pytest.raises(ImageTooLargeError, match=reason):
            read_jpeg_header(data)


# As many parts as are allowed, and what looks like more and is none.
AFFORDABLE = {
    "scans": progressive_jpeg(64, MAX_JPEG_SCANS),
    "scans in a profile": jpeg_with(segment(0xE2, b"\xff\xda" * 30_000)),
    "scans behind the end": encoded("JPEG") + b"\xff\xda" * 1000,
    "segments": jpeg_with(segment(0xE5, b"") * (MAX_JPEG_SEGMENTS - 20)),
    "fill bytes": jpeg_with(b"\xff" * MAX_JPEG_FILL_BYTES),
    "exif": jpeg_with(segment(0xE1, b"Exif\0\0" + tags(3, 30_000))),
    "exif that ends early": jpeg_with(segment(0xE1, b"Exif\0\0" + tags(100, 10)[:300])),
    "chunks": PNG_HEAD + chunk(b"teXt") * (MAX_PNG_CHUNKS - 10) + PNG_REST,
    "blocks": GIF_HEAD + COMMENT * (MAX_GIF_BLOCKS // 51) + GIF_REST,
    "icon": ico_of(PNG, MAX_ICO_PICTURES),
    **{kind: encoded(kind) for kind in ("JPEG", "PNG", "GIF", "ICO", "TIFF", "BMP", "WEBP")},
}


# Pillow says what it finds odd in EXIF.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", AFFORDABLE)
def test_a_picture_of_as_many_parts_as_are_allowed_is_decoded(name: str):
    require_affordable(AFFORDABLE[name])
    assert decode_image(AFFORDABLE[name]).width in (32, 64)


def test_an_icon_of_the_old_kind_counts_without_its_mask():
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "ICO", bitmap_format="bmp")
    require_affordable(buffer.getvalue(), max_pixels=32 * 32)
    with raises_naming(ImageTooLargeError, "32 x 32"):
        require_affordable(buffer.getvalue(), max_pixels=32 * 32 - 1)


@pytest.mark.parametrize("name", AFFORDABLE)
def test_a_file_that_ends_anywhere_is_counted_without_a_fault(name: str):
    data = AFFORDABLE[name]
    for num_bytes in {*range(min(200, len(data))), len(data) // 2}:
        require_affordable(data[:num_bytes])


@pytest.mark.parametrize("pixels", [180_000_000, 400_000_000])
def test_the_limit_that_is_told_is_ours_and_not_pillows(pixels: int):
    with raises_naming(ImageTooLargeError, "50 megapixels"):
        decode_image(png_of_zeros(20_000, pixels // 20_000))


def tiff_of(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF")
    return buffer.getvalue()


def test_floats_of_0_to_1_are_scaled():
    values = np.linspace(0, 1, 1200, dtype=np.float32).reshape(30, 40)
    found = np.asarray(decode_image(tiff_of(values)))[:, :, 0]
    np.testing.assert_array_equal(found, np.round(values * 255))


@pytest.mark.parametrize("extreme", [-0.5, 255.0, np.nan, np.inf])
def test_floats_of_another_range_are_refused(extreme: float):
    values = np.zeros((30, 40), dtype=np.float32)
    values[3, 4] = extreme
    with raises_naming(ImageError, "floats", "0 (black)", "1 (white)"):
        decode_image(tiff_of(values))


def test_integers_of_32_bits_are_refused():
    values = np.arange(1200, dtype=np.int32).reshape(30, 40)
    with raises_naming(ImageError, "32 bits"):
        decode_image(tiff_of(values))


@pytest.mark.parametrize("brand", [b"heic", b"mif1"])
def test_a_heic_picture_is_named_with_what_to_do(brand: bytes):
    data = struct.pack(">I", 24) + b"ftyp" + brand + bytes(4) + b"mif1heic" + bytes(100)
    with raises_naming(ImageError, "HEIC", "JPEG"):
        decode_image(data)
