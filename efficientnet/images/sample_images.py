"""Images that come with scikit-learn, as encoded bytes: handwritten digits and sample photographs.

The digits are UCI's "Optical Recognition of Handwritten Digits", 1,797 of 8 x 8 pixels; the
photographs are two, of a temple and of a flower, 640 x 427 pixels.
"""

import gzip
import importlib.util
import io
import random
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NUM_CROPS = 128
MIN_CROP_SIZE = 160
CROP_SEED = 0
# Of the crops that ranges are chosen by: others than those that programs are checked on.
CALIBRATION_SEED = 1


def digit_images() -> tuple[tuple[str, ...], list[tuple[str, int, bytes]]]:
    """Return the class names, and of each digit its name, label and PNG."""
    with gzip.open(_file("data/digits.csv.gz"), "rt") as file:
        rows = np.loadtxt(file, delimiter=",")
    images: list[tuple[str, int, bytes]] = []
    for index, (*pixels, label) in enumerate(rows):
        # Values are 0..16; 255 / 16 maps them on the full range.
        scaled = np.round(np.reshape(pixels, (8, 8)) * (255 / 16))
        image = Image.fromarray(scaled.astype(np.uint8))
        images.append((f"digits/{index:04d}.png", int(label), _encode(image, "PNG")))
    return tuple("0123456789"), images


def sample_photos() -> list[NDArray[np.uint8]]:
    """Return the photographs, uint8 [H, W, 3]."""
    return [np.asarray(Image.open(_file(f"images/{name}.jpg"))) for name in ("china", "flower")]


def photo_crops(count: int = NUM_CROPS, seed: int = CROP_SEED) -> list[tuple[str, bytes]]:
    """Return name and JPEG of crops of the photographs, of random place, size and shape."""
    # Pixels alone: what else is in the files would be saved with each crop.
    photos = [Image.fromarray(pixels) for pixels in sample_photos()]
    draw = random.Random(seed)
    crops: list[tuple[str, bytes]] = []
    for index in range(count):
        photo = photos[index % len(photos)]
        width = draw.randint(MIN_CROP_SIZE, photo.width)
        height = draw.randint(MIN_CROP_SIZE, photo.height)
        left, top = draw.randint(0, photo.width - width), draw.randint(0, photo.height - height)
        crop = photo.crop((left, top, left + width, top + height))
        crops.append((f"sample-photos/{seed}-{index:03d}.jpg", _encode(crop, "JPEG", quality=95)))
    return crops


def _file(name: str) -> Path:
    """Find a file of scikit-learn's, which is not imported: with scipy that takes over a second."""
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(
            "digits and sample-photos come with scikit-learn, which is not installed: "
            "pip install scikit-learn",
            name="sklearn",
        )
    return Path(package.origin).parent / "datasets" / name


def _encode(image: Image.Image, file_format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()
