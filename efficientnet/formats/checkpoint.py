"""A trained network on disk: weights.safetensors and checkpoint.json, and what resuming needs.

runs/<recipe>-<UTC time>/checkpoint/
    weights.safetensors   the weights to deploy (the moving average), float32
    checkpoint.json       CheckpointRecord
    train_state.pt        what training needs to go on; nothing else reads it
"""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load, save

from efficientnet.errors import PipelineError, first_problem, require_names, require_version
from efficientnet.images.preprocess_spec import PreprocessSpec, require_sha256
from efficientnet.machine.atomic import (
    dangling_link_hint,
    replaced_directory,
    sha256_of_file,
    write_text,
)
from efficientnet.machine.environment import EnvironmentRecord
from efficientnet.network.model import EfficientNet, build_model
from efficientnet.network.variants import NetworkOptions, VariantSpec, spec_of

FORMAT_VERSION = 1
RECORD_FILE = "checkpoint.json"
WEIGHTS_FILE = "weights.safetensors"
TRAIN_STATE_FILE = "train_state.pt"


class CheckpointError(PipelineError):
    """A checkpoint that is missing, damaged, or of another format."""


class CheckpointRecord(BaseModel):
    """checkpoint.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    variant: str
    architecture: VariantSpec | None = None
    """The table of stages of a variant that is not built in; None = it is."""
    num_classes: int = Field(ge=2)
    class_names: tuple[str, ...]
    """In the order of the logits."""
    network: NetworkOptions = NetworkOptions()
    """Padding and batch norm that these weights are used with."""
    preprocess: PreprocessSpec
    """What evaluation did, and every user of the weights must do."""
    preprocess_sha256: str = ""
    """Of `preprocess`, so that a change by hand is found; filled in when it is written."""
    data: str
    """What the network was trained on: `digits` or a folder; parity and accuracy take its val
    images."""
    weights_sha256: str = ""
    """Filled in when it is written."""
    epoch: int = 0
    """Epochs that were trained."""
    step: int = 0
    """Optimizer steps that were trained."""
    top1: float | None = Field(default=None, ge=0, le=1)
    top5: float | None = Field(default=None, ge=0, le=1)
    """Of the weights on held-out images; None when it was not evaluated."""
    num_images_evaluated: int = 0
    recipe: str
    train_config: dict[str, Any] = {}
    """For provenance only; nothing reads it but a resumed training."""
    environment: EnvironmentRecord

    @property
    def spec(self) -> VariantSpec:
        """The table of stages; a ValueError if there is no such variant."""
        return spec_of(self.variant, self.architecture)

    @model_validator(mode="after")
    def _check_preprocess(self) -> Self:
        require_sha256(self.preprocess, self.preprocess_sha256)
        return self

    @model_validator(mode="after")
    def _check_class_names(self) -> Self:
        require_names(self.class_names, self.num_classes)
        return self


def save_checkpoint(
    directory: Path,
    weights: dict[str, torch.Tensor],
    record: CheckpointRecord,
    train_state: dict[str, Any] | None,
) -> CheckpointRecord:
    """Write a checkpoint in the place of an older one; return its record with the hashes filled in.

    `weights` have the names of model.py and are written in float32; `train_state` holds tensors and
    plain values only, so that weights_only loading takes it.
    """
    with replaced_directory(directory) as fresh:
        tensors = {
            name: (t.float() if t.is_floating_point() else t).detach().cpu().contiguous()
            for name, t in weights.items()
        }
        # Not safetensors' save_file, which makes files that only their owner can read.
        (fresh / WEIGHTS_FILE).write_bytes(save(tensors))
        if train_state is not None:
            # Through memory: on a full disk torch's own writer raises no OSError.
            buffer = io.BytesIO()
            torch.save(train_state, buffer)
            (fresh / TRAIN_STATE_FILE).write_bytes(buffer.getbuffer())
        hashes = {
            "weights_sha256": sha256_of_file(fresh / WEIGHTS_FILE),
            "preprocess_sha256": record.preprocess.sha256,
        }
        record = record.model_copy(update=hashes)
        write_text(fresh / RECORD_FILE, record.model_dump_json(indent=2) + "\n")
    return record


def read_checkpoint(directory: Path) -> CheckpointRecord:
    """Read checkpoint.json and check that the weights are the ones it speaks of.

    Raises:
        CheckpointError: no checkpoint there, another format, or damaged.
    """
    return _read(directory)[0]


def _read(directory: Path) -> tuple[CheckpointRecord, bytes]:
    # The weights are read once: what was checked is what is loaded.
    path = directory / RECORD_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{directory} is not a checkpoint: there is no {RECORD_FILE} in it; "
            "expected a directory like runs/<recipe>-<time>/checkpoint"
            f"{dangling_link_hint(directory)}"
        )
    text = path.read_text(encoding="utf-8", errors="replace")
    advice = "train again, or use the version of the project that wrote it"
    require_version(text, FORMAT_VERSION, path, advice, CheckpointError)
    try:
        record = CheckpointRecord.model_validate_json(text)
    except ValidationError as error:
        raise CheckpointError(f"{path} is damaged or not ours: {first_problem(error)}") from None
    weights_path = directory / WEIGHTS_FILE
    if not weights_path.is_file():
        raise CheckpointError(f"{directory} has no {WEIGHTS_FILE}: the checkpoint is not whole")
    weights = weights_path.read_bytes()
    found_sha256 = hashlib.sha256(weights).hexdigest()
    if found_sha256 != record.weights_sha256:
        raise CheckpointError(
            f"{weights_path} is damaged: its SHA-256 is {found_sha256[:12]}, "
            f"{RECORD_FILE} says {record.weights_sha256[:12]}; copy or train the checkpoint again"
        )
    return record, weights


def load_checkpoint(directory: Path) -> tuple[EfficientNet, CheckpointRecord]:
    """Build the checkpoint's network with its weights, float32, on the CPU, in evaluation mode.

    Raises:
        CheckpointError: see read_checkpoint; or the weights are not those of the variant, or some
            are not finite.
    """
    record, weights = _read(directory)
    try:
        # Built without memory and then given the file's tensors: no time goes into initial weights.
        with torch.device("meta"):
            model = build_model(record.spec, record.num_classes, options=record.network)
        model.load_state_dict(load(weights), assign=True)
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{directory} does not hold a {record.variant}: {error}") from None
    broken = first_not_finite(model.state_dict())
    if broken is not None:
        raise CheckpointError(
            f"{directory} holds a network that is broken itself: {broken} has values that are NaN "
            "or infinite; take an earlier checkpoint of the run, or train again with a lower "
            "--optimizer.learning-rate"
        )
    return model.eval(), record


def first_not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name of the first tensor with NaN or infinite values; waits for the device."""
    floats = {name: t.detach() for name, t in tensors.items() if t.is_floating_point()}
    are_finite = torch.stack([tensor.isfinite().all() for tensor in floats.values()]).tolist()
    return next((n for n, is_finite in zip(floats, are_finite, strict=True) if not is_finite), None)


def newest_checkpoint(runs: Path = Path("runs")) -> Path:
    """Return the checkpoint of the newest complete run."""
    latest = runs / "latest"
    if not latest.exists():
        raise CheckpointError(
            f"no complete run under {runs.resolve()}: train one with "
            "'python training/run.py v2-s', or name a checkpoint directory"
            f"{dangling_link_hint(latest)}"
        )
    return latest.resolve() / "checkpoint"
