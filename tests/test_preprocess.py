import hashlib
import io
import struct
from pathlib import Path

import numpy as np
import pytest
from facts import raises_naming
from numpy.typing import NDArray
from PIL import Image, ImageOps, TiffImagePlugin
from timm.data.transforms_factory import create_transform

from efficientnet.images.decoding import decode_jpeg, largest_reduction, read_jpeg_header
from efficientnet.images.preprocess import (
    GOOGLE_MEAN,
    GOOGLE_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_SMOOTHED_SCALE,
    ImageError,
    ImageTooLargeError,
    PreprocessSpec,
    decode_image,
    normalize,
    preprocess,
    resize_and_crop,
    smoothing_sigma,
)

SPEC = PreprocessSpec(
    image_size=48,
    interpolation="bilinear",
    crop_fraction=None,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
# Values 0..1, so that a count is 1 / 255; float32 makes a little more of it.
UNIT = SPEC.model_copy(update={"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)})
FAST = UNIT.model_copy(update={"method": "fast"})
ONE_COUNT = 1.01 / 255
# Mean difference of values 0..1 between exact and fast; a shift by a pixel or swapped channels make
# clearly more of it, as a test below shows.
SAME_PICTURE = 0.02

PHOTOS = Path(__file__).resolve().parent.parent.parent / "shared/data/photos"


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
@pytest.mark.parametrize("is_squashed", [False, True])
@pytest.mark.parametrize("size", [(500, 333), (333, 500), (97, 64), (64, 64)])
def test_pixels_equal_timms_evaluation_transform(interpolation, crop_fraction, is_squashed, size):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    changes = {
        "interpolation": interpolation,
        "crop_fraction": crop_fraction,
        "is_squashed": is_squashed,
    }
    spec = SPEC.model_copy(update=changes)
    expected = timm_pixels(encode(image), spec)
    found = preprocess(encode(image), spec)
    assert found.shape == (3, 48, 48) and found.dtype == np.float32
    # Divided by the standard deviation.
    np.testing.assert_allclose(found, expected, atol=ONE_COUNT / 0.5)


def timm_pixels(data: bytes, spec: PreprocessSpec) -> NDArray[np.float32]:
    transform = create_transform(
        input_size=spec.image_size,
        interpolation=spec.interpolation,
        crop_pct=spec.crop_fraction or 1.0,
        crop_mode="squash" if spec.is_squashed or spec.crop_fraction is None else "center",
        mean=spec.mean,
        std=spec.std,
    )
    return transform(Image.open(io.BytesIO(data)).convert("RGB")).numpy()


def photo(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """Gradients with sharp edges and some noise, which compress like a photo."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    values = np.stack([x * 255 / width, y * 255 / height, (x // 31 + y // 23) % 2 * 200], axis=2)
    values += np.random.default_rng(width).normal(0, 12, values.shape)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert(mode)


JPEGS = {
    "4:2:0": encode(photo((641, 427)), "JPEG", quality=90, subsampling=2),
    "4:4:4": encode(photo((333, 500)), "JPEG", quality=95, subsampling=0),
    "tall": encode(photo((101, 487)), "JPEG", quality=90),
    "wide": encode(photo((487, 101)), "JPEG", quality=90),
    "small": encode(photo((61, 47)), "JPEG", quality=90),
    "large": encode(photo((1601, 1203)), "JPEG", quality=80),
    "gray": encode(photo((300, 201), "L"), "JPEG"),
    "progressive": encode(photo((401, 300)), "JPEG", progressive=True),
    "CMYK": encode(photo((230, 345), "CMYK"), "JPEG"),
}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_fraction", [0.875, 0.949, 1.0, None])
@pytest.mark.parametrize("image_size", [224, 300])
@pytest.mark.parametrize("name", JPEGS)
def test_jpegs_of_every_kind_equal_timms_to_one_count(
    name: str, image_size: int, crop_fraction: float | None, interpolation: str
):
    spec = UNIT.model_copy(
        update={
            "image_size": image_size,
            "crop_fraction": crop_fraction,
            "interpolation": interpolation,
        }
    )
    found, expected = preprocess(JPEGS[name], spec), timm_pixels(JPEGS[name], spec)
    assert np.abs(found - expected).max() <= ONE_COUNT


@pytest.mark.parametrize(
    ("number", "image_size", "crop_fraction", "interpolation"),
    [
        (0, 224, 0.875, "bicubic"),
        (1, 240, 0.922, "bilinear"),
        (2, 384, 1.0, "bicubic"),
        (3, 384, None, "bilinear"),
        (4, 600, 0.949, "bicubic"),
    ],
)
def test_real_photos_equal_timms_to_one_count(
    number: int, image_size: int, crop_fraction: float | None, interpolation: str
):
    paths = sorted(PHOTOS.glob("*.JPEG"))[number::5]
    if not paths:
        pytest.skip(f"no photos in {PHOTOS}")
    spec = UNIT.model_copy(
        update={
            "image_size": image_size,
            "crop_fraction": crop_fraction,
            "interpolation": interpolation,
        }
    )
    for path in paths:
        data = path.read_bytes()
        off = np.abs(preprocess(data, spec) - timm_pixels(data, spec)).max()
        assert off <= ONE_COUNT, path.name


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_fraction", [0.875, 1.0, None])
@pytest.mark.parametrize("name", JPEGS)
def test_fast_shows_the_same_picture_as_exact(
    name: str, crop_fraction: float | None, interpolation: str
):
    exact = UNIT.model_copy(
        update={"image_size": 96, "crop_fraction": crop_fraction, "interpolation": interpolation}
    )
    fast = exact.model_copy(update={"method": "fast"})
    found, expected = preprocess(JPEGS[name], fast), preprocess(JPEGS[name], exact)
    assert found.shape == expected.shape and found.dtype == np.float32
    assert np.abs(found - expected).mean() < SAME_PICTURE


@pytest.mark.parametrize("name", ["4:2:0", "4:4:4", "progressive", "large"])
def test_a_shifted_or_recolored_picture_would_not_pass_for_the_same(name: str):
    image = preprocess(JPEGS[name], UNIT.model_copy(update={"image_size": 96}))
    assert np.abs(np.roll(image, 1, axis=2) - image).mean() > 1.5 * SAME_PICTURE
    assert np.abs(np.roll(image, 1, axis=1) - image).mean() > 1.5 * SAME_PICTURE
    assert np.abs(image[::-1] - image).mean() > 1.5 * SAME_PICTURE


def test_fast_is_another_method_than_exact():
    fast = FAST.model_copy(update={"image_size": 200, "interpolation": "bilinear"})
    exact = fast.model_copy(update={"method": "exact"})
    assert (preprocess(JPEGS["4:2:0"], fast) != preprocess(JPEGS["4:2:0"], exact)).any()


@pytest.mark.parametrize("crop_fraction", [0.875, None])
@pytest.mark.parametrize("image_size", [16, 96, 384])
@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (7, 9), (511, 64), (3000, 2900)])
def test_fast_takes_jpegs_of_any_shape(
    size: tuple[int, int], image_size: int, crop_fraction: float | None
):
    data = encode(Image.new("RGB", size, (10, 120, 240)), "JPEG", quality=95)
    spec = FAST.model_copy(update={"image_size": image_size, "crop_fraction": crop_fraction})
    found = preprocess(data, spec)
    assert found.shape == (3, image_size, image_size)
    np.testing.assert_allclose(found.mean(axis=(1, 2)) * 255, (10, 120, 240), atol=4)
    assert np.ptp(found, axis=(1, 2)).max() < 0.01


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_fast_treats_other_formats_as_exact_does(file_format: str):
    data = encode(photo((130, 90)), file_format)
    exact = FAST.model_copy(update={"method": "exact"})
    np.testing.assert_array_equal(preprocess(data, FAST), preprocess(data, exact))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_fast_turns_a_jpeg_upright(orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo((200, 120)), "JPEG", quality=95, exif=exif)
    exact = FAST.model_copy(update={"method": "exact", "image_size": 64, "crop_fraction": 0.8})
    fast = exact.model_copy(update={"method": "fast"})
    assert np.abs(preprocess(data, fast) - preprocess(data, exact)).mean() < SAME_PICTURE


def test_fast_takes_a_jpeg_with_more_pictures_behind_it():
    pictures = [photo((200, 120)), Image.new("RGB", (200, 120))]
    data = encode(pictures[0], "MPO", save_all=True, append_images=pictures[1:])
    header = read_jpeg_header(data)
    assert header is not None and (header.width, header.height) == (200, 120)
    exact = FAST.model_copy(update={"method": "exact"})
    assert np.abs(preprocess(data, FAST) - preprocess(data, exact)).mean() < SAME_PICTURE


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_a_reduced_jpeg_is_the_picture_in_fewer_pixels(reduction: int):
    data = encode(picture(size=(160, 80)), "JPEG", quality=95)
    header = read_jpeg_header(data)
    assert header is not None
    pixels = decode_jpeg(data, header, reduction)
    assert pixels.shape == (80 // reduction, 160 // reduction, 3)
    np.testing.assert_allclose(pixels[:, 1].mean(axis=0), (200, 40, 90), atol=4)
    np.testing.assert_allclose(pixels[:, -1].mean(axis=0), (20, 180, 60), atol=4)


def test_a_jpeg_that_opencv_refuses_is_an_image_error():
    data = encode(photo((64, 48)), "JPEG")
    header = read_jpeg_header(data)
    assert header is not None
    with pytest.raises(ImageError, match="truncated"):
        decode_jpeg(data[:2] + b"\xff\xd9", header, 1)


def test_normalizing_is_the_same_float32_arithmetic_as_on_a_whole_image():
    spec = SPEC.model_copy(update={"mean": IMAGENET_MEAN, "std": IMAGENET_STD})
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    mean, std = np.float32(IMAGENET_MEAN), np.float32(IMAGENET_STD)
    expected = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    found = normalize(Image.fromarray(pixels), spec)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, expected.transpose(2, 0, 1))


def test_the_128_form_is_the_value_less_128_over_128():
    spec = SPEC.model_copy(update={"mean": GOOGLE_MEAN, "std": GOOGLE_STD})
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    found = normalize(Image.fromarray(values).convert("RGB"), spec)
    np.testing.assert_allclose(found[1], (values.astype(float) - 128) / 128, atol=1e-6)


def test_a_spec_without_a_method_is_exact():
    older = SPEC.model_dump(mode="json", exclude={"method"})
    assert "method" not in older
    assert PreprocessSpec.model_validate(older) == SPEC
    assert SPEC.method == "exact"


def test_the_hash_of_a_spec_tells_every_field_and_nothing_else():
    assert SPEC.sha256 == PreprocessSpec.model_validate_json(SPEC.model_dump_json()).sha256
    others = [
        SPEC.model_copy(update=update)
        for update in (
            {"image_size": 49},
            {"interpolation": "bicubic"},
            {"crop_fraction": 0.9},
            {"mean": (0.5, 0.5, 0.4)},
            {"std": (0.5, 0.5, 0.4)},
            {"method": "fast"},
        )
    ]
    assert len({SPEC.sha256, *(other.sha256 for other in others)}) == 7
    # Stored in other files, so it may not change with the order of fields or of a library's JSON.
    text = (
        '{"crop_fraction":null,"image_size":48,"interpolation":"bilinear","mean":[0.5,0.5,0.5],'
        '"std":[0.5,0.5,0.5]}'
    )
    assert SPEC.sha256 == hashlib.sha256(text.encode()).hexdigest()


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


# YCbCrPositioning is a number; here it is text, which Pillow reads and cannot write.
ODD_EXIF = (
    b"Exif\0\0II*\0"
    + struct.pack("<IH", 8, 2)
    + struct.pack("<HHL4s", 0x213, 2, 1, b"1\0\0\0")
    + struct.pack("<HHL4s", 0x112, 3, 1, b"\6\0\0\0")
    + bytes(4)
)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_a_turned_photo_is_upright_whatever_else_its_exif_holds(file_format: str):
    stored = photo((64, 32)).transpose(Image.Transpose.ROTATE_90)
    options = {"lossless": True} if file_format == "WEBP" else {}
    found = decode_image(encode(stored, file_format, exif=ODD_EXIF, **options))
    plain = decode_image(encode(stored, file_format, **options))
    expected = plain.transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    assert preprocess(encode(stored, "JPEG", exif=ODD_EXIF), FAST).shape == (3, 48, 48)


@pytest.mark.parametrize("num_bytes", range(6, len(ODD_EXIF), 4))
def test_a_photo_whose_exif_ends_early_is_shown_as_it_is_stored(num_bytes: int):
    data = encode(picture(), "PNG", exif=ODD_EXIF[:num_bytes])
    # The orientation's value stands two bytes before the end of the block, the link's four.
    is_turned = num_bytes >= len(ODD_EXIF) - 6
    assert decode_image(data).size == ((40, 60) if is_turned else (60, 40))


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(value: int):
    exif = ODD_EXIF.replace(b"\6\0\0\0", struct.pack("<L", value))
    assert decode_image(encode(picture(), "PNG", exif=exif)).size == (60, 40)


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_read_as_pillow_reads_it(orientation: int, big_endian: bool):
    exif = Image.Exif()
    exif.endian = ">" if big_endian else "<"
    exif[0x0112] = orientation
    stored = picture(size=(64, 32))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(encode(stored, exif=exif))))
    found = decode_image(encode(stored, exif=exif))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("file_format", ["AVIF", "PNG", "JPEG", "WEBP", "GIF", "TIFF", "ICO"])
def test_a_flipped_byte_gives_a_picture_or_an_image_error(file_format: str):
    data = encode(photo((24, 16)), file_format)
    refused = 0
    for place in range(len(data)):
        broken = bytearray(data)
        broken[place] ^= 0xFF
        try:
            decode_image(bytes(broken))
        except ImageError:
            refused += 1
    assert 0 < refused < len(data)


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
@pytest.mark.parametrize("spec", [SPEC, FAST], ids=["exact", "fast"])
def test_what_is_no_image_is_refused_with_the_reason(
    data: bytes, reason: str, spec: PreprocessSpec
):
    with pytest.raises(ImageError, match=reason):
        preprocess(data, spec)


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded():
    with raises_naming(ImageError, "8000 x 7000", "50 megapixels"):
        decode_image(encode(Image.new("1", (8000, 7000))))
    with raises_naming(ImageTooLargeError, "8000 x 7000"):
        preprocess(encode(Image.new("L", (8000, 7000)), "JPEG"), FAST)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_extreme_shapes_still_give_the_networks_input(size: tuple[int, int]):
    for crop_fraction in (None, 0.875):
        spec = SPEC.model_copy(update={"crop_fraction": crop_fraction})
        assert resize_and_crop(Image.new("RGB", size), spec).size == (48, 48)


@pytest.mark.parametrize(
    ("spare", "reduction"),
    [(0.3, 1), (1, 1), (1.99, 1), (2, 2), (3.9, 2), (7.9, 4), (8, 8), (40, 8)],
)
def test_a_jpeg_is_not_decoded_smaller_than_it_is_needed(spare: float, reduction: int):
    assert largest_reduction(spare) == reduction


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_what_is_not_shrunk_is_not_smoothed_and_the_rest_the_more_it_is(interpolation: str):
    assert smoothing_sigma(0.5, interpolation) == smoothing_sigma(1, interpolation) == 0
    sigmas = [smoothing_sigma(scale, interpolation) for scale in (1.2, 1.5, MAX_SMOOTHED_SCALE)]
    assert 0 < sigmas[0] < sigmas[1] < sigmas[2] < 1
