from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from facts import raises_naming

from efficientnet.command import parse_flags
from efficientnet.formats.artifact import ParityRecord, ParityTolerances
from efficientnet.formats.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from efficientnet.precision import Precision
from efficientnet.runtimes import ProgramInfo, Runtime, open_runtime
from export import ort
from export.builders import onnxruntime_builder as ort_build
from export.checks import logit_agreement
from export.checks.logit_agreement import (
    ParityError,
    compare_logits,
    require_parity,
    run_in_batches,
    tolerances_for,
)
from export.inputs.config import ExportConfig, OrtConfig
from export.inputs.reference import Reference, load_reference
from perf.measurements.accuracy import AccuracyConfig
from perf.measurements.latency import LatencyConfig


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
def reference(tiny_checkpoint: Path) -> Reference:
    return load_reference(ExportConfig(checkpoint=tiny_checkpoint, num_parity_images=64))


def measure_parity(
    reference: Reference, runtime: Runtime, tolerances: ParityTolerances | None = None
) -> ParityRecord:
    found = run_in_batches(runtime, reference.parity_images, reference.parity_logits)
    tolerances = tolerances or tolerances_for("fp32", reference.parity_logits)
    record = compare_logits(found, reference.parity_logits, tolerances)
    require_parity(record)
    return record


def test_a_faithful_artifact_passes(reference: Reference, tiny_artifact: Path):
    record = measure_parity(reference, open_runtime(tiny_artifact))
    assert record.num_images == 64
    assert record.top1_agreement == 1.0
    assert record.mean_abs_logit_error <= record.max_abs_logit_error <= 1e-4


@pytest.mark.parametrize("shift", [0.002, np.nan, np.inf])
def test_parity_rejects_an_artifact_above_the_tolerance(
    reference: Reference, tiny_artifact: Path, shift: float
):
    shifted = ShiftedRuntime(open_runtime(tiny_artifact), np.float32([shift] + [0] * 9))
    with raises_naming(ParityError, "logit error"):
        measure_parity(reference, shifted)


def test_parity_rejects_another_top1_class(reference: Reference, tiny_artifact: Path):
    shifted = ShiftedRuntime(open_runtime(tiny_artifact), np.float32([100] + [0] * 9))
    loose = ParityTolerances(max_abs_logit_error=1e6, min_top1_agreement=1.0)
    with raises_naming(ParityError, "top-1"):
        measure_parity(reference, shifted, loose)


def test_another_top1_class_within_the_margin_is_told_and_does_not_count():
    expected = np.float32([[1.0, 0.99, 0.0], [1.0, 0.9, 0.0]])
    found = expected[:, [1, 0, 2]]
    tolerances = ParityTolerances(max_abs_logit_error=0.2, min_top1_agreement=1.0, flip_margin=0.05)
    record = compare_logits(found, expected, tolerances)
    assert record.num_flips == 2
    assert record.top1_agreement == 0.5
    with raises_naming(ParityError, "1 of 2", "top-1"):
        require_parity(record)


def test_tolerances_grow_with_the_logits_and_with_the_rounding():
    logits = np.float32([[0, 4], [4, 0]])
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8")
    errors = [tolerances_for(p, logits).max_abs_logit_error for p in precisions]
    assert errors == sorted(set(errors))
    assert errors[0] <= 1e-3 * logits.std()
    for precision, error in zip(precisions, errors, strict=True):
        small = tolerances_for(precision, 0.01 * logits)
        assert small.max_abs_logit_error == pytest.approx(0.01 * error)


def test_of_a_thousand_classes_the_logit_of_the_right_one_may_be_off_by_more_than_the_others():
    # As of ImageNet networks: up to 14 deviations high. bf16's rounding has put one off by 0.65.
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((64, 1000)).astype(np.float32)
    logits[np.arange(64), rng.integers(1000, size=64)] = 11.0
    tolerances = tolerances_for("bf16", logits)
    found = np.where(logits == 11.0, logits - 0.6, logits + 0.03)
    require_parity(compare_logits(found, logits, tolerances))
    assert tolerances.flip_margin < 0.3
    with raises_naming(ParityError, "2.00e-01"):
        require_parity(compare_logits(logits + 0.2, logits, tolerances))


