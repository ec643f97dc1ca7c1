"""What can be set when artifacts are compared."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import tyro

from efficientnet.command import JsonFlags, require_least, require_positive
from efficientnet.precision import Precision
from efficientnet.runtimes import names
from export.inputs.config import MIN_PARITY_IMAGES, ExportConfig

# Of the scripts in this folder's parent that make artifacts.
COMMANDS = tuple(dict.fromkeys(row.command for row in names.RUNTIMES.values() if row.exports))

RuntimeName = Literal[
    "onnxruntime", "openvino", "torch", "aoti", "torch-cuda", "aoti-cuda", "tensorrt"
]
RUNTIMES: tuple[RuntimeName, ...] = get_args(RuntimeName)


@dataclass(frozen=True, kw_only=True)
class PublishFlags(JsonFlags):
    """Flags of a command whose result may go into docs/results.md."""

    publish: bool = False
    """Write to reports/published/<date>-<device>/, and all tables there into docs/results.md."""

    readme: Path = Path("docs/results.md")
    """Where the table goes."""


@dataclass(frozen=True)
class AllConfig(ExportConfig, PublishFlags):
    """Settings of all exports."""

    result_file = Path("reports/exports.json")

    # Of one artifact: what is shared by all of them is what --help lists.
    precision: tyro.conf.Suppress[Precision] = "fp32"
    output: tyro.conf.Suppress[Path | None] = None

    only: tuple[str, ...] = ()
    """Commands to run, of ort ov native aoti torch_trt trt; none = all."""

    seconds: float = 4.0
    """Measured time of each artifact, in calls of the images that --batch is tuned for."""

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


@dataclass(frozen=True, kw_only=True)
class CheckpointFlags:
    """Which network is compared, and on which images."""

    checkpoint: Path | None = None
    """Checkpoint directory; None = the one of the newest complete run."""

    data: str | None = None
    """Images, where the training data has moved: a folder or tar shards, as in training/run.py;
    None = what the checkpoint was trained on."""


@dataclass(frozen=True, kw_only=True)
class MeasuredFlags(CheckpointFlags, PublishFlags):
    """Flags of a command that measures what it has made."""

    seconds: float = 10.0
    """Measured time of each program."""

    turns: int = 8
    """Turns that this time is split into."""

    num_parity_images: int = 128
    """Held-out images that each program is compared on, at least 64."""

    def __post_init__(self) -> None:
        require_positive(self, "seconds")
        require_least(self, turns=1, num_parity_images=MIN_PARITY_IMAGES)


@dataclass(frozen=True)
class StockConfig(MeasuredFlags):
    """Settings of the comparison."""

    result_file = Path("reports/stock.json")

    paths: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Our artifacts of the same checkpoint and size; none = only make the stock ones."""

    batch_sizes: tuple[int, ...] = (1,)
    """Images in a call, each measured in a run of its own; the stock artifacts get fixed shapes for
    them, and ours should have been exported with the same --batches."""

    num_calibration_images: int = 256
    """Training images that the stock tools choose the ranges of int8 by, at least 64."""

    made: bool = False
    """Take the stock artifacts that an earlier call made, for these batch sizes among others: what
    is made on a busy machine can be measured on a quiet one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_least(self, batch_sizes=1)
        if self.made and not self.paths:
            raise ValueError("--made only measures, expected artifacts of ours to measure beside")
        names = [path.name for path in self.paths]
        if len(set(names)) < len(names):
            raise ValueError(
                f"the artifacts' folders are called {', '.join(names)}, by which the table names "
                "programs; expected a name of its own for each"
            )
        _ = self.export_config

    @property
    def export_config(self) -> ExportConfig:
        """What an export is told."""
        return ExportConfig(
            checkpoint=self.checkpoint,
            batches=self.batch_sizes,
            data=self.data,
            num_parity_images=self.num_parity_images,
            num_calibration_images=self.num_calibration_images,
        )


@dataclass(frozen=True)
class AblationConfig(MeasuredFlags):
    """Settings of the ablation. All is computed in fp32: nothing but the graph's form differs."""

    result_file = Path("reports/fusion.json")

    runtimes: tuple[RuntimeName, ...] = RUNTIMES
    """What executes the forms; those that are not here get a row that says why."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runtimes or len(set(self.runtimes)) < len(self.runtimes):
            raise ValueError(
                f"--runtimes is {' '.join(self.runtimes)}, expected at least one, each once"
            )

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
class QuickConfig(CheckpointFlags):
    """What is exported."""


@dataclass(frozen=True)
class ParityConfig(CheckpointFlags, JsonFlags):
    """Settings of a comparison."""

    result_file = Path("reports/parity.json")

    artifacts: tyro.conf.Positional[tuple[Path, ...]]
    """Artifact directories. Without --checkpoint that of each is found under runs/ by its hash."""

    num_images: int = 128
    """Held-out images that are compared, at least 64."""

    layers: bool = False
    """Compare also layer by layer: the first step that breaks, or the artifact when none does."""

    def __post_init__(self) -> None:
        if not self.artifacts:
            raise ValueError("no artifact is named, expected e.g. artifacts/v2-s/onnxruntime-fp32")
        require_least(self, num_images=MIN_PARITY_IMAGES)
