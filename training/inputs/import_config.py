"""What can be set when weights are imported."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from efficientnet.network.variants import get_variant


@dataclass(frozen=True)
class ImportConfig:
    """What is imported."""

    variant: tyro.conf.Positional[str]
    """A row of `python -m efficientnet`."""

    source: Annotated[str, tyro.conf.arg(name="from")]
    """LIBRARY:NAME (of timm, torchvision, efficientnet_pytorch or package), or a .safetensors or
    .pth file."""

    like: str | None = None
    """For a file, the LIBRARY:NAME whose padding, epsilon and preprocessing it is used with; None:
    as the file, or what stands beside it, tells."""

    entry: str | None = None
    """Of a training checkpoint with several state dicts, the name of the one that is meant."""

    drop: tuple[str, ...] = ()
    """Tensors of the file that are not the network's, or what their names begin with."""

    class_names: Path | None = None
    """File with the names of the classes in the order of the logits: one a line, or a JSON list;
    None = ImageNet's where there are 1,000, else class_0, class_1 and so on."""

    preprocess_method: Literal["exact", "fast"] = "exact"
    """How images are decoded and resized: exactly as for these weights, or faster with slightly
    other pixels (`python perf/preprocessing.py` measures both)."""

    output: Path = Path("runs")
    """Folder in which the run's own folder is made."""

    def __post_init__(self) -> None:
        get_variant(self.variant)
