"""What can be set when artifacts are compared."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import tyro

from efficientnet.command import JsonFlags, flag_of, require_least, require_positive
from efficientnet.precision import Precision
from export.inputs.candidates import COMMANDS
from export.inputs.config import MIN_PARITY_IMAGES, ExportConfig

RuntimeName = Literal[
    "onnxruntime", "openvino", "torch", "aoti", "torch-cuda", "aoti-cuda", "tensorrt"
]
RUNTIMES: tuple[RuntimeName, ...] = get_args(RuntimeName)

# Settings of other exports that would change nothing here.
NOT_TAKEN = ("precision", "batch", "batches", "size", "max_drop", "num_gate_images")


@dataclass(frozen=True)
class AllConfig(ExportConfig, JsonFlags):
    """Settings of all exports."""

    result_file = Path("reports/exports.json")

    # Of one artifact: what is shared by all of them is what --help lists.
    precision: tyro.conf.Suppress[Precision] = "fp32"
    output: tyro.conf.Suppress[Path | None] = None

    only: tuple[str, ...] = ()
    """Commands to run, of ort ov native aoti torch_trt trt; none = all."""

    seconds: float = 4.0
    """Measured time of each artifact, in calls of the images that --batch is tuned for."""

    publish: bool = False
    """Write to reports/published/<date>-<device>/, and all tables there into docs/results.md."""

    readme: Path = Path("docs/results.md")

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = sorted(set(self.only) - set(COMMANDS))
        if unknown:
            raise ValueError(f"--only is {' '.join(unknown)}, expected of {', '.join(COMMANDS)}")
        require_positive(self, "seconds")
        if self.precision != "fp32":
            raise ValueError(
                f"--precision is {self.precision}, but all of them are made; "
                "'python export/ort.py --precision ...' and its sisters make one"
            )
        if self.output is not None:
            raise ValueError("--output is one artifact's; all of them go to artifacts/<variant>")


@dataclass(frozen=True)
class StockConfig(ExportConfig, JsonFlags):
    """Settings of the comparison."""

    result_file = Path("reports/stock.json")

    paths: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Our artifacts of the same checkpoint and size; none = only make the stock ones."""

    seconds: float = 10.0
    """Measured time of each program."""

    turns: int = 8
    """Turns that this time is split into."""

    batch_sizes: tuple[int, ...] = (1,)
    """Images in a call, each measured in a run of its own; the stock artifacts get fixed shapes for
    them, and ours should have been exported with the same --batches."""

    publish: bool = False
    """Write to reports/published/<date>-<device>/, and all tables there into docs/results.md."""

    readme: Path = Path("docs/results.md")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_least(self, batch_sizes=1)
        names = [path.name for path in self.paths]
        if len(set(names)) < len(names):
            raise ValueError(
                f"the artifacts' folders are called {', '.join(names)}, by which the table names "
                "programs; expected a name of its own for each"
            )
        for name in NOT_TAKEN:
            if getattr(self, name) != getattr(ExportConfig, name):
                raise ValueError(
                    f"{flag_of(name)} is not taken here: the stock tools have their own "
                    "precisions and are not judged, and all programs are measured at the "
                    "checkpoint's size and --batch-sizes"
                )


@dataclass(frozen=True)
class AblationConfig(JsonFlags):
    """Settings of the ablation. All is computed in fp32: nothing but the graph's form differs."""

    result_file = Path("reports/fusion.json")

    checkpoint: Path | None = None
    """Checkpoint directory; None = the one of the newest complete run."""

    runtimes: tuple[RuntimeName, ...] = RUNTIMES
    """What executes the forms; those that are not here get a row that says why."""

    seconds: float = 10.0
    """Measured time of each form in each runtime, at batch size 1."""

    turns: int = 8
    """Turns that this time is split into."""

    output: Path | None = None
    """Folder that the artifacts stay in; None = none does."""

    data: str | None = None
    """Held-out images, where the training data has moved: a folder or tar shards, as in
    training/run.py; None = what the checkpoint was trained on."""

    num_parity_images: int = 128
    """Held-out images that each form is compared on, at least 64."""

    publish: bool = False
    """Write to reports/published/<date>-<device>/, and the table into docs/results.md."""

    readme: Path = Path("docs/results.md")
    """Where the table goes."""

    def __post_init__(self) -> None:
        require_positive(self, "seconds")
        require_least(self, turns=1)
        if not self.runtimes or len(set(self.runtimes)) < len(self.runtimes):
            raise ValueError(
                f"--runtimes is {' '.join(self.runtimes)}, expected at least one, each once"
            )
        _ = self.export_config

    @property
    def export_config(self) -> ExportConfig:
        """What an export is told."""
        return ExportConfig(
            checkpoint=self.checkpoint,
            batch=(1, 1, 1),
            data=self.data,
            num_parity_images=self.num_parity_images,
        )


@dataclass(frozen=True)
class QuickConfig:
    """What is exported."""

    checkpoint: Path | None = None
    """Checkpoint directory; None = the one of the newest complete run."""

    data: str | None = None
    """Images for parity, calibration and the accuracy gate: a folder or tar shards, as in
    training/run.py; None = what the checkpoint was trained on."""


@dataclass(frozen=True)
class ParityConfig(JsonFlags):
    """Settings of a comparison."""

    result_file = Path("reports/parity.json")

    artifacts: tyro.conf.Positional[tuple[Path, ...]]
    """Artifact directories."""

    checkpoint: Path | None = None
    """Checkpoint that all of them were made of; None = found under runs/ by its hash."""

    data: str | None = None
    """Held-out images, where the training data has moved: a folder or tar shards, as in
    training/run.py; None = what the checkpoint was trained on."""

    num_images: int = 128
    """Held-out images that are compared, at least 64."""

    layers: bool = False
    """Compare also layer by layer: the first step that breaks, or the artifact when none does."""

    def __post_init__(self) -> None:
        if not self.artifacts:
            raise ValueError("no artifact is named, expected e.g. artifacts/v2-s/onnxruntime-fp32")
        require_least(self, num_images=MIN_PARITY_IMAGES)
