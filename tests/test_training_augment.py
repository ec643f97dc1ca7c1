import io
import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from efficientnet.images.preprocess import ImageError
from training.batches.augmentation import Augmentation, draw_crop, resize
from training.batches.mixing import mix
from training.batches.randaugment import (
    BY_NAME,
    OPERATIONS,
    BatchRandAugment,
    Draw,
    RandAugment,
    draw_operations,
)
from training.recipe.config import TrainConfig
from training.recipe.recipes import imagenet_recipe
from training.recipe.stages import Stage, plan_stages

SIZE = 224
GRAY = (128, 128, 128)

CASES = [(row.name, sign) for row in OPERATIONS for sign in ((1, -1) if row.is_signed else (1,))]

# Pillow truncates where OpenCV rounds, rounds between steps that are one here, and takes edges
# apart: pixels within a filter's reach of what is filled differ more.
EXACT = {"AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd"}
EXACT |= {"Brightness", "TranslateX", "TranslateY", "Cutout"}


def picture(size: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return shapes of many colors under some blur and noise, darker to the left."""
    rng = random.Random(seed)
    image = Image.new("RGB", (size, size), (60, 90, 130))
    draw = ImageDraw.Draw(image)
    for _ in range(25):
        x, y = rng.randrange(size), rng.randrange(size)
        box = (x, y, x + rng.randrange(4, size // 2), y + rng.randrange(4, size // 2))
        draw.ellipse(box, fill=(rng.randrange(250), rng.randrange(200), rng.randrange(12, 240)))
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1))).astype(np.float64)
    pixels *= np.linspace(0.6, 1, size)[None, :, None]
    pixels += np.random.default_rng(seed).normal(0, 3, pixels.shape)
    return pixels.clip(5, 245).astype(np.uint8)


def by_pillow(pixels: NDArray[np.uint8], operation: Draw, magnitude: float) -> Image.Image:
    image, size = Image.fromarray(pixels), len(pixels)
    name, sign, factor = operation.name, operation.sign, 0.1 + 0.18 * magnitude
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        return getattr(ImageEnhance, name)(image).enhance(factor)
    if name == "Rotate":
        return image.rotate(sign * 3 * magnitude, Image.Resampling.BILINEAR, fillcolor=GRAY)
    amount = sign * 0.03 * magnitude
    shift = sign * 10 * magnitude
    matrices = {
        "ShearX": (1, amount, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, amount, 1, 0),
        "TranslateX": (1, 0, shift, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, shift),
    }
    if name in matrices:
        method = Image.Transform.AFFINE
        bilinear = Image.Resampling.BILINEAR
        return image.transform(image.size, method, matrices[name], bilinear, fillcolor=GRAY)
    if name == "Cutout":
        x, y, radius = int(operation.x * size), int(operation.y * size), int(4 * magnitude)
        image.paste(GRAY, (x - radius, y - radius, x + radius, y + radius))
        return image
    if name == "Posterize":
        return ImageOps.posterize(image, int(0.4 * magnitude))
    if name == "Solarize":
        return ImageOps.solarize(image, int(25.6 * magnitude))
    if name == "SolarizeAdd":
        return image.point(
            [min(i + int(11 * magnitude), 255) if i < 128 else i for i in range(256)] * 3
        )
    return getattr(ImageOps, name.lower())(image)


@pytest.mark.parametrize("magnitude", [4, 8])
@pytest.mark.parametrize(("name", "sign"), CASES)
def test_an_operation_gives_pillows_pixels(name: str, sign: int, magnitude: float):
    pixels = picture(SIZE)
    before = pixels.copy()
    operation = Draw(name, sign, 0.4, 0.9)
    result = operation.on_host(pixels, magnitude)
    expected = np.asarray(by_pillow(pixels, operation, magnitude))
    distance = np.abs(result.astype(int) - expected.astype(int))
    np.testing.assert_array_equal(pixels, before)
    assert (result != pixels).any()
    if name in EXACT:
        assert distance.max() == 0
    elif BY_NAME[name].is_signed:
        assert distance.mean() < 1 and (distance > 3).mean() < 0.02
    else:
        assert distance.max() <= 3


@pytest.mark.parametrize(("name", "sign"), CASES)
@pytest.mark.parametrize("size", [32, SIZE])
def test_the_device_computes_what_the_workers_compute(name: str, sign: int, size: int):
    pixels = picture(size)
    operation = Draw(name, sign, 0.4, 0.9)
    for magnitude in (2.5, 9, 15, 30):
        expected = operation.on_host(pixels, magnitude)
        images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        centres = torch.tensor([[int(0.4 * size)], [int(0.9 * size)]])
        result = operation.on_device(images, magnitude, centres)
        distance = np.abs(result[0].permute(1, 2, 0).numpy().astype(int) - expected.astype(int))
        assert distance.mean() < 1, magnitude
        assert (distance > 3).mean() < 0.02, magnitude


def test_a_batch_on_the_device_chooses_as_the_workers_do():
    pixels = np.stack([picture(64, seed) for seed in range(40)])
    seeds = torch.tensor([2**62 + 7 * i for i in range(40)])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    result = BatchRandAugment(6, 2)(images, seeds)
    assert result.dtype == torch.uint8 and result.shape == images.shape
    assert result.is_contiguous(memory_format=torch.channels_last)
    augment = RandAugment(6, 2)
    for image, seed, own in zip(pixels, seeds.tolist(), result, strict=True):
        expected = augment(image, seed)
        distance = np.abs(own.permute(1, 2, 0).numpy().astype(int) - expected.astype(int))
        # Equalize after a rounding that differs moves whole levels.
        assert distance.mean() < 2


def test_an_image_on_the_device_does_not_depend_on_its_batch():
    images = torch.stack([torch.from_numpy(picture(48, i)).permute(2, 0, 1) for i in range(24)])
    seeds = [random.Random(i).getrandbits(63) for i in range(24)]
    augment = BatchRandAugment(9, 3)
    whole = augment(images, seeds)
    parts = torch.cat([augment(images[:1], seeds[:1]), augment(images[1:], seeds[1:])])
    assert torch.equal(whole, parts)
    assert torch.equal(augment(images.flip(0), seeds[::-1]).flip(0), whole)
    assert torch.equal(BatchRandAugment(9, 0)(images, seeds), images)


def test_every_operation_is_drawn_as_often_and_each_sign_too():
    drawn = [operation for seed in range(8000) for operation in draw_operations(seed, 2)]
    counts = Counter(operation.name for operation in drawn)
    assert set(counts) == set(BY_NAME) and len(BY_NAME) == len(OPERATIONS)
    assert min(counts.values()) > 880 and max(counts.values()) < 1120
    signs = [operation.sign for operation in drawn if BY_NAME[operation.name].is_signed]
    assert abs(np.mean(signs)) < 0.06
    assert {o.sign for o in drawn if not BY_NAME[o.name].is_signed} == {1}
    assert draw_operations(5, 2) == draw_operations(5, 2) != draw_operations(6, 2)


@pytest.mark.parametrize(
    ("name", "magnitude", "size", "amount"),
    [
        ("Rotate", 10, 300, 30),
        ("ShearX", 10, 300, 0.3),
        ("Color", 10, 300, 1.9),
        ("Posterize", 10, 300, 4),
        ("Posterize", 2.4, 300, 1),
        ("Posterize", 25, 380, 8),
        ("Solarize", 10, 300, 256),
        ("SolarizeAdd", 10, 300, 110),
        ("TranslateY", 10, 300, 100),
        ("TranslateY", 10, 56, 25),
        ("Cutout", 10, 300, 40),
        ("Cutout", 10, 56, 10),
    ],
)
def test_magnitudes_mean_what_they_mean_in_googles_code(
    name: str, magnitude: float, size: int, amount: float
):
    assert BY_NAME[name].amounts(magnitude, size, 1) == pytest.approx((amount,))


def test_images_of_one_color_stay_what_they_are_where_there_is_nothing_to_stretch():
    flat = np.full((32, 32, 3), 77, np.uint8)
    for name in ("AutoContrast", "Equalize"):
        np.testing.assert_array_equal(Draw(name, 1, 0, 0).on_host(flat, 10), flat)


def stage_of(size: int, magnitude: float = 0.0) -> Stage:
    return Stage(0, size, magnitude, 0.0, 0.0, 0.0)


def plain_config(**changes: object) -> TrainConfig:
    return replace(
        imagenet_recipe("v2-s"), **{"min_crop_area": 1.0, "horizontal_flip": False, **changes}
    )  # pyright: ignore[reportArgumentType]


def encoded(pixels: NDArray[np.uint8], kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("variant", ["v2-s", "v2-l", "b0"])
def test_every_stage_of_the_papers_augmentation_works_on_real_colors(variant: str):
    data = encoded(picture(150)[:110], "JPEG")
    config = imagenet_recipe(variant)
    for stage in plan_stages(config.progressive):
        augmentation = Augmentation(config, stage)
        for seed in range(30):
            image = augmentation(data, seed)
            assert image.shape == (stage.image_size, stage.image_size, 3)
            assert image.dtype == np.uint8 and image.flags.c_contiguous


@pytest.mark.parametrize("variant", ["v2-s", "b0"])
def test_augmentation_depends_on_the_seed_alone(variant: str):
    config = imagenet_recipe(variant)
    augmentation = Augmentation(config, plan_stages(config.progressive)[-1])
    data = encoded(picture(90), "JPEG")
    random.seed(1)
    first = augmentation(data, 7)
    random.seed(2)
    np.testing.assert_array_equal(first, augmentation(data, 7))
    assert (first != augmentation(data, 8)).any()


def test_magnitude_zero_only_crops():
    gray = np.full((64, 64, 3), 90, np.uint8)
    assert np.unique(Augmentation(plain_config(), stage_of(32))(encoded(gray), 3)).tolist() == [90]


@pytest.mark.parametrize("size", [40, 96, 300])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_crop_of_the_whole_image_looks_as_pillow_resizes_it(
    size: int, interpolation: str, kind: str
):
    pixels = picture(256)
    config = plain_config(interpolation=interpolation)
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    result = Augmentation(config, stage_of(size))(encoded(pixels, kind, **options), 0)
    resample = Image.Resampling[interpolation.upper()]
    expected = np.asarray(Image.fromarray(pixels).resize((size, size), resample)).astype(int)
    # Measured 0.2 to 2.2: noise of the picture, which each filter smooths by another amount.
    assert np.abs(result - expected).mean() < 3


def test_a_jpeg_that_stands_on_its_side_is_cropped_upright():
    pixels = picture(256)
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = np.ascontiguousarray(np.rot90(pixels))
    augmentation = Augmentation(plain_config(), stage_of(64))
    upright = augmentation(encoded(pixels, "JPEG", quality=95), 0)
    turned = augmentation(encoded(lying, "JPEG", quality=95, exif=exif), 0)
    assert np.abs(upright.astype(int) - turned.astype(int)).mean() < 3


def test_half_of_the_images_are_mirrored():
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, 32:] = 200
    augmentation = Augmentation(plain_config(horizontal_flip=True), stage_of(32))
    mirrored = sum(augmentation(encoded(pixels), seed)[0, 0, 0] > 100 for seed in range(200))
    assert 70 < mirrored < 130


def test_cutout_lays_one_square_over_the_image():
    white = encoded(np.full((64, 64, 3), 255, np.uint8))
    augmentation = Augmentation(plain_config(cutout=0.5), stage_of(32))
    sizes = [int((augmentation(white, seed) == 128).all(axis=2).sum()) for seed in range(100)]
    assert max(sizes) == 16 * 16 and min(sizes) >= 8 * 8
    assert len(set(sizes)) > 10


def test_on_the_device_means_not_in_the_workers():
    data = encoded(picture(64))
    with_it = Augmentation(plain_config(), stage_of(64, 10.0))
    without = Augmentation(plain_config(augment_on="device"), stage_of(64, 10.0))
    np.testing.assert_array_equal(without(data, 1), picture(64))
    seed = 1
    np.testing.assert_array_equal(with_it(data, seed), RandAugment(10, 2)(picture(64), seed))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_damaged_images_are_told(kind: str):
    augmentation = Augmentation(plain_config(), stage_of(32))
    with pytest.raises(ImageError):
        augmentation(encoded(picture(64), kind)[:600], 0)
    with pytest.raises(ImageError, match="not an image"):
        augmentation(b"no image at all", 0)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (32, 32), (1, 1), (900, 3)])
def test_crops_lie_in_the_image_and_have_the_shape_that_is_allowed(width: int, height: int):
    rng = random.Random(0)
    areas: list[float] = []
    for _ in range(2000):
        left, top, right, bottom = draw_crop(width, height, 0.05, rng)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        areas.append((right - left) * (bottom - top) / (width * height))
        if min(width, height) > 300:
            assert 0.73 < (right - left) / (bottom - top) < 1.37
    if min(width, height) > 300:
        # Large areas fit less often, so the mean lies below the middle of 0.05 and 1.
        assert min(areas) > 0.04 and max(areas) > 0.9 and 0.4 < np.mean(areas) < 0.53


def test_resizing_to_the_same_size_changes_nothing():
    np.testing.assert_array_equal(resize(picture(64), 64, "bicubic"), picture(64))


def test_mixup_mixes_images_and_labels_in_the_same_ratio():
    torch.manual_seed(0)
    images = torch.eye(4)[:, :, None, None].expand(4, 4, 2, 2).contiguous()
    mixed, soft = mix(images, torch.arange(4), mixup_alpha=0.4, cutmix_alpha=0, num_classes=4)
    torch.testing.assert_close(mixed[:, :, 0, 0], soft)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(4))
    assert soft.max() < 1


def test_cutmix_gives_labels_the_share_of_their_pixels():
    torch.manual_seed(0)
    images = torch.eye(4)[:, :, None, None].expand(4, 4, 20, 20).contiguous()
    mixed, soft = mix(images, torch.arange(4), mixup_alpha=0, cutmix_alpha=1.0, num_classes=4)
    torch.testing.assert_close(mixed.mean(dim=(2, 3)), soft)
    assert set(mixed.unique().tolist()) == {0.0, 1.0} and soft.max() < 1


@pytest.mark.parametrize("num_images", [1, 2, 7, 8])
def test_with_both_one_half_gets_mixup_and_the_other_cutmix(num_images: int):
    torch.manual_seed(3)
    images = torch.eye(num_images)[:, :, None, None].expand(-1, -1, 20, 20).contiguous()
    labels = torch.arange(num_images)
    mixed, soft = mix(images, labels, 0.4, 1.0, num_images)
    assert mixed.shape == images.shape and soft.shape == (num_images, num_images)
    torch.testing.assert_close(mixed.mean(dim=(2, 3)), soft)
    half = num_images // 2
    torch.testing.assert_close(mixed[:half], mixed[:half, :, :1, :1].expand(-1, -1, 20, 20))
    assert set(mixed[half:].unique().tolist()) <= {0.0, 1.0}


def test_without_alphas_nothing_changes():
    images, labels = torch.randn(4, 3, 2, 2), torch.arange(4)
    assert mix(images, labels, 0.0, 0.0, 4) == (images, labels)


def test_mixing_follows_from_torchs_seed():
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6)
    random.seed(0)
    torch.manual_seed(5)
    first = mix(images, labels, 0.4, 0.4, 6)
    random.seed(1)
    torch.manual_seed(5)
    again = mix(images, labels, 0.4, 0.4, 6)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert math.isclose(float(first[1].sum()), 6, rel_tol=1e-5)
