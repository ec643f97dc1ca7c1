"""Images that come with scikit-learn, as encoded bytes: handwritten digits and sample photographs.

The digits are UCI's "Optical Recognition of Handwritten Digits", 1,797 of 8 x 8 pixels; the
photographs are two, of a temple and of a flower, 640 x 427 pixels.
"""

import io
import random
from typing import Any

import numpy as np
from PIL import Image

# scikit-learn is a training dependency; the service imports this module without it, hence the
# imports inside the functions.

NUM_CROPS = 128
MIN_CROP_SIZE = 160
CROP_SEED = 0
# Of the crops that ranges are chosen by: others than those that programs are checked on.
CALIBRATION_SEED = 1


def digit_images() -> tuple[tuple[str, ...], list[tuple[str, int, bytes]]]:
    """Return the class names, and of each digit its name, label and PNG."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images: list[tuple[str, int, bytes]] = []
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        # Values are 0..16; 255 / 16 maps them on the full range.
        image = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
        images.append((f"digits/{index:04d}.png", int(label), _encode(image, "PNG")))
    return tuple(str(name) for name in digits.target_names), images


def photo_crops(count: int = NUM_CROPS, seed: int = CROP_SEED) -> list[tuple[str, bytes]]:
    """Return name and JPEG of crops of the photographs, of random place, size and shape."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]  # pyright: ignore[reportAttributeAccessIssue]
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


def _encode(image: Image.Image, file_format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()
