"""What a job is told: its part and its variant, its folders, and how much of everything it does."""

from dataclasses import dataclass

from efficientnet.measuring.turns import TimeBudget
from perf.device_parts.config import Part


@dataclass(frozen=True)
class Scale:
    """How much of everything a job does."""

    device: str
    pace: TimeBudget
    """Of each program of a network."""
    batch_sizes: tuple[int, ...]
    sweep: tuple[int, ...]
    """Batch sizes that the best is looked for among."""
    sweep_s: float
    usual_best: int
    """Batch size where none was looked for."""
    copy_bytes: int
    product_sizes: tuple[int, ...]
    limit_s: float
    """Of each copy and product."""
    train_size: int
    train_batch: int
    train_precision: str
    train_s: float
    num_photos: int
    loader_rounds: int


FULL = Scale(
    device="cuda",
    pace=TimeBudget(seconds=1.0, num_turns=5, max_windows=10),
    batch_sizes=(16, 1),  # the paper's first: what is cut off is the rest
    sweep=(16, 32, 64, 128, 256),
    sweep_s=0.1,
    usual_best=64,
    copy_bytes=2 * 2**30,
    product_sizes=(4096, 8192),
    limit_s=0.5,
    train_size=300,
    train_batch=64,
    train_precision="bf16",
    train_s=5,
    num_photos=256,
    loader_rounds=3,
)
DRY = Scale(
    device="cpu",
    pace=TimeBudget(seconds=0.04, num_turns=2, max_windows=10),
    batch_sizes=(2, 1),
    sweep=(2, 4),
    sweep_s=0.02,
    usual_best=4,
    copy_bytes=2**20,
    product_sizes=(64,),
    limit_s=0.01,
    train_size=32,
    train_batch=2,
    train_precision="fp32",
    train_s=0.1,
    num_photos=32,
    loader_rounds=1,
)


@dataclass(frozen=True)
class Order:
    """What a job's process is told, as JSON."""

    part: Part
    job: str
    variant: str
    output: str
    """Folder of the records."""
    scratch: str
    """Folder for what is thrown away afterwards."""
    is_dry_run: bool

    @property
    def scale(self) -> Scale:
        """How much it does."""
        return DRY if self.is_dry_run else FULL
