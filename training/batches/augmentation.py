"""Encoded image -> cropped and augmented pixels of a stage.

What happens to an image follows from its seed alone, not from the number of workers or from where
a run was resumed.
"""

import math
import random

import cv2
import numpy as np
from PIL import Image
from timm.data.auto_augment import AutoAugment, auto_augment_policy

from efficientnet.images.decoding import (
    decode_image,
    decode_jpeg,
    largest_reduction,
    read_jpeg_header,
)
from efficientnet.images.preprocess import MAX_SMOOTHED_SCALE, smoothing_sigma
from training.batches.image_operations import GRAY, Pixels, as_pixels, cut_out
from training.batches.randaugment import MIN_POSTERIZE_MAGNITUDE, RandAugment
from training.recipe.config import TrainConfig
from training.recipe.stages import Stage

ASPECT_RATIOS = (3 / 4, 4 / 3)

MAX_CROP_TRIES = 10


class Augmentation:
    """Random crop to the stage's size, mirror, RandAugment or AutoAugment, Cutout.

    RandAugment is left out where it runs on the device; Cutout then comes before it.
    """

    def __init__(self, config: TrainConfig, stage: Stage) -> None:
        self._size = stage.image_size
        self._min_crop_area = config.min_crop_area
        self._interpolation = config.interpolation
        self._flips = config.horizontal_flip
        self._cutout_radius = round(config.cutout * stage.image_size / 2)
        self._auto_augment = self._rand_augment = None
        if config.autoaugment:
            # The policy of EfficientNet's own TPU code.
            policy = auto_augment_policy("v0", {"img_mean": (GRAY,) * 3})
            for augment in (augment for pair in policy for augment in pair):
                if augment.name == "Posterize":
                    # Below, no bit would be left, which Pillow 13 refuses.
                    augment.magnitude = max(augment.magnitude, math.ceil(MIN_POSTERIZE_MAGNITUDE))
            self._auto_augment = AutoAugment(policy)
        elif stage.randaugment_magnitude and config.augment_on == "cpu":
            self._rand_augment = RandAugment(
                stage.randaugment_magnitude, config.num_randaugment_layers
            )

    def __call__(self, data: bytes, seed: int) -> Pixels:
        """Decode and augment an image file; returns uint8 RGB [size, size, 3]."""
        rng = random.Random(seed)
        pixels = resize(self._decode_crop(data, rng), self._size, self._interpolation)
        if self._flips and rng.random() < 0.5:
            pixels = as_pixels(cv2.flip(pixels, 1))
        if self._rand_augment:
            pixels = self._rand_augment(pixels, seed)
        if self._auto_augment:
            # timm draws from the global generator.
            random.seed(seed)
            pixels = np.array(self._auto_augment(Image.fromarray(pixels)))
        if self._cutout_radius:
            pixels = cut_out(pixels, self._cutout_radius, rng.random(), rng.random())
        return pixels

    def _decode_crop(self, data: bytes, rng: random.Random) -> Pixels:
        # The crop is drawn before anything is decoded: where it has pixels to spare, libjpeg-turbo
        # decodes 1/2, 1/4 or 1/8 of the size, and the crop's edges are rounded to those pixels.
        header = read_jpeg_header(data)
        if header is None:
            pixels = np.asarray(decode_image(data))
            width, height = pixels.shape[1], pixels.shape[0]
            left, top, right, bottom = draw_crop(width, height, self._min_crop_area, rng)
            return pixels[top:bottom, left:right]
        box = draw_crop(header.width, header.height, self._min_crop_area, rng)
        spare = min(box[2] - box[0], box[3] - box[1]) / self._size
        reduction = largest_reduction(spare)
        left, top, right, bottom = (round(edge / reduction) for edge in box)
        return decode_jpeg(data, header, reduction)[top:bottom, left:right]


def draw_crop(
    width: int, height: int, min_area: float, rng: random.Random
) -> tuple[int, int, int, int]:
    """Draw left, top, right and bottom as torchvision's RandomResizedCrop, which timm's follows.

    The area is uniform between `min_area`, a fraction, and the whole image, the logarithm of the
    aspect ratio between those of 3/4 and 4/3. When ten tries do not fit into the image, the largest
    centred crop of an allowed ratio is taken.
    """
    narrowest, widest = ASPECT_RATIOS
    for _ in range(MAX_CROP_TRIES):
        area = width * height * rng.uniform(min_area, 1)
        ratio = math.exp(rng.uniform(math.log(narrowest), math.log(widest)))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = rng.randint(0, width - crop_width)
            top = rng.randint(0, height - crop_height)
            return left, top, left + crop_width, top + crop_height
    crop_width = min(width, max(round(height * widest), 1))
    crop_height = min(height, max(round(width / narrowest), 1))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def resize(pixels: Pixels, size: int, interpolation: str) -> Pixels:
    """Bring an image to [size, size, 3].

    What shrinks is smoothed before, up to half the size by three pixels as PreprocessSpec's `fast`
    does: from 320 to 200 pixels the mean difference from Pillow's bilinear is 0.7 counts in a third
    of its time; without it is 2.5, by averaging areas 1.3 in twice the time.
    """
    scales = pixels.shape[1] / size, pixels.shape[0] / size
    if max(scales) > MAX_SMOOTHED_SCALE:
        return as_pixels(cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA))
    x_sigma, y_sigma = (smoothing_sigma(scale, interpolation) for scale in scales)
    if x_sigma or y_sigma:
        taps = (3 if x_sigma else 1, 3 if y_sigma else 1)
        pixels = as_pixels(cv2.GaussianBlur(pixels, taps, x_sigma, sigmaY=y_sigma))
    is_bicubic = interpolation == "bicubic" and max(scales) <= 1
    method = cv2.INTER_CUBIC if is_bicubic else cv2.INTER_LINEAR
    return as_pixels(cv2.resize(pixels, (size, size), interpolation=method))
