from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from efficientnet.artifact import ParityTolerances
from efficientnet.checkpoint import load_checkpoint
from efficientnet.command import parse_flags
from efficientnet.datasets import load_dataset
from efficientnet.runtimes import ProgramInfo, Runtime, open_runtime
from export import ort
from export.config import ExportConfig
from export.parity import FP32_TOLERANCES, ParityError, choose_images, measure_parity
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
def images(tiny_checkpoint: Path) -> np.ndarray:
    _, record = load_checkpoint(tiny_checkpoint)
    return choose_images(load_dataset("digits").val, 64, record.preprocess)


def test_a_faithful_artifact_passes(tiny_checkpoint: Path, tiny_artifact: Path, images: np.ndarray):
    model, _ = load_checkpoint(tiny_checkpoint)
    record = measure_parity(model, open_runtime(tiny_artifact), images, FP32_TOLERANCES)
    assert record.num_images == 64
    assert record.top1_agreement == 1.0
    assert record.mean_abs_logit_error <= record.max_abs_logit_error <= 1e-4


@pytest.mark.parametrize("shift", [0.002, np.nan, np.inf])
def test_parity_rejects_an_artifact_above_the_tolerance(
    tiny_checkpoint: Path, tiny_artifact: Path, images: np.ndarray, shift: float
):
    model, _ = load_checkpoint(tiny_checkpoint)
    shifted = ShiftedRuntime(open_runtime(tiny_artifact), np.float32([shift] + [0] * 9))
    with pytest.raises(ParityError, match="refused: its largest logit error"):
        measure_parity(model, shifted, images, FP32_TOLERANCES)


def test_parity_rejects_another_top1_class(
    tiny_checkpoint: Path, tiny_artifact: Path, images: np.ndarray
):
    model, _ = load_checkpoint(tiny_checkpoint)
    shifted = ShiftedRuntime(open_runtime(tiny_artifact), np.float32([100] + [0] * 9))
    loose = ParityTolerances(max_abs_logit_error=1e6, min_top1_agreement=1.0)
    with pytest.raises(ParityError, match="another top-1 class"):
        measure_parity(model, shifted, images, loose)


def test_a_refused_artifact_leaves_nothing_behind(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    strict = ParityTolerances(max_abs_logit_error=0.0, min_top1_agreement=1.0)
    monkeypatch.setattr(ort, "FP32_TOLERANCES", strict)
    output = tmp_path / "artifacts" / "onnxruntime-fp32"
    with pytest.raises(ParityError):
        ort.main(ExportConfig(checkpoint=tiny_checkpoint, output=output))
    assert list((tmp_path / "artifacts").iterdir()) == []


def test_too_few_held_out_images_are_an_error(images: np.ndarray, tiny_checkpoint: Path):
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
