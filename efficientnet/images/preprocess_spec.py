"""How an image becomes a network's input, as records on disk say it; needs no decoder."""

import hashlib
import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


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
    is_squashed: bool = False
    """The whole image becomes a square of image_size / crop_fraction, of which the centre is cut
    out. Without a crop_fraction it is squashed anyway."""
    method: Literal["exact", "fast"] = "exact"
    """exact: Pillow decodes and resizes. fast: of a JPEG (not CMYK), libjpeg-turbo decodes 1/2, 1/4
    or 1/8 of the size where that is enough, and OpenCV smooths by three pixels and interpolates
    (bicubic only what is enlarged), where Pillow's filters widen with the scale; any other format
    is treated as by exact.
    `python perf/preprocessing.py` measures by how much pixels and answers differ."""

    @property
    def sha256(self) -> str:
        """Name the spec by the SHA-256 of its JSON with sorted keys, in hexadecimal.

        Fields that have their default are left out, so that a spec keeps its name when there is
        something new to choose.
        """
        values = self.model_dump(mode="json", exclude_defaults=True)
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def require_sha256(spec: PreprocessSpec, sha256: str) -> None:
    """Raise a ValueError if a record's hash of its spec is another one; older records have none."""
    if sha256 not in ("", spec.sha256):
        raise ValueError(
            f"preprocess_sha256 is {sha256[:12]}, but the preprocess beside it has "
            f"{spec.sha256[:12]}: it was changed by hand"
        )
