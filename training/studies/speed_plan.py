"""What to measure -> cases, one for each process, in groups that take turns."""

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

import tyro

from efficientnet.command import require_least, require_positive
from efficientnet.images.datasets import load_dataset
from efficientnet.machine.environment import num_usable_cores
from efficientnet.network.architectures import peer_of
from efficientnet.network.variants import Padding, get_variant
from training.recipe.config import TrainConfig
from training.recipe.recipes import imagenet_recipe

OURS, TIMM, TIMM_AGAIN = "ours", "timm", "timm again"

IMAGENET_CLASSES = 1000

# More steps than any measurement takes: the loader begins one epoch after the other.
NUM_LOADER_STEPS = 1_000_000


# Tan and Le 2021 (arXiv 2104.00298), tables 2 (of v1) and 3: variants, image sizes, batch sizes.
# Table 3 does not tell its batch size.
PAPER_TABLES: dict[Literal[2, 3], tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]]] = {
    2: (("b6",), (512, 380), (12, 24)),
    3: (("b4", "b4-fused-1-3", "b4-fused-1-5", "b4-fused-1-7"), (380,), (32,)),
}


@dataclass(frozen=True)
class SpeedConfig:
    """What to measure, and for how long."""

    variant: tyro.conf.Positional[str | None] = None
    """Architecture size; None = that of --table, or v2-s."""

    image_sizes: tuple[int, ...] | None = None
    """Pixels; None = the first and the last stage's of the recipe, or the table's."""

    batch_sizes: tuple[int, ...] | None = None
    """Images per forward pass; None = 16 32 64, or the table's."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16, fp16: forward pass under autocast; fp16 with a scaled loss."""

    compile: bool = False
    """Compile the network; the seconds that it takes are a column."""

    data: str | None = None
    """Images to feed from as well: a folder, tar shards or digits, as in training/run.py."""

    num_workers: int | None = None
    """Processes that decode and augment; None = one per core."""

    table: Literal[2, 3] | None = None
    """The V2 paper's table whose rows are measured, for `python perf/paper.py` to set beside the
    paper's: 2 = B6 by size and batch, 3 = B4 with fused stages."""

    peer: Literal["timm"] | None = None
    """Whose training step to compare with."""

    seconds: float = 10.0
    """Measured per row, without warm-up; at least one step."""

    turns: int = 5
    """Over which `seconds` are spread with --peer."""

    threads: int | None = None
    """CPU threads of each process; None = one per usable core."""

    memory_limit_bytes: int | None = None
    """What a step on a CPU may take; None = 85 % of the machine's memory."""

    output: Path = Path("reports/training-speed.jsonl")
    """Records are appended to it."""

    publish: bool = False
    """Also write records and tables to reports/published/<date>-<device>/, where those of other
    settings stay, and all of them into docs/results.md."""

    readme: Path = Path("docs/results.md")
    """File with the markers that the tables are written between."""

    def __post_init__(self) -> None:
        for name in self.variants:
            get_variant(name)
            self.padding(name)
        if self.table and self.variant not in (None, self.variants[0]):
            raise ValueError(
                f"table {self.table} is about {self.variants[0]}; leave the variant out"
            )
        if sum(map(bool, (self.table, self.peer, self.data))) > 1:
            raise ValueError("--table, --peer and --data do not go together; give one of them")
        require_positive(self, "seconds")
        # Batch norm needs more than one value per channel.
        require_least(self, image_sizes=16, batch_sizes=2, turns=1, threads=1)
        require_least(self, num_workers=0, memory_limit_bytes=1)

    @property
    def variants(self) -> tuple[str, ...]:
        """Those that are measured."""
        if self.table:
            return PAPER_TABLES[self.table][0]
        return (self.variant or "v2-s",)

    @property
    def image_size_list(self) -> tuple[int, ...]:
        """Pixels, in the order of the rows."""
        if self.image_sizes:
            return self.image_sizes
        if self.table:
            return PAPER_TABLES[self.table][1]
        return tuple(dict.fromkeys(imagenet_recipe(self.variants[0]).progressive.image_size))

    @property
    def batch_size_list(self) -> tuple[int, ...]:
        """Images per forward pass, in the order of the rows."""
        if self.batch_sizes:
            return self.batch_sizes
        if self.table:
            return PAPER_TABLES[self.table][2]
        return (16, 32, 64)

    def padding(self, variant: str) -> Padding:
        """Return the recipe's padding, or timm's where its network has the other one only."""
        if self.peer is None:
            return "symmetric"
        try:
            peer_of(variant, self.peer, "symmetric")
        except ValueError:
            peer_of(variant, self.peer, "same")
            return "same"
        return "symmetric"


@dataclass(frozen=True)
class StepCase:
    """What one process measures."""

    variant: str
    contender: str
    image_size: int
    micro_batch_size: int
    precision: Literal["fp32", "bf16", "fp16"]
    padding: Padding
    is_compiled: bool
    num_classes: int
    num_threads: int
    data: str | None = None
    """Images for the loader; None = one synthetic batch."""
    num_workers: int = 0

    def describe(self) -> str:
        """Name it in the log."""
        fed = ", fed by the loader" if self.data else ""
        name = "" if self.contender == OURS else f"{self.contender}, "
        return f"{name}{self.variant} {self.image_size} px, batch {self.micro_batch_size}{fed}"

    def train_config(self) -> TrainConfig:
        """Return the paper's recipe, at the last stage's values and one image size, unmixed."""
        recipe, size = imagenet_recipe(self.variant), self.image_size
        return replace(
            recipe,
            progressive=replace(
                recipe.progressive,
                image_size=(size, size),
                mixup_alpha=(0, 0),
                cutmix_alpha=(0, 0),
                num_stages=1,
                schedule="fixed",
            ),
            batch_size=self.micro_batch_size,
            micro_batch_size=self.micro_batch_size,
            steps=NUM_LOADER_STEPS,
            precision=self.precision,
            compile=self.is_compiled,
            padding=self.padding,
        )


def plan(config: SpeedConfig) -> list[tuple[StepCase, ...]]:
    """List what is measured; those of one group take turns."""
    num_classes = IMAGENET_CLASSES
    if config.data is not None:
        dataset = load_dataset(config.data)
        num_classes = max(num_classes, len(dataset.class_names))
        if len(dataset.train) < max(config.batch_size_list):
            raise ValueError(
                f"{len(dataset.train)} training images do not fill a batch of "
                f"{max(config.batch_size_list)}; give smaller --batch-sizes, or more images"
            )
    workers = num_usable_cores() if config.num_workers is None else config.num_workers
    groups: list[tuple[StepCase, ...]] = []
    for variant, image_size, batch_size in product(
        config.variants, config.image_size_list, config.batch_size_list
    ):
        case = StepCase(
            variant=variant,
            contender=OURS,
            image_size=image_size,
            micro_batch_size=batch_size,
            precision=config.precision,
            padding=config.padding(variant),
            is_compiled=config.compile,
            num_classes=num_classes,
            num_threads=config.threads or num_usable_cores(),
        )
        if config.peer:
            peers = (replace(case, contender=TIMM), replace(case, contender=TIMM_AGAIN))
            groups.append((case, *peers))
            continue
        groups.append((case,))
        if config.data is not None:
            groups.append((replace(case, data=config.data, num_workers=workers),))
    return groups
