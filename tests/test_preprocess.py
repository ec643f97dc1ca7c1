import io

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from timm.data.transforms_factory import create_transform

from efficientnet.preprocess import (
    ImageError,
    PreprocessSpec,
    decode_image,
    preprocess,
    resize_and_crop,
)

SPEC = PreprocessSpec(
    image_size=48,
    interpolation="bilinear",
    crop_fraction=None,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


def picture(mode: str = "RGB", size: tuple[int, int] = (60, 40)) -> Image.Image:
    """Left half one value, right half another, so that orientation shows."""
    width, height = size
    values = np.zeros((height, width, 3), dtype=np.uint8)
    values[:, : width // 2] = (200, 40, 90)
    values[:, width // 2 :] = (20, 180, 60)
    return Image.fromarray(values).convert(mode)


def encode(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_fraction", [0.875, 1.0, None])
@pytest.mark.parametrize("size", [(500, 333), (333, 500), (97, 64), (64, 64)])
def test_pixels_equal_timms_evaluation_transform(interpolation, crop_fraction, size):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    spec = SPEC.model_copy(update={"interpolation": interpolation, "crop_fraction": crop_fraction})
    timm_transform = create_transform(
        input_size=48,
        interpolation=interpolation,
        crop_pct=crop_fraction or 1.0,
        crop_mode="squash" if crop_fraction is None else "center",
        mean=SPEC.mean,
        std=SPEC.std,
    )
    expected = timm_transform(image).numpy()
    found = preprocess(encode(image), spec)
    assert found.shape == (3, 48, 48) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_golden_pixels_of_a_resized_gradient_do_not_change():
    gradient = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    found = preprocess(encode(gradient), SPEC.model_copy(update={"image_size": 4}))
    # Worked out by hand: a triangle of half-width 2 input pixels, renormalised at the edges.
    expected = [[26, 33, 41, 48], [83, 90, 98, 105], [147, 154, 162, 169], [204, 211, 219, 226]]
    np.testing.assert_allclose((found[0] * 0.5 + 0.5) * 255, expected, atol=1e-3)
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [
        ("L", "PNG"),
        ("1", "PNG"),
        ("RGB", "PNG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("LA", "PNG"),
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        ("CMYK", "TIFF"),
        ("YCbCr", "TIFF"),
    ],
)
def test_every_mode_becomes_the_rgb_picture_that_it_shows(mode: str, file_format: str):
    stored = picture(mode)
    options = {"lossless": True} if file_format == "WEBP" else {}
    found = np.asarray(decode_image(encode(stored, file_format, **options)), dtype=int)
    expected = np.asarray(stored.convert("RGB"), dtype=int)
    assert found.shape == (40, 60, 3)
    # YCbCr rounds; a swapped channel or an inverted CMYK would be off by far more.
    assert np.abs(found - expected).max() <= 3


def test_cmyk_jpeg_is_not_inverted():
    found = np.asarray(decode_image(encode(picture("CMYK"), "JPEG", quality=95)), dtype=int)
    assert np.abs(found - np.asarray(picture(), dtype=int))[:, 5:25].max() < 12


def test_16_bit_gray_is_scaled_not_clipped():
    wide = np.linspace(0, 65535, 60 * 40).reshape(40, 60).astype(np.uint16)
    found = np.asarray(decode_image(encode(Image.fromarray(wide))))[:, :, 0]
    np.testing.assert_allclose(found, wide / 257, atol=1)


def test_transparent_pixels_become_white():
    image = picture("RGBA")
    image.putalpha(0)
    assert (np.asarray(decode_image(encode(image))) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int):
    upright = picture(size=(64, 32))
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[TiffImagePlugin.IMAGEDESCRIPTION] = "x"
    exif[0x0112] = orientation
    found = decode_image(encode(stored, "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(upright))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (b"this is a text, not a picture", "not an image"),
        (encode(picture())[:80], "damaged or truncated"),
        (encode(picture(size=(600, 400)), "JPEG")[:1500], "damaged or truncated"),
        (encode(picture())[:20], "."),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(data: bytes, reason: str):
    with pytest.raises(ImageError, match=reason):
        preprocess(data, SPEC)


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded():
    with pytest.raises(ImageError, match=r"8000 x 7000 pixels, more than the 50 megapixels"):
        decode_image(encode(Image.new("1", (8000, 7000))))


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_extreme_shapes_still_give_the_networks_input(size: tuple[int, int]):
    for crop_fraction in (None, 0.875):
        spec = SPEC.model_copy(update={"crop_fraction": crop_fraction})
        assert resize_and_crop(Image.new("RGB", size), spec).size == (48, 48)
