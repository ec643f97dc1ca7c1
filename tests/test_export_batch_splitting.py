"""Batch sizes that are answered image by image, in streams of one thread."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from facts import raises_naming
from numpy.typing import NDArray

from efficientnet.formats.artifact import read_artifact
from efficientnet.runtimes import open_runtime
from export.builders import batch_splitting
from export.builders import onnxruntime_builder as ort_build
from export.builders import openvino_builder as ov_build
from export.checks.logit_agreement import ParityError
from export.inputs.config import OpenVinoConfig, OrtConfig
from perf.layer_times.layers import read_profiled

EXPORTS = {
    "openvino": (OpenVinoConfig, ov_build.main),
    "onnxruntime": (OrtConfig, ort_build.main),
}


@pytest.fixture(params=EXPORTS, scope="module")
def runtime(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def streamed(
    runtime: str, fitted_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An artifact that answers seven images in streams."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_splitting, "LEAST_GAIN", -1e9)  # any ratio is a gain
        folder = tmp_path_factory.mktemp("streamed")
        return export(runtime, fitted_checkpoint, folder / "artifact", (1, 7))


def export(runtime: str, checkpoint: Path, output: Path, batches: tuple[int, ...]) -> Path:
    config, export_artifact = EXPORTS[runtime]
    return export_artifact(config(checkpoint, output, batches=batches, num_parity_images=64))


def random_images(directory: Path, count: int) -> NDArray[np.float32]:
    size = read_artifact(directory).preprocess.image_size
    generator = np.random.default_rng(0)
    return generator.standard_normal((count, 3, size, size), dtype=np.float32)


def test_streams_answer_each_image_at_its_place(streamed: Path):
    assert read_artifact(streamed).streamed_batches == (7,)
    images = random_images(streamed, 7)
    opened = open_runtime(streamed, num_threads=3)
    alone = np.concatenate([opened.infer(images[i : i + 1]) for i in range(7)])
    assert np.abs(alone - alone[::-1]).max() > 0.1
    for _ in range(3):
        np.testing.assert_allclose(opened.infer(images), alone, atol=1e-4)
    assert opened.infer(images[:3]).shape == (3, alone.shape[1])


def test_what_gains_nothing_is_left_as_one_call(
    runtime: str,
    fitted_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(batch_splitting, "LEAST_GAIN", 1.0)
    caplog.set_level(logging.INFO)
    directory = export(runtime, fitted_checkpoint, tmp_path / "artifact", (1, 4))
    assert read_artifact(directory).streamed_batches == ()
    assert "batch 4, image by image in streams" in caplog.text
    assert "one call" in caplog.text and "batch 1, image by image" not in caplog.text


def test_streams_are_taken_by_the_median_of_the_turns(
    fitted_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Of each turn: the one call, then the streams; then back. One turn is disturbed.
    seconds = iter([1.0, 0.9, 0.9, 1.0, 1.0, 5.0, 0.9, 1.0, 1.0, 0.9])

    def next_seconds(*_: Any) -> float:
        return next(seconds)

    monkeypatch.setattr(batch_splitting, "seconds_of_call", next_seconds)
    directory = export("openvino", fitted_checkpoint, tmp_path / "artifact", (2,))
    assert read_artifact(directory).streamed_batches == (2,)


def test_wrong_answers_in_streams_leave_an_artifact_that_had_passed_without_them(
    fitted_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(batch_splitting, "LEAST_GAIN", -1e9)

    def refuse(_: Any, hidden: Path, __: Any) -> None:
        # The new one is not at its place before it was compared.
        assert hidden.name.startswith(".artifact.new-")
        raise ParityError("its logits are off")

    monkeypatch.setattr(batch_splitting, "check_parity", refuse)
    directory = export("openvino", fitted_checkpoint, tmp_path / "artifact", (1, 5))
    manifest = read_artifact(directory)
    assert manifest.streamed_batches == () and manifest.parity is not None
    assert "its logits are off" in (directory / "build.log").read_text()
    assert open_runtime(directory).infer(random_images(directory, 5)).shape == (5, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_layers_of_a_streamed_size_are_refused(streamed: Path):
    assert read_profiled(streamed, 1).path == streamed
    with raises_naming(ValueError, "7 images", "--batch-size 1"):
        read_profiled(streamed, 7)
