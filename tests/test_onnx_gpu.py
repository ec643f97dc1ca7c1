"""ONNX Runtime's providers for the GPU: what can be told without one; the rest with `-m gpu`."""

import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from facts import raises_naming

from efficientnet.formats.artifact import ArtifactError, ProgramFile
from efficientnet.runtimes import onnxruntime_gpu as onnx_gpu_runtime
from efficientnet.runtimes import onnxruntime_sessions as onnx_sessions
from efficientnet.runtimes import open_runtime
from efficientnet.runtimes.onnxruntime_gpu import require_tensorrt, tensorrt_options
from efficientnet.runtimes.onnxruntime_sessions import PROVIDERS, open_session
from export import ort
from export.inputs.config import OrtConfig

HAS_GPU = torch.cuda.is_available()


def test_calls_of_one_size_have_a_fixed_shape(tiny_artifact: Path):
    def shape(batch_size: int | None) -> list[int | str]:
        session = open_session(
            ProgramFile.read(tiny_artifact / "model.onnx"),
            PROVIDERS["cpu"],
            1,
            batch_size=batch_size,
        )
        return session.get_inputs()[0].shape

    assert shape(4) == [4, 3, 32, 32]
    assert shape(None) == ["batch", 3, 32, 32]


@pytest.mark.skipif("CUDA" in str(onnxruntime.get_available_providers()), reason="it may start")
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_does_not_start_is_named_with_what_to_check(
    provider: str,
    tiny_artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    # As with a package that has it and no driver.
    monkeypatch.setattr(onnx_sessions, "require_provider", lambda _: None)
    with raises_naming(ArtifactError, PROVIDERS[provider], "CUDA"):
        open_session(ProgramFile.read(tiny_artifact / "model.onnx"), PROVIDERS[provider], 1)
    assert "Falling back" not in capfd.readouterr().out


@pytest.mark.parametrize("version", ["11.4.0.106", "9.3.0", None])
def test_another_tensorrt_than_the_providers_is_refused(
    version: str | None, monkeypatch: pytest.MonkeyPatch
):
    package = None if version is None else SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "tensorrt", package)
    with raises_naming(ArtifactError, "TensorRT 10", version or "none", "<11"):
        require_tensorrt(Path("artifact"))
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.16.1.11"))
    require_tensorrt(Path("artifact"))


def test_engines_of_each_batch_size_have_a_folder_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    folders = {tensorrt_options(tmp_path, size)["trt_engine_cache_path"] for size in (1, 16)}
    assert len(folders) == 2
    monkeypatch.setattr(os, "access", lambda *_: False)
    caplog.set_level(logging.WARNING)
    assert "trt_engine_cache_path" not in tensorrt_options(tmp_path, 1)
    assert "at each start" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
@pytest.mark.parametrize("batches", [None, (1, 4)])
def test_a_provider_answers_like_the_checkpoint_from_any_thread(
    provider, batches: tuple[int, ...] | None, tiny_checkpoint: Path, tmp_path: Path
):
    try:
        onnx_sessions.require_provider(PROVIDERS[provider])
        if provider == "tensorrt":
            onnx_gpu_runtime.require_tensorrt(tmp_path)
    except ArtifactError as error:
        pytest.skip(str(error))
    config = OrtConfig(
        tiny_checkpoint, tmp_path / "artifact", "fp16", provider=provider, batches=batches
    )
    opened = open_runtime(ort.main(config))
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 3, 32, 32)).astype(np.float32)
    expected = open_runtime(tiny_checkpoint).infer(images)
    with ThreadPoolExecutor(3) as threads:
        for num_images in (1, 3, 4, 1):
            answers = threads.map(opened.infer, [images[:num_images]] * 3)
            for found in answers:
                np.testing.assert_allclose(found, expected[:num_images], atol=0.05 * expected.std())
