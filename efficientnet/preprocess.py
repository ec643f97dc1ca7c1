"""Image bytes -> float32 [3, H, W]: the one path of evaluation, parity, benchmarks and service."""

import io
import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MAX_PIXELS = 50_000_000

# Pillow knows more kinds, of which some start other programs (EPS) or hold many pages (PDF).
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "ICO")

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


# What Pillow's decoders raise on damaged data is not one class.
DECODER_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    TypeError,
    ArithmeticError,
)


class ImageError(ValueError):
    """Bytes that cannot be used as an image: damaged, of an unknown kind, or too large."""


class PreprocessSpec(BaseModel):
    """How an image becomes a network's input; stored in checkpoints and manifests."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int = Field(gt=0)
    """Height and width of the network's input, pixels."""
    interpolation: Literal["bilinear", "bicubic"]
    """Pillow's antialiased filters."""
    crop_fraction: float | None = Field(gt=0, le=1)
    """The short side becomes image_size / crop_fraction and the centre is cut out;
    None: the whole image is squashed to the square."""
    mean: tuple[float, float, float]
    """Subtracted from each RGB channel, which is scaled to 0..1 before."""
    std: tuple[float, float, float]
    """Divides each channel afterwards."""


class ImageTooLargeError(ImageError):
    """An image of more pixels than are decoded."""


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture of any mode into an upright 8-bit RGB one.

    The EXIF orientation is applied, 16-bit values are scaled to 8 bits (Pillow would clip them),
    and transparent pixels are laid over white.

    Raises:
        ImageTooLargeError: more than `max_pixels`, found before anything is decoded.
        ImageError: no image, or truncated.
    """
    if not data:
        raise ImageError("the image is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        if image.width * image.height > max_pixels:
            raise ImageTooLargeError(
                f"the image has {image.width} x {image.height} pixels, "
                f"more than the {max_pixels / 1e6:g} megapixels allowed"
            )
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(
            f"these {len(data)} bytes are not an image of a known kind; "
            f"known: {', '.join(IMAGE_FORMATS)}"
        ) from None
    # Pillow's own, far larger limit: an error, or a warning where warnings are errors.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(str(error)) from None
    except DECODER_ERRORS as error:
        raise ImageError(f"the image is damaged or truncated: {error}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow opens 16-bit gray files in these modes, depending on the format.
        wide = np.asarray(image).astype(np.int64)
        return Image.fromarray((wide.clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def resize_and_crop(image: Image.Image, spec: PreprocessSpec) -> Image.Image:
    """Bring an RGB image to image_size x image_size.

    Sizes are rounded as torchvision's Resize and CenterCrop round them, which timm uses too.
    """
    size, resample = spec.image_size, RESAMPLING[spec.interpolation]
    if spec.crop_fraction is None:
        return image.resize((size, size), resample)
    short_side = math.floor(size / spec.crop_fraction)
    width, height = image.size
    if width <= height:
        new_width, new_height = short_side, int(short_side * height / width)
    else:
        new_width, new_height = int(short_side * width / height), short_side
    left, top = round((new_width - size) / 2.0), round((new_height - size) / 2.0)
    if (new_width, new_height) != (width, height):
        image = image.resize((new_width, new_height), resample)
    return image.crop((left, top, left + size, top + size))


def normalize(image: Image.Image, spec: PreprocessSpec) -> NDArray[np.float32]:
    """Turn an RGB image into float32 [3, H, W], (value / 255 - mean) / std."""
    pixels = np.asarray(image, dtype=np.float32)  # [H, W, 3]
    mean = np.asarray(spec.mean, dtype=np.float32)
    std = np.asarray(spec.std, dtype=np.float32)
    scaled = (pixels / np.float32(255) - mean) / std
    return np.ascontiguousarray(scaled.transpose(2, 0, 1))


def preprocess(data: bytes, spec: PreprocessSpec) -> NDArray[np.float32]:
    """Turn the bytes of an image file into float32 [3, image_size, image_size].

    Raises:
        ImageError: see decode_image.
    """
    return normalize(resize_and_crop(decode_image(data), spec), spec)
