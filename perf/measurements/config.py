"""What can be set when programs are measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from efficientnet.command import JsonFlags, require_least, require_positive
from efficientnet.network.architectures import peer_of
from efficientnet.network.variants import Padding, get_variant
from perf.measurements.scenarios import (
    OFFLINE,
    SCENARIOS,
    SERVER,
    SINGLE_STREAM,
    ScenarioName,
)

MAX_CALLS = 200

Paths = tyro.conf.Positional[
    Annotated[
        tuple[Path, ...],
        tyro.conf.arg(
            help="Artifact and checkpoint directories; none = the newest complete run's checkpoint "
            "and the artifacts made of it."
        ),
    ]
]
Threads = Annotated[
    int | None, tyro.conf.arg(help="CPU threads of a call; None = one per usable core.")
]
Data = Annotated[
    str | None,
    tyro.conf.arg(
        help="Held-out images, where the training data has moved: a folder or tar shards, as in "
        "training/run.py; None = what each program was trained on."
    ),
]


def require_different_paths(paths: Sequence[Path]) -> None:
    """Raise a ValueError that names a path which is given twice, in whatever spelling."""
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise ValueError(f"{path} is given twice; name each path once")
        seen.add(path.resolve())


@dataclass(frozen=True)
class AccuracyConfig:
    """Settings of an evaluation."""

    paths: Paths = ()
    data: Data = None

    batch_size: int | None = None
    """Images per call, at least 1; None = 32, or the most that an artifact takes."""

    predictions: Path | None = None
    """File for one JSON line per image (name, label, probabilities), of one path only; None = not
    written."""

    output: Path = Path("reports/accuracy.jsonl")
    """File that the records are appended to."""

    def __post_init__(self) -> None:
        require_least(self, batch_size=1)
        if self.predictions is not None and len(self.paths) > 1:
            raise ValueError(
                f"--predictions takes the answers of one program, {len(self.paths)} paths are "
                "given; run the command once for each"
            )
        require_different_paths(self.paths)


@dataclass(frozen=True)
class LatencyConfig:
    """Settings of a measurement."""

    paths: Paths = ()

    seconds: float = 10.0
    """Measured time of each path in each scenario, without warm-up, above 0."""

    turns: int = 6
    """Turns that this time is split into, at least one a process."""

    processes: int = 3
    """Processes of each path, one after the other, that share the turns, at least 1: what one
    happens on, such as where its memory lies, is in its own turns only. The scenario server takes
    one."""

    threads: Threads = None

    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Batch sizes that are tried for offline; those an artifact does not take are left out."""

    scenarios: tuple[ScenarioName, ...] = (SINGLE_STREAM.name, OFFLINE.name)
    """What is measured of each path: one image at a time; eight (multi_stream); sixteen (batch16);
    the batch size of the most images a second (offline); the most images a second, at random times,
    of which 99 of 100 are answered within --bound-ms (server)."""

    output: Path = Path("reports/latency.jsonl")
    """File that the records are appended to."""

    data: Data = None

    bound_ms: float | None = None
    """Of the scenario server, from the planned time to the answer, above 0; None = 5 times a call
    of the slowest path."""

    def __post_init__(self) -> None:
        require_positive(self, "seconds")
        require_least(self, turns=1, processes=1, threads=1, batches=1)
        if self.turns < self.processes:
            raise ValueError(
                f"--turns is {self.turns}, fewer than --processes {self.processes}, each of which "
                "takes one at least"
            )
        if self.bound_ms is not None:
            require_positive(self, "bound_ms")
            if SERVER.name not in self.scenarios:
                raise ValueError(
                    f"--bound-ms is {self.bound_ms:g}, which is of --scenarios {SERVER.name} only; "
                    f"add {SERVER.name}, or leave it out"
                )
        different = set(self.scenarios) & SCENARIOS.keys()
        if not different or len(different) < len(self.scenarios):
            raise ValueError(
                f"--scenarios is {list(self.scenarios)}, expected different ones of "
                f"{', '.join(SCENARIOS)}"
            )
        for name in self.scenarios:
            if not SCENARIOS[name].batch_sizes(tuple(sorted(self.batches))):
                raise ValueError(
                    f"--batches is {list(self.batches)}, which has not the size that --scenarios "
                    f"{name} measures {SCENARIOS[name].where}; add it, or leave {name} out"
                )
        require_different_paths(self.paths)


@dataclass(frozen=True)
class LayersConfig(JsonFlags):
    """Settings of a measurement."""

    result_file = Path("reports/layers.json")

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Artifact directories, of ONNX Runtime on the CPU, of OpenVINO or of the native engine."""

    calls: int = 20
    """Calls that are timed after the warm-up, 1 to 200; OpenVINO's profile takes rounds of 5."""

    threads: Threads = None

    batch_size: int = 1
    """Images in a call, at least 1."""

    data: Data = None

    publish: bool = False
    """Write the native engine's layers to reports/published/<date>-<device>/, and all tables there
    into docs/results.md."""

    readme: Path = Path("docs/results.md")

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError(
                "no artifact is named, expected at least one like artifacts/v2-s/openvino-int8"
            )
        if not 1 <= self.calls <= MAX_CALLS:
            raise ValueError(f"--calls is {self.calls}, expected 1 to {MAX_CALLS}")
        require_least(self, threads=1, batch_size=1)
        require_different_paths(self.paths)


