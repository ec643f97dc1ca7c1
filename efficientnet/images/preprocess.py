"""Image bytes -> float32 [3, H, W]: the one path of evaluation, parity, benchmarks and service."""

import math
from collections.abc import Callable
from functools import lru_cache

import cv2
import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from efficientnet.images.decoding import (
    MAX_PIXELS,
    ImageError,
    ImageTooLargeError,
    decode_image,
    decode_jpeg,
    largest_reduction,
    read_jpeg_header,
)
from efficientnet.images.preprocess_spec import PreprocessSpec

__all__ = [
    "GOOGLE_MEAN",
    "GOOGLE_STD",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "INCEPTION_MEAN",
    "INCEPTION_STD",
    "MAX_PIXELS",
    "MAX_SMOOTHED_SCALE",
    "ImageError",
    "ImageTooLargeError",
    "PreprocessSpec",
    "decode_and_resize",
    "decode_image",
    "normalize",
    "normalize_pixels",
    "preprocess",
    "resize_and_crop",
    "smoothing_sigma",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

INCEPTION_MEAN = (0.5, 0.5, 0.5)
INCEPTION_STD = (0.5, 0.5, 0.5)

# (value - 128) / 128 for values 0..255, as Google's EfficientNetV2 code scales them.
GOOGLE_MEAN = (128 / 255, 128 / 255, 128 / 255)
GOOGLE_STD = (128 / 255, 128 / 255, 128 / 255)

PILLOW_MAJOR = int(PIL.__version__.partition(".")[0])

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

# Half-widths of Pillow's filters, in pixels of the coarser of input and output.
FILTER_RADIUS = {"bilinear": 1, "bicubic": 2}

# Input pixels per output pixel that three-pixel smoothing is good for.
MAX_SMOOTHED_SCALE = 2.0

# A smaller weight of the neighbors changes no value by more than a count or two.
MIN_SMOOTHING = 0.005

# Pixels around the crop that OpenCV's filters see.
WINDOW_MARGIN = 3

# Left, top, right and bottom in pixels, with fractions.
Box = tuple[float, float, float, float]


def resize_and_crop(image: Image.Image, spec: PreprocessSpec) -> Image.Image:
    """Bring an RGB image to image_size x image_size with Pillow's antialiased filters.

    Sizes are rounded as torchvision's Resize and CenterCrop round them, which timm uses too.
    """
    size, resample = spec.image_size, RESAMPLING[spec.interpolation]
    if spec.crop_fraction is None:
        return image.resize((size, size), resample)
    # Only what the crop shows is computed, in Pillow's own order of the two passes. The first one
    # takes no box: Pillow rounds it to float32, and what that changes may double in the second.
    width, height = image.size
    new_width, new_height = _resized_size(width, height, spec)
    x, y = _crop_offset(new_width, size), _crop_offset(new_height, size)
    left, top, right, bottom = _source_box(width, height, spec)
    if _is_vertical_first(image.size, (new_width, new_height)):
        first, last = _support(left, right, width, spec)
        columns = image.crop((first, 0, last, height)).resize((last - first, new_height), resample)
        columns = columns.crop((0, y, last - first, y + size))
        return columns.resize((size, size), resample, (left - first, 0, right - first, size))
    first, last = _support(top, bottom, height, spec)
    rows = image.crop((0, first, width, last)).resize((new_width, last - first), resample)
    rows = rows.crop((x, 0, x + size, last - first))
    return rows.resize((size, size), resample, (0, top - first, size, bottom - first))


def normalize(image: Image.Image, spec: PreprocessSpec) -> NDArray[np.float32]:
    """Turn an RGB image into float32 [3, H, W], (value / 255 - mean) / std."""
    return _normalize_pixels(np.asarray(image), spec)


def preprocess(
    data: bytes, spec: PreprocessSpec, on_decoded: Callable[[], None] = lambda: None
) -> NDArray[np.float32]:
    """Turn the bytes of an image file into float32 [3, image_size, image_size].

    Args:
        data: an image file.
        spec: what the network wants.
        on_decoded: called between decoding and the rest, by those who measure them.

    Raises:
        ImageError: see decode_image.
    """
    return normalize_pixels(*decode_and_resize(data, spec, on_decoded), spec)


def decode_and_resize(
    data: bytes, spec: PreprocessSpec, on_decoded: Callable[[], None] = lambda: None
) -> tuple[NDArray[np.uint8], bool]:
    """Do of preprocess all that reads what a stranger wrote; normalize_pixels does the rest.

    Returns:
        RGB pixels [image_size, image_size, 3], and whether they were made by the fast method.

    Raises:
        ImageError: see decode_image.
    """
    if spec.method == "fast":
        pixels = _fast_pixels(data, spec, on_decoded)
        if pixels is not None:
            return pixels, True
    image = decode_image(data)
    on_decoded()
    return np.asarray(resize_and_crop(image, spec)), False


def normalize_pixels(
    pixels: NDArray[np.uint8], is_fast: bool, spec: PreprocessSpec
) -> NDArray[np.float32]:
    """Turn what decode_and_resize returns into float32 [3, H, W]."""
    return _normalize_quickly(pixels, spec) if is_fast else _normalize_pixels(pixels, spec)


def _resized_size(width: int, height: int, spec: PreprocessSpec) -> tuple[int, int]:
    if spec.crop_fraction is None:
        return spec.image_size, spec.image_size
    short_side = math.floor(spec.image_size / spec.crop_fraction)
    if spec.is_squashed:
        return short_side, short_side
    if width <= height:
        return short_side, int(short_side * height / width)
    return int(short_side * width / height), short_side


def _crop_offset(resized: int, size: int) -> int:
    return round((resized - size) / 2.0)


def _source_box(width: int, height: int, spec: PreprocessSpec) -> Box:
    """Find the part of the image that is seen after resizing and cropping."""
    size = spec.image_size
    new_width, new_height = _resized_size(width, height, spec)
    left, top = _crop_offset(new_width, size), _crop_offset(new_height, size)
    # min: a rounded product may exceed the image by the last bit of a float.
    return (
        left * width / new_width,
        top * height / new_height,
        min((left + size) * width / new_width, width),
        min((top + size) * height / new_height, height),
    )


def _is_vertical_first(old: tuple[int, int], new: tuple[int, int]) -> bool:
    # https://github.com/python-pillow/Pillow/pull/9549: the 8-bit result between the passes is
    # another one then, which shows at sharp edges.
    return PILLOW_MAJOR >= 13 and old[1] - new[1] > max(0, 2 * (old[0] - new[0]))


def _support(start: float, stop: float, length: int, spec: PreprocessSpec) -> tuple[int, int]:
    """Widen a range of input pixels by what Pillow's filter sees around it."""
    radius = FILTER_RADIUS[spec.interpolation]
    margin = math.ceil(radius * max((stop - start) / spec.image_size, 1)) + 1
    return max(0, math.floor(start) - margin), min(length, math.ceil(stop) + margin)


def _fast_pixels(
    data: bytes, spec: PreprocessSpec, on_decoded: Callable[[], None]
) -> NDArray[np.uint8] | None:
    """Decode and resize a JPEG to uint8 [image_size, image_size, 3]; None: not a plain JPEG."""
    header = read_jpeg_header(data)
    if header is None:
        return None
    size = spec.image_size
    box = _source_box(header.width, header.height, spec)
    spare = min(box[2] - box[0], box[3] - box[1]) / size
    reduction = largest_reduction(spare)
    pixels = decode_jpeg(data, header, reduction)
    on_decoded()
    left, top, right, bottom = (edge / reduction for edge in box)
    x_scale, y_scale = (right - left) / size, (bottom - top) / size
    if max(x_scale, y_scale) > MAX_SMOOTHED_SCALE:
        # More than 16 times too large, or of extreme shape: three pixels would not smooth enough.
        image = Image.fromarray(pixels)
        box = (left, top, right, bottom)
        return np.asarray(image.resize((size, size), RESAMPLING[spec.interpolation], box))
    columns, x_skipped = _window(left, right, x_scale, pixels.shape[1])
    rows, y_skipped = _window(top, bottom, y_scale, pixels.shape[0])
    window = pixels[rows, columns]
    x_sigma, y_sigma = (smoothing_sigma(scale, spec.interpolation) for scale in (x_scale, y_scale))
    if x_sigma or y_sigma:
        taps = (3 if x_sigma else 1, 3 if y_sigma else 1)
        window = cv2.GaussianBlur(
            window, taps, x_sigma, sigmaY=y_sigma, borderType=cv2.BORDER_REPLICATE
        )
    # A picture that becomes smaller has no use for bicubic after that; one that is enlarged has.
    is_bicubic = spec.interpolation == "bicubic" and max(x_scale, y_scale) <= 1
    interpolation = cv2.INTER_CUBIC if is_bicubic else cv2.INTER_LINEAR
    resized = cv2.resize(
        window, None, fx=1 / x_scale, fy=1 / y_scale, interpolation=interpolation
    ).astype(np.uint8, copy=False)
    x, y = min(x_skipped, resized.shape[1] - size), min(y_skipped, resized.shape[0] - size)
    return resized[y : y + size, x : x + size]


def _window(start: float, stop: float, scale: float, length: int) -> tuple[slice, int]:
    """Find the input pixels to resize, and how many output pixels to skip then.

    OpenCV resizes whole pixels only. Of the whole pixels at or before `start`, the one is taken
    that lies nearest to a border of an output pixel: the picture is not shifted, and no more is
    resized than is needed.
    """
    most = math.floor(start)
    firsts = range(max(0, most - 12), max(0, most - WINDOW_MARGIN) + 1)
    first = min(firsts, key=lambda x: abs((start - x) / scale - round((start - x) / scale)))
    last = min(length, math.ceil(stop) + WINDOW_MARGIN)
    return slice(first, last), round((start - first) / scale)


def smoothing_sigma(scale: float, interpolation: str) -> float:
    """Make up for what OpenCV's filters, unlike Pillow's, do not widen with the scale.

    Args:
        scale: input pixels per output pixel, up to MAX_SMOOTHED_SCALE.
        interpolation: bilinear or bicubic.

    Returns:
        The width of a Gaussian of three pixels, 0 for none.
    """
    # The outer weights. Bilinear: the variance of a triangle of half-width `scale` less that of one
    # of half-width 1. Bicubic is sharper: fitted to Pillow's pixels of photos, scales 1.1 to 2.
    bilinear, bicubic = (scale**2 - 1) / 12, 0.1 * (scale - 1.1)
    side = bilinear if interpolation == "bilinear" else bicubic
    return math.sqrt(-0.5 / math.log(side / (1 - 2 * side))) if side > MIN_SMOOTHING else 0.0


def _normalize_quickly(pixels: NDArray[np.uint8], spec: PreprocessSpec) -> NDArray[np.float32]:
    # As value * a + b, which differs in the last bit of a float32.
    normalized = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
    for index, channel in enumerate(cv2.split(pixels)):
        scale = 1 / (255 * spec.std[index])
        np.multiply(channel, np.float32(scale), out=normalized[index])
        normalized[index] -= np.float32(spec.mean[index] / spec.std[index])
    return normalized


@lru_cache(maxsize=16)
def _tables(mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    # The same float32 steps as on whole images, so that the results are equal bit for bit.
    values = np.arange(256, dtype=np.float32) / np.float32(255)
    means, stds = np.asarray(mean, dtype=np.float32), np.asarray(std, dtype=np.float32)
    return (values - means[:, None]) / stds[:, None]  # [3, 256]


def _normalize_pixels(pixels: NDArray[np.uint8], spec: PreprocessSpec) -> NDArray[np.float32]:
    normalized = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
    tables = _tables(spec.mean, spec.std)
    for index, channel in enumerate(cv2.split(pixels)):
        cv2.LUT(channel, tables[index], dst=normalized[index])
    return normalized
