"""Artifacts -> each step from the eager model to them compared, and the first that breaks named."""

import json
import logging
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from efficientnet.command import tell
from efficientnet.formats.artifact import (
    ArtifactError,
    ArtifactManifest,
    read_artifact,
    write_manifest,
)
from efficientnet.formats.checkpoint import RECORD_FILE, CheckpointError
from efficientnet.machine.environment import EnvironmentRecord, current_environment
from efficientnet.runtimes.protocol import open_program
from export.checks.gate import Gate, describe, is_allowed
from export.checks.logit_agreement import ParityError
from export.checks.stepwise import StepwiseParity
from export.checks.stepwise_record import StepwiseParityRecord, report_of
from export.inputs.config import ExportConfig
from export.inputs.reference import Reference, load_reference
from export.inputs.study_config import ParityConfig

FORMAT_VERSION = 2

GATE = "accuracy gate"

log = logging.getLogger(__name__)


class ParityReport(BaseModel):
    """The steps of all artifacts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    environment: EnvironmentRecord
    artifacts: tuple[StepwiseParityRecord, ...]


def main(config: ParityConfig) -> ParityReport:
    """Compare all artifacts; when one breaks, the result is written all the same."""
    # All of them before the first is compared: a wrong path is told at once.
    manifests = {path: read_artifact(path, allow_unchecked=True) for path in config.artifacts}
    checkpoints = {
        path: config.checkpoint or find_checkpoint(path, manifest.checkpoint_sha256)
        for path, manifest in manifests.items()
    }
    references: dict[tuple[Path, int], tuple[Reference, StepwiseParity]] = {}
    records: list[StepwiseParityRecord] = []
    for path, manifest in manifests.items():
        size = manifest.preprocess.image_size
        key = (checkpoints[path], size)
        if key not in references:
            reference = load_reference(
                ExportConfig(
                    checkpoint=checkpoints[path],
                    size=size,
                    data=config.data,
                    num_parity_images=config.num_images,
                ),
                images_flag="--num-images",
            )
            references[key] = reference, StepwiseParity(reference)
        reference, stepwise = references[key]
        require_made_of(reference, path, manifest)
        record = stepwise.compare(path, manifest, config.layers)
        if manifest.parity is None and record.first_broken is None:
            record = complete(reference, path, manifest, record)
        if manifest.parity is None and not record.is_completed:
            log.info("%s stays as it is: not checked, and refused", path)
        log.info("%s", report_of(record))
        records.append(record)
    report = ParityReport(environment=current_environment(), artifacts=tuple(records))
    broken = [
        f"{record.artifact} at {record.first_broken}" for record in records if record.first_broken
    ]
    if broken:
        tell(config, report)
        raise ParityError(
            f"{len(broken)} of {len(records)} artifacts do not answer like the eager model: "
            f"{'; '.join(broken)}"
        )
    return report


def find_checkpoint(artifact: Path, weights_sha256: str, runs: Path = Path("runs")) -> Path:
    """Find the checkpoint that an artifact was made of."""
    found = list(runs.rglob(RECORD_FILE))
    for record in sorted(found):
        try:
            sha256 = json.loads(record.read_text(encoding="utf-8")).get("weights_sha256")
        # Of the damaged ones there, none is asked for.
        except (ValueError, AttributeError):
            continue
        if sha256 == weights_sha256:
            return record.parent
    raise CheckpointError(
        f"{artifact} was made of weights with SHA-256 {weights_sha256[:12]}, and none of the "
        f"{len(found)} checkpoints under {runs.resolve()} has them: give it with --checkpoint"
    )


def require_made_of(reference: Reference, artifact: Path, manifest: ArtifactManifest) -> None:
    """Check that an artifact is of the checkpoint that it will be compared with."""
    if manifest.checkpoint_sha256 != reference.record.weights_sha256:
        raise ArtifactError(
            f"{artifact} was made of another checkpoint: of weights with SHA-256 "
            f"{manifest.checkpoint_sha256[:12]}, and {reference.checkpoint} has "
            f"{reference.record.weights_sha256[:12]}; give that one with --checkpoint"
        )
    if manifest.preprocess != reference.preprocess:
        raise ArtifactError(
            f"{artifact} wants its images preprocessed otherwise than {reference.checkpoint}; "
            "export the checkpoint again"
        )


def complete(
    reference: Reference, artifact: Path, manifest: ArtifactManifest, record: StepwiseParityRecord
) -> StepwiseParityRecord:
    """Write what was found into the manifest of an artifact that passed, so that all accept it.

    int8 and fp8 must pass the accuracy gate before; one that does not stays as it is.
    """
    gate = manifest.gate
    if manifest.precision in ("int8", "fp8") and gate is None:
        limits = manifest.quantization
        assert limits is not None
        checker = Gate(reference, limits.num_gate_images, limits.max_drop)
        gate = checker.measure(open_program(artifact, manifest))
        log.info("%s", describe(gate))
        if not is_allowed(gate):
            return record.model_copy(update={"gate": gate, "first_broken": GATE})
    update = {"parity": record.steps[-1].parity, "gate": gate}
    write_manifest(artifact, manifest.model_copy(update=update))
    log.info("%s was not checked before: it passed, and is accepted from now on", artifact)
    return record.model_copy(update={"gate": gate, "is_completed": True})
