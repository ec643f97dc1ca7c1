"""Image bytes -> upright 8-bit RGB pixels: any kind by Pillow, reduced JPEG by OpenCV."""

import io
import re
import struct
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, ExifTags, Image

from efficientnet.images.budget import (
    MAX_PIXELS,
    ImageError,
    ImageTooLargeError,
    first_directory,
    refuse_pixels,
    require_affordable,
)

# Pillow knows more kinds, of which some start other programs (EPS) or hold many pages (PDF).
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "ICO")

# The kinds of HEIF with HEVC in them, and those that do not say what is in them.
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

# libjpeg-turbo has SIMD code for these reductions; 5/8 or 7/8 take longer than the whole picture.
REDUCTIONS = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_8,
}

JPEG_END = b"\xff\xd9"

# EXIF orientation -> the axes to flip, after height and width are exchanged for 5 to 8.
FLIPPED_AXES = {2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (1,), 7: (0, 1), 8: (0,)}

TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Type of a TIFF value -> how struct names it; EXIF wants a SHORT, writers take other integers, too.
INTEGER_TYPES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}

# Images are decoded by several threads or processes at once; those of OpenCV and of AVIF's decoder
# would only compete with them.
cv2.setNumThreads(1)
AvifImagePlugin.DEFAULT_MAX_THREADS = 1


