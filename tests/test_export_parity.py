from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from efficientnet.artifact import ParityRecord, ParityTolerances
from efficientnet.checkpoint import load_checkpoint
from efficientnet.command import parse_flags
from efficientnet.datasets import load_dataset
from efficientnet.runtimes import ProgramInfo, Runtime, open_runtime
from export import agreement, ort
from export.agreement import (
    ParityError,
    compare_logits,
    require_parity,
    run_in_batches,
    tolerances_for,
)
from export.config import ExportConfig
from export.source import Source, choose_images, load_source
from perf.accuracy import AccuracyConfig
from perf.latency import LatencyConfig


@dataclass
class ShiftedRuntime:
    """Answers like another runtime, with something added to the logits."""

    runtime: Runtime
    shift: np.ndarray

    @property
    def info(self) -> ProgramInfo:
        return self.runtime.info

    def infer(self, images: np.ndarray) -> np.ndarray:
        return self.runtime.infer(images) + self.shift


@pytest.fixture(scope="module")
def source(tiny_checkpoint: Path) -> Source:
    return load_source(ExportConfig(checkpoint=tiny_checkpoint, num_parity_images=64))


def measure_parity(
    source: Source, runtime: Runtime, tolerances: ParityTolerances | None = None
) -> ParityRecord:
    found = run_in_batches(runtime, source.parity_images)
    tolerances = tolerances or tolerances_for("fp32", source.parity_logits)
    record = compare_logits(found, source.parity_logits, tolerances)
    require_parity(record)
    return record


def test_a_faithful_artifact_passes(source: Source, tiny_artifact: Path):
    record = measure_parity(source, open_runtime(tiny_artifact))
    assert record.num_images == 64
    assert record.top1_agreement == 1.0
    assert record.mean_abs_logit_error <= record.max_abs_logit_error <= 1e-4


@pytest.mark.parametrize("shift", [0.002, np.nan, np.inf])
def test_parity_rejects_an_artifact_above_the_tolerance(
    source: Source, tiny_artifact: Path, shift: float
):
    shifted = ShiftedRuntime(open_runtime(tiny_artifact), np.float32([shift] + [0] * 9))
    with pytest.raises(ParityError, match="refused: its largest logit error"):
        measure_parity(source, shifted)


def test_parity_rejects_another_top1_class(source: Source, tiny_artifact: Path):
    shifted = ShiftedRuntime(open_runtime(tiny_artifact), np.float32([100] + [0] * 9))
    loose = ParityTolerances(max_abs_logit_error=1e6, min_top1_agreement=1.0)
    with pytest.raises(ParityError, match="another top-1 class"):
        measure_parity(source, shifted, loose)


def test_another_top1_class_within_the_margin_is_told_and_does_not_count():
    expected = np.float32([[1.0, 0.99, 0.0], [1.0, 0.9, 0.0]])
    found = expected[:, [1, 0, 2]]
    tolerances = ParityTolerances(max_abs_logit_error=0.2, min_top1_agreement=1.0, flip_margin=0.05)
    record = compare_logits(found, expected, tolerances)
    assert record.num_flips == 2
    assert record.top1_agreement == 0.5
    with pytest.raises(ParityError, match="1 of 2 images have another top-1 class"):
        require_parity(record)


def test_tolerances_grow_with_the_logits_and_with_the_rounding():
    logits = np.float32([[0, 4], [4, 0]])
    errors = {p: tolerances_for(p, logits).max_abs_logit_error for p in ("fp32", "fp16", "bf16")}
    assert errors["fp32"] < errors["fp16"] < errors["bf16"]
    assert tolerances_for("fp16", 10 * logits).max_abs_logit_error == pytest.approx(
        10 * errors["fp16"]
    )


def test_a_refused_artifact_leaves_nothing_behind(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(agreement, "FP32_TOLERANCE", 0.0)
    output = tmp_path / "artifacts" / "onnxruntime-fp32"
    with pytest.raises(ParityError):
        ort.main(ExportConfig(checkpoint=tiny_checkpoint, output=output))
    assert list((tmp_path / "artifacts").iterdir()) == []


def test_too_few_held_out_images_are_an_error(tiny_checkpoint: Path):
    _, record = load_checkpoint(tiny_checkpoint)
    with pytest.raises(ValueError, match="there are 360 held-out images"):
        choose_images(load_dataset("digits").val, 361, record.preprocess)


def test_fewer_than_64_parity_images_cannot_be_asked_for():
    with pytest.raises(ValueError, match="expected at least 64"):
        replace(ExportConfig(), num_parity_images=63)


@pytest.mark.parametrize("config", [ExportConfig, AccuracyConfig, LatencyConfig])
def test_data_may_be_addresses_and_commands_as_in_training(config: type[Any]):
    for source in ("https://host/train-{0..9}.tar", "pipe:cat //x/./train-0.tar"):
        assert parse_flags(config, None, ["--data", source]).data == source


def test_the_eager_model_is_compared_in_evaluation_mode(tiny_checkpoint: Path):
    model, _ = load_checkpoint(tiny_checkpoint)
    assert not any(module.training for module in model.modules())
    assert all(p.dtype == torch.float32 for p in model.parameters())
