"""What can be set when a checkpoint is exported."""

from dataclasses import dataclass
from pathlib import Path

MIN_PARITY_IMAGES = 64


@dataclass(frozen=True)
class ExportConfig:
    """Settings that all exports share."""

    checkpoint: Path | None = None
    """Checkpoint directory; None = the one of the newest complete run."""

    output: Path | None = None
    """Artifact directory; None = artifacts/<variant>/<runtime>-<precision>."""

    data: str | None = None
    """Held-out images for the parity check, where the training data has moved: a folder or tar
    shards, as in training/run.py; None = what the checkpoint was trained on."""

    max_batch_size: int = 64
    """Most images per call, at least 1."""

    num_parity_images: int = 128
    """Held-out images that the artifact is compared on, at least 64."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if self.max_batch_size < 1:
            raise ValueError(f"--max-batch-size is {self.max_batch_size}, expected at least 1")
        if self.num_parity_images < MIN_PARITY_IMAGES:
            raise ValueError(
                f"--num-parity-images is {self.num_parity_images}, "
                f"expected at least {MIN_PARITY_IMAGES}"
            )