@dataclass(frozen=True)
class JpegHeader:
    """What is known of a JPEG before its pixels are decoded."""

    width: int
    """Of the upright picture, as is the height."""
    height: int
    orientation: int
    """EXIF's, 1 to 8; 1 is upright."""


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture of any mode into an upright 8-bit RGB one.

    The EXIF orientation is applied, 16-bit values and floats of 0 to 1 are scaled to 8 bits (Pillow
    would clip them), and transparent pixels are laid over white.

    Raises:
        ImageTooLargeError: more than `max_pixels`, or what budget.py counts, found before anything
            is decoded.
        ImageError: no image, truncated, or of values that no range is defined for.
    """
    with _told_as_image_errors(data, max_pixels):
        image = _open(data, max_pixels)
        image.load()
        orientation, rgb = _orientation(image), _to_rgb(image)
        return rgb if orientation == 1 else rgb.transpose(TRANSPOSITIONS[orientation])


def read_jpeg_header(data: bytes, max_pixels: int = MAX_PIXELS) -> JpegHeader | None:
    """Tell what decode_jpeg would decode; None: no JPEG that it can, but decode_image may.

    That is every other format, CMYK, and a file that does not end as a JPEG does: OpenCV would make
    gray areas of what is cut off, where Pillow refuses.

    Raises:
        ImageTooLargeError, ImageError: see decode_image.
    """
    with _told_as_image_errors(data, max_pixels):
        image = _open(data, max_pixels)
        # MPO is a JPEG that more pictures follow, as phones write it.
        is_plain = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
        if not is_plain or not data.endswith(JPEG_END):
            return None
        orientation = _orientation(image)
    width, height = image.size if orientation < 5 else image.size[::-1]
    return JpegHeader(width, height, orientation)


def largest_reduction(spare: float) -> int:
    """Return the largest reduction of decode_jpeg that leaves a pixel for each that is needed.

    Args:
        spare: pixels there are per pixel needed, along the side with fewer; below 1 none is left.
    """
    return max(factor for factor in REDUCTIONS if factor <= max(spare, 1))


def decode_jpeg(data: bytes, header: JpegHeader, reduction: int) -> NDArray[np.uint8]:
    """Decode a JPEG to upright uint8 RGB [ceil(H / reduction), ceil(W / reduction), 3].

    A reduction of 1, 2, 4 or 8 is part of the inverse cosine transform, which it makes cheaper.

    Raises:
        ImageError: damaged.
    """
    flags = REDUCTIONS[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError from None
        raise ImageError(f"the image is damaged or truncated: {error.err}") from None
    # OpenCV tells damage so, whatever its type annotations say.
    if pixels is None:  # pyright: ignore[reportUnnecessaryComparison]
        raise ImageError("the image is damaged or truncated: no JPEG decoder takes it")
    if header.orientation > 1:
        if header.orientation >= 5:
            pixels = pixels.transpose(1, 0, 2)
        pixels = np.ascontiguousarray(np.flip(pixels, FLIPPED_AXES[header.orientation]))
    return pixels.astype(np.uint8, copy=False)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise ImageError("the image is empty (0 bytes)")
    require_affordable(data, max_pixels)
    image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    refuse_pixels(image.width, image.height, max_pixels)
    return image


def _orientation(image: Image.Image) -> int:
    """Find how a picture is to be turned, 1 to 8; 1 where nothing readable says it.

    Pillow's ImageOps.exif_transpose writes all of EXIF anew, which fails on a tag of another type
    than it knows, and its reader copies the values of all tags, however large each says it is.
    """
    # Pillow turns these while they are loaded.
    if image.format == "TIFF":
        return 1
    exif = image.info.get("exif", b"")
    if not exif and "Raw profile type exif" in image.info:  # ImageMagick's, in PNG
        exif = bytes.fromhex("".join(image.info["Raw profile type exif"].split("\n")[3:]))
    orientation = _orientation_of_exif(exif)
    if orientation is None:
        xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
        xmp = xmp.encode() if isinstance(xmp, str) else xmp
        found = re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp)
        orientation = int(found[1]) if found else 1
    return orientation if orientation in TRANSPOSITIONS else 1


def _orientation_of_exif(exif: bytes) -> int | None:
    exif = re.sub(rb"^(Exif\0\0)+", b"", exif)
    try:
        for tag, kind, _, order, place in first_directory(exif):
            if tag == ExifTags.Base.Orientation and kind in INTEGER_TYPES:
                return struct.unpack_from(order + INTEGER_TYPES[kind], exif, place)[0]
    except struct.error:  # it ends early
        return None
    return None


@contextmanager
def _told_as_image_errors(data: bytes, max_pixels: int) -> Generator[None]:
    try:
        yield
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        if data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS:
            raise ImageError(
                "this is a HEIC picture, which is not read; save it as JPEG (an iPhone takes JPEG "
                "with Settings > Camera > Formats > Most Compatible)"
            ) from None
        raise ImageError(
            f"these {len(data)} bytes are not an image of a known kind; "
            f"known: {', '.join(IMAGE_FORMATS)}"
        ) from None
    # Pillow's own, far larger limit: an error, or a warning where warnings are errors.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        found = re.search(r"\d+", str(error))
        raise ImageTooLargeError(
            f"the image has {found[0] if found else 'too many'} pixels, "
            f"more than the {max_pixels / 1e6:g} megapixels allowed"
        ) from None
    except MemoryError:
        raise
    # Decoders raise classes of all kinds: libavif's RuntimeError, struct.error, KeyError.
    except Exception as error:
        raise ImageError(f"the image is damaged or truncated: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        return _from_floats(np.asarray(image))
    # What range 32 bits have, no TIFF says: programs store 8, 12 or 16 bits in them, too.
    if image.mode == "I" and image.format == "TIFF":
        raise ImageError(
            "the image has integers of 32 bits or with a sign, whose black and white are not "
            "defined; save it with 8 or 16 bits without a sign"
        )
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow opens 16-bit gray files in these modes, depending on the format.
        wide = np.asarray(image).clip(0, 65535)
        return Image.fromarray((wide // 257).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    # To convert RGB to RGB is to copy it.
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_floats(values: NDArray[np.float32]) -> Image.Image:
    """Make RGB of one channel [H, W] of 0 (black) to 1 (white)."""
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise ImageError(
            f"the image has floats of {low:g} to {high:g}, expected 0 (black) to 1 (white); "
            "scale them, or save it with 8 or 16 bits"
        )
    return Image.fromarray((values * 255).round().astype(np.uint8)).convert("RGB")
