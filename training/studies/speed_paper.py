"""Tables 2 and 3 of the V2 paper -> rows to stand beside: variant, sizes and images per second."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PaperRow:
    """What Tan and Le 2021 (arXiv 2104.00298) print in tables 2 (v1) and 3; speeds in images/s."""

    variant: str
    image_size: int
    v100: float | None
    """None: out of memory."""
    tpu: float | None
    """Of a TPUv3 core."""
    v100_batch_size: int | None = None
    """None: not printed."""
    tpu_batch_size: int | None = None
    num_parameters: float | None = None
    multiply_adds: float | None = None


PAPER_ROWS: dict[Literal[2, 3], tuple[PaperRow, ...]] = {
    2: (
        PaperRow("b6", 512, 29, 42, 12, 32),
        PaperRow("b6", 512, None, None, 24, 128),
        PaperRow("b6", 380, 37, 76, 12, 32),
        PaperRow("b6", 380, 52, 93, 24, 128),
    ),
    3: (
        PaperRow("b4", 380, 155, 262, num_parameters=19.3e6, multiply_adds=4.5e9),
        PaperRow("b4-fused-1-3", 380, 216, 362, num_parameters=20.0e6, multiply_adds=7.5e9),
        PaperRow("b4-fused-1-5", 380, 223, 327, num_parameters=43.4e6, multiply_adds=21.3e9),
        PaperRow("b4-fused-1-7", 380, 206, 254, num_parameters=132.0e6, multiply_adds=34.4e9),
    ),
}

# Table 3 does not tell its batch size.
TABLE_BATCH_SIZES: dict[Literal[2, 3], tuple[int, ...]] = {2: (12, 24), 3: (32,)}
