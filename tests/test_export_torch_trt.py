import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from facts import raises_naming

from efficientnet.formats.artifact import ArtifactError, BatchRange
from efficientnet.machine.gpu import Gpu
from efficientnet.runtimes import open_runtime
from efficientnet.runtimes.torch_tensorrt_runtime import captured_sizes
from export.builders import torch_tensorrt_builder as torch_trt
from export.builders.torch_tensorrt_builder import TorchTensorRTError, TorchTrtConfig

HAS_GPU = torch.cuda.is_available()


def artifact_for(directory: Path, like: Path, binding: dict[str, str] | None) -> Path:
    shutil.copytree(like, directory)
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"runtime": "torch-tensorrt", "binding": binding}))
    return directory


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_no_gpu_is_told_before_work_starts(tmp_path: Path):
    config = TorchTrtConfig(checkpoint=tmp_path / "missing", output=tmp_path / "artifact")
    with raises_naming(TorchTensorRTError, "no NVIDIA GPU", "export/ort.py"):
        torch_trt.main(config)
    assert not list(tmp_path.iterdir())


def test_a_v100_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch_trt.gpus, "current_gpu", lambda: Gpu("Tesla V100", "7.0"))
    with raises_naming(TorchTensorRTError, "Tesla V100", "tensorrt-cu12==10.4.0"):
        torch_trt.find_gpu("fp16")


def test_bf16_needs_compute_capability_8(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch_trt.gpus, "current_gpu", lambda: Gpu("Tesla T4", "7.5"))
    assert torch_trt.find_gpu("fp16").name == "Tesla T4"
    with raises_naming(TorchTensorRTError, "7.5", "bf16", "fp16"):
        torch_trt.find_gpu("bf16")


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch_trt, "PACKAGE", "torch_tensorrt_that_is_not_here")
    with raises_naming(TorchTensorRTError, "pip install", "torch-tensorrt"):
        torch_trt.load_package()


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_an_artifact_is_refused_without_a_gpu(tiny_artifact: Path, tmp_path: Path):
    binding = {
        "library": "torch_tensorrt",
        "version": "2.14.0",
        "compute_capability": "9.0",
        "device": "NVIDIA H100",
        "rebuild": "python export/torch_trt.py",
    }
    artifact = artifact_for(tmp_path / "artifact", tiny_artifact, binding)
    with raises_naming(ArtifactError, "NVIDIA H100", "none"):
        open_runtime(artifact)


def test_an_artifact_that_names_no_gpu_is_refused(tiny_artifact: Path, tmp_path: Path):
    artifact = artifact_for(tmp_path / "artifact", tiny_artifact, None)
    with raises_naming(ArtifactError, artifact):
        open_runtime(artifact)


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [((1, 1, 64), (1, 2, 4, 8, 16, 32, 64)), ((3, 4, 10), (3, 4, 8, 10)), ((1, 1, 1), (1,))],
)
def test_a_range_is_captured_at_its_ends_and_powers_of_two(
    batch: tuple[int, int, int], sizes: tuple[int, ...]
):
    low, opt, high = batch
    assert captured_sizes(BatchRange(min=low, opt=opt, max=high)) == sizes


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("batches", [None, (1, 4)])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_program_answers_like_the_checkpoint(
    batches: tuple[int, ...] | None, precision, tiny_checkpoint: Path, tmp_path: Path
):
    pytest.importorskip("torch_tensorrt")
    config = TorchTrtConfig(
        checkpoint=tiny_checkpoint,
        output=tmp_path / "artifact",
        precision=precision,
        batches=batches,
    )
    opened = open_runtime(torch_trt.main(config))
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 3, 32, 32)).astype(np.float32)
    expected = open_runtime(tiny_checkpoint).infer(images)
    tolerance = 1e-3 if precision == "fp32" else 0.05 * expected.std()
    for num_images in (1, 3, 4, 1):
        found = opened.infer(images[:num_images])
        np.testing.assert_allclose(found, expected[:num_images], atol=tolerance)