def test_a_refused_artifact_leaves_nothing_behind(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(logit_agreement.RELATIVE_TOLERANCE, "fp32", 0.0)
    output = tmp_path / "artifacts" / "onnxruntime-fp32"
    with pytest.raises(ParityError):
        ort.main(OrtConfig(checkpoint=tiny_checkpoint, output=output))
    assert list((tmp_path / "artifacts").iterdir()) == []


def test_an_eager_network_that_answers_with_infinity_is_named_before_anything_is_built(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, record = load_checkpoint(tiny_checkpoint)
    # All its values are finite, and it is not.
    model.classifier[1].weight.data.fill_(3e38)
    save_checkpoint(tmp_path / "checkpoint", model.state_dict(), record, None)
    monkeypatch.setattr(ort_build, "typed_graph", lambda *_: pytest.fail("it was built"))
    config = OrtConfig(checkpoint=tmp_path / "checkpoint", output=tmp_path / "artifacts" / "a")
    with raises_naming(CheckpointError, config.checkpoint, "before any export"):
        ort.main(config)
    assert not list((tmp_path / "artifacts").glob("*"))


def test_too_few_held_out_images_are_an_error(tiny_checkpoint: Path):
    config = ExportConfig(checkpoint=tiny_checkpoint, num_parity_images=361)
    for flag in ("--num-parity-images", "--num-images"):
        with raises_naming(ValueError, 360, flag):
            load_reference(config, flag)


@dataclass
class CountingRuntime:
    """Notes the sizes of its batches, and answers one of them otherwise."""

    runtime: Runtime
    wrong_size: int | None
    max_batch_size: int | None = None
    sizes: list[int] = field(default_factory=list)

    @property
    def info(self) -> ProgramInfo:
        return replace(self.runtime.info, max_batch_size=self.max_batch_size)

    def infer(self, images: np.ndarray) -> np.ndarray:
        self.sizes.append(len(images))
        return self.runtime.infer(images) + (len(images) == self.wrong_size)


@pytest.mark.parametrize("wrong_size", [1, 2, 16, 50])
def test_every_prepared_size_is_compared_in_full_and_one_that_is_not(
    reference: Reference, tiny_artifact: Path, wrong_size: int
):
    # 40 images are too few for the largest size.
    runtime = CountingRuntime(open_runtime(tiny_artifact), wrong_size)
    expected = reference.parity_logits[:40]
    found = run_in_batches(runtime, reference.parity_images[:40], expected, (50,))
    assert {1, 2, 16, 50} <= set(runtime.sizes)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() > 0.9


def test_no_batch_is_larger_than_the_program_takes(reference: Reference, tiny_artifact: Path):
    runtime = CountingRuntime(open_runtime(tiny_artifact), None, max_batch_size=1)
    found = run_in_batches(runtime, reference.parity_images, reference.parity_logits)
    assert runtime.sizes == [1] * 64
    np.testing.assert_allclose(found, reference.parity_logits, atol=1e-4)


def test_int8_logits_of_another_size_are_refused(reference: Reference):
    tolerances = tolerances_for("int8", reference.parity_logits)
    # The classes are all the same.
    record = compare_logits(3 * reference.parity_logits, reference.parity_logits, tolerances)
    assert record.top1_agreement == 1.0
    with raises_naming(ParityError, "on average"):
        require_parity(record)


def test_logits_of_an_artifact_for_time_only_need_only_be_finite(reference: Reference):
    expected = reference.parity_logits
    tolerances = tolerances_for("int8", expected, is_for_time_only=True)
    require_parity(compare_logits(-100 * expected, expected, tolerances))
    with raises_naming(ParityError, "largest"):
        require_parity(compare_logits(np.full_like(expected, np.nan), expected, tolerances))


@pytest.mark.parametrize("config", [ExportConfig, AccuracyConfig, LatencyConfig])
def test_data_may_be_addresses_and_commands_as_in_training(config: type[Any]):
    for source in ("https://host/train-{0..9}.tar", "pipe:cat //x/./train-0.tar"):
        assert parse_flags(config, None, ["--data", source]).data == source
