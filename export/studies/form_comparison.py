"""Checkpoint -> what folding batch norm and fusing squeeze-excite bring, runtime by runtime."""

import logging
import tempfile
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from efficientnet.images.datasets import data_name
from efficientnet.machine.environment import current_environment
from efficientnet.reporting.publishing import find_section, publish_record
from export.inputs.reference import load_reference
from export.inputs.study_config import AblationConfig
from export.studies.ablation_rows import FormRecord, measure_forms
from export.studies.ablation_table import AblationRecord, fused_part_lines, table_of, to_markdown

SECTION = "fusion"
TITLE = "What folding batch norm and fusing squeeze-excite bring"

log = logging.getLogger(__name__)


def main(config: AblationConfig) -> AblationRecord:
    """Make and measure all forms; return the record."""
    if config.publish:
        find_section(config.readme, SECTION)
    started_at = datetime.now(UTC)
    export_config = config.export_config
    reference = load_reference(export_config)
    rows: list[FormRecord] = []
    with ExitStack() as stack:
        scratch = config.output or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for number, runtime in enumerate(config.runtimes, start=1):
            log.info("[%d of %d] %s", number, len(config.runtimes), runtime)
            folder = scratch / runtime
            rows += measure_forms(
                runtime, reference, export_config, config.seconds, config.turns, folder
            )
    record = AblationRecord(
        variant=reference.variant,
        image_size=reference.image_size,
        checkpoint_sha256=reference.record.weights_sha256,
        num_parity_images=config.num_parity_images,
        data=data_name(reference.dataset.source),
        seconds=config.seconds,
        environment=current_environment(),
        started_at=started_at,
        rows=tuple(rows),
    )
    log.info("%s", "\n".join([table_of(rows).aligned_text(), *fused_part_lines(rows)]))
    if config.publish:
        publish_record(
            record, f"{SECTION}.json", config.readme, SECTION, to_markdown(record), TITLE
        )
    return record
