"""Checkpoint -> what folding batch norm and fusing squeeze-excite bring, runtime by runtime.

    python export/ablation.py
    python export/ablation.py --runtimes onnxruntime openvino --seconds 60 --publish

Three forms of the same network: as it is written; with batch norm folded into the convolutions;
and with squeeze-excite in the form that export_onnx gives it as well. For each: latency, agreement
with the eager model, and how many nodes or kernels the runtime executes. A gain of nothing is
printed as that.

The rows of CUDA and TensorRT have not run so far, for lack of a GPU.
"""

import logging
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from efficientnet.command import parse_flags, run_command
from efficientnet.images.datasets import data_name
from efficientnet.machine.atomic import write_text
from efficientnet.machine.environment import current_environment
from efficientnet.reporting.publishing import find_section, published_directory, write_section
from export.inputs.config import ExportConfig
from export.inputs.reference import load_source
from export.studies.ablation_rows import RUNTIMES, FormRecord, RuntimeName, measure_forms
from export.studies.ablation_table import AblationRecord, fate_lines, table_of, to_markdown

SECTION = "fusion"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AblationConfig:
    """Settings of the ablation. All is computed in fp32: nothing but the graph's form differs."""

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
    """Write to reports/published/<date>-<device>/, and the table into the README."""

    readme: Path = Path("README.md")
    """Where the table goes."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"--seconds is {self.seconds:g}, expected more than 0")
        if self.turns < 1:
            raise ValueError(f"--turns is {self.turns}, expected at least 1")
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


def main(config: AblationConfig) -> AblationRecord:
    """Make and measure all forms; return the record.

    Raises:
        CheckpointError: no whole checkpoint.
        PublishError: the README has no place for the table; nothing is measured then.
        PipelineError: a measurement failed.
    """
    if config.publish:
        find_section(config.readme, SECTION)
    started_at = datetime.now(UTC)
    export_config = config.export_config
    source = load_source(export_config)
    rows: list[FormRecord] = []
    with ExitStack() as stack:
        scratch = config.output or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for number, runtime in enumerate(config.runtimes, start=1):
            log.info("[%d of %d] %s", number, len(config.runtimes), runtime)
            folder = scratch / runtime
            rows += measure_forms(
                runtime, source, export_config, config.seconds, config.turns, folder
            )
    record = AblationRecord(
        variant=source.variant,
        image_size=source.image_size,
        checkpoint_sha256=source.record.weights_sha256,
        num_parity_images=config.num_parity_images,
        data=data_name(source.dataset.source),
        seconds=config.seconds,
        environment=current_environment(),
        started_at=started_at,
        rows=tuple(rows),
    )
    log.info("%s", "\n".join([table_of(rows).aligned_text(), *fate_lines(rows)]))
    if config.publish:
        publish(record, config.readme)
    return record


def publish(record: AblationRecord, readme: Path) -> None:
    """Write the record and its text below reports/published/, and the table into the README."""
    path = published_directory(record.started_at, [record.environment]) / f"{SECTION}.json"
    text = to_markdown(record)
    write_section(readme, SECTION, text)
    write_text(path, record.model_dump_json(indent=1) + "\n")
    title = "# What folding batch norm and fusing squeeze-excite bring"
    write_text(path.with_suffix(".md"), f"{title}\n\n{text}")
    log.info("published: %s, and the table in %s", path, readme)


if __name__ == "__main__":
    run_command(lambda: parse_flags(AblationConfig, __doc__), main)