@dataclass(frozen=True)
class ScalingConfig(JsonFlags):
    """Settings of a measurement."""

    result_file = Path("reports/scaling.json")

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Artifact and checkpoint directories of one network at one size."""

    threads: tuple[int, ...] | None = None
    """Numbers of threads, at least 1; None = 1, 2, 4, ... up to the usable cores."""

    batch_size: int = 1
    """Images in a call, at least 1."""

    seconds: float = 10.0
    """Measured time of each path on each number of threads, without warm-up, above 0."""

    turns: int = 6
    """Turns that this time is split into, at least 1."""

    data: str | None = None
    """Held-out images, where the training data has moved: a folder or tar shards, as in
    training/run.py; None = what the first program was trained on."""

    publish: bool = False
    """Write to reports/published/<date>-<device>/, and table and picture into docs/results.md."""

    readme: Path = Path("docs/results.md")

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError(
                "no artifact is named, expected at least one like artifacts/v2-s/native-int8"
            )
        require_positive(self, "seconds")
        require_least(self, threads=1, batch_size=1, turns=1)
        if self.threads is not None and len(set(self.threads)) < max(1, len(self.threads)):
            raise ValueError(f"--threads is {list(self.threads)}, expected different numbers")
        require_different_paths(self.paths)


@dataclass(frozen=True)
class NetworkConfig:
    """What to compare, and for how long."""

    variants: tuple[str, ...] = ("b0", "b4", "v2-s", "v2-m")

    paddings: tuple[Padding, ...] = ("symmetric", "same")
    """timm has each network with both: efficientnet_b0 and tf_efficientnet_b0."""

    seconds: float = 15.0
    """Measured per contender and row, without warm-up."""

    turns: int = 6

    train_batch_size: int = 2

    threads: Threads = None

    output: Path = Path("reports/network.json")
    """Records; the table goes beside it as .md."""

    publish: bool = False
    """Write to reports/published/<date>-<device>/ in the place of `output`, and the table into
    docs/results.md."""

    readme: Path = Path("docs/results.md")

    def __post_init__(self) -> None:
        for name in self.variants:
            get_variant(name)
            for padding in self.paddings:
                peer_of(name, "timm", padding)
        require_positive(self, "seconds")
        require_least(self, turns=1, train_batch_size=1, threads=1)


@dataclass(frozen=True)
class PreprocessingConfig:
    """Settings of the comparison."""

    folder: tyro.conf.Positional[Path]
    """Folder of photos, with folders in it or without."""

    size: int = 224
    """Height and width of the tensor, pixels; with --checkpoint, its own."""

    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """With --checkpoint, its own."""

    crop_fraction: float | None = 0.875
    """None: squash to the square; with --checkpoint, its own."""

    checkpoint: Path | None = None
    """Checkpoint or artifact whose preprocessing is measured, and whose answers by exact and fast
    are compared; None = not used."""

    rounds: int = 5
    """Times that each contender sees each photo, at least 1."""

    output: Path = Path("reports/preprocessing.json")
    """File that is written."""

    publish: bool = False
    """Measure the preprocessing of published weights, and the checkpoint's; write to
    reports/published/<date>-<device>/ and the table into docs/results.md."""

    readme: Path = Path("docs/results.md")

    def __post_init__(self) -> None:
        require_least(self, size=1, rounds=1)
        if self.crop_fraction is not None and not 0 < self.crop_fraction <= 1:
            raise ValueError(
                f"--crop-fraction is {self.crop_fraction:g}, expected above 0, up to 1"
            )


@dataclass(frozen=True)
class ReportConfig:
    """Settings of a report."""

    latency: Path = Path("reports/latency.jsonl")
    """Records of perf/latency.py."""

    accuracy: Path = Path("reports/accuracy.jsonl")
    """Records of perf/accuracy.py."""

    layers: Path = Path("reports/layers.json")
    """Layers of the programs, of perf/layers.py; shown where the file is there."""

    history: Path | None = None
    """Folder of older records (latency.jsonl in it, or in folders of it), such as
    reports/published: times over commits, beside those of the commits in --latency; None = of the
    latter only."""

    output: Path = Path("reports")
    """Folder for report.md, report.html and the pictures."""

    publish: bool = False
    """Also copy report, picture and records to <output>/published/<date>-<device>/ and write the
    table into docs/results.md."""

    readme: Path = Path("docs/results.md")
    """File with the markers that the table is written between."""
