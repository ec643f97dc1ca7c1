import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from common_fixtures import digits, write_tiny_checkpoint
from facts import raises_naming
from small_trainings import SMALLEST
from torch._inductor import config as inductor_config
from torch._inductor import cpp_builder

from efficientnet.formats.artifact import ArtifactError, read_artifact
from efficientnet.network.variants import Padding
from efficientnet.precision import Precision
from efficientnet.runtimes import Runtime, open_runtime
from efficientnet.runtimes.aoti_runtime import missing_extensions
from efficientnet.runtimes.cuda_graphs import cudnn_as_compiled
from export.builders import aoti_builder as aoti
from export.builders.aoti_builder import AotiConfig, AotiError
from export.checks.logit_agreement import tolerances_for

COMMAND = [sys.executable, "export/aoti.py"]

STATIC_BATCH = 4

HAS_GPU = torch.cuda.is_available()


@pytest.fixture(scope="module")
def same_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a network of a block of each kind, which compiles fast, padded SAME."""
    folder = tmp_path_factory.mktemp("same")
    return write_tiny_checkpoint(folder / "checkpoint", "same", spec=SMALLEST)


@pytest.fixture(scope="module")
def artifact(same_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # inductor splits the compiler's command line at spaces.
    output = tmp_path_factory.mktemp("aoti") / "a tiny network"
    return aoti.main(AotiConfig(checkpoint=same_checkpoint, output=output))


@pytest.fixture(scope="module")
def runtime(artifact: Path) -> Runtime:
    return open_runtime(artifact)


def copy_with_binding(artifact: Path, directory: Path, **changes: str) -> Path:
    shutil.copytree(artifact, directory)
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["binding"] |= changes
    path.write_text(json.dumps(manifest))
    return directory


def test_the_program_answers_like_the_checkpoint(runtime: Runtime, same_checkpoint: Path):
    images = digits(32)
    expected = open_runtime(same_checkpoint).infer(images)
    np.testing.assert_allclose(runtime.infer(images), expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("padding", get_args(Padding))
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_answers_like_the_checkpoint(
    tmp_path: Path, precision: Precision, padding: Padding
):
    if missing_extensions(precision) is not None:
        pytest.skip(f"this processor does not compute in {precision}")
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", padding)
    config = AotiConfig(checkpoint, tmp_path / "artifact", precision, device="cpu")
    images = digits(32)
    expected = open_runtime(checkpoint).infer(images)
    found = open_runtime(aoti.main(config)).infer(images)
    tolerances = tolerances_for(precision, expected)
    assert np.abs(found - expected).max() <= tolerances.max_abs_logit_error


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_one_program_takes_all_batch_sizes(runtime: Runtime, batch_size: int):
    logits = runtime.infer(digits(batch_size))
    assert logits.shape == (batch_size, 10) and logits.dtype == np.float32


def test_logits_belong_to_the_caller(runtime: Runtime):
    images = digits(4)
    first = runtime.infer(images)
    kept = first.copy()
    runtime.infer(images[::-1].copy())
    np.testing.assert_array_equal(first, kept)


def test_images_that_are_not_contiguous_are_read_in_their_order(runtime: Runtime):
    images = digits(4)
    np.testing.assert_array_equal(runtime.infer(images[::-1]), runtime.infer(images)[::-1])


def test_the_manifest_says_what_the_program_runs_on(artifact: Path):
    manifest = read_artifact(artifact)
    binding = manifest.binding
    assert binding is not None
    assert (binding.library, binding.version) == ("torch", torch.__version__)
    assert binding.device == torch.backends.cpu.get_cpu_capability()
    assert binding.compute_capability is None
    assert manifest.parity is not None and manifest.parity.top1_agreement == 1.0


def test_nothing_but_the_artifact_is_left(artifact: Path):
    assert {path.name for path in artifact.iterdir()} == {"model.pt2", "manifest.json", "build.log"}
    assert [path.name for path in artifact.parent.iterdir()] == [artifact.name]


def test_what_was_opened_answers_when_its_files_are_gone(artifact: Path, tmp_path: Path):
    images, copy = digits(3), Path(shutil.copytree(artifact, tmp_path / "copy"))
    opened = open_runtime(copy)
    shutil.rmtree(copy)
    np.testing.assert_array_equal(opened.infer(images), open_runtime(artifact).infer(images))


def test_what_a_package_is_unpacked_to_is_gone_while_the_program_runs(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    opened = open_runtime(artifact)
    assert not list(tmp_path.iterdir()) and os.environ["TMPDIR"] == str(tmp_path)
    assert opened.infer(digits(2)).shape == (2, 10)


def test_a_program_opens_where_tmpdir_is_no_folder(artifact: Path):
    # In a process of its own: Python looks for a folder once.
    code = f"from efficientnet.runtimes import open_runtime; open_runtime({str(artifact)!r})"
    environment = os.environ | {"TMPDIR": "/nonexistent"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_no_folder_to_unpack_to_is_told_as_such(artifact: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(**_: object) -> None:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    with raises_naming(ArtifactError, "TMPDIR"):
        open_runtime(artifact)


def test_another_torch_is_refused_with_the_command_to_run(artifact: Path, tmp_path: Path):
    other = copy_with_binding(artifact, tmp_path / "other", version="2.99.0")
    with raises_naming(ArtifactError, "2.99.0", torch.__version__, "python export/aoti.py"):
        open_runtime(other)


def test_another_instruction_set_is_refused_with_the_command_to_run(artifact: Path, tmp_path: Path):
    other = copy_with_binding(artifact, tmp_path / "other", device="AVX1024")
    with raises_naming(ArtifactError, "AVX1024", "python export/aoti.py"):
        open_runtime(other)


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_a_program_for_a_gpu_is_refused_without_one(artifact: Path, tmp_path: Path):
    other = copy_with_binding(
        artifact, tmp_path / "other", compute_capability="9.0", device="NVIDIA H100"
    )
    with raises_naming(ArtifactError, "NVIDIA H100", "none"):
        open_runtime(other)


def test_no_compiler_is_told_before_work_starts(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    # It is looked for once in a process.
    cpp_builder.cpp_compiler_search.cache_clear()
    # pytest's own way would take the setting out of torch's configuration afterwards.
    no_compiler = inductor_config.patch({"cpp.cxx": (None, "g++")})
    with no_compiler, raises_naming(AotiError, "no C++ compiler"):
        aoti.main(AotiConfig(tiny_checkpoint, tmp_path / "artifact"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_format_that_the_processor_lacks_is_refused(precision, tiny_checkpoint: Path):
    if missing_extensions(precision) is None:
        pytest.skip(f"this processor computes in {precision}")
    config = AotiConfig(checkpoint=tiny_checkpoint, precision=precision, device="cpu")
    with raises_naming(AotiError, precision, "instructions"):
        aoti.main(config)


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_no_gpu_is_told_before_work_starts(tiny_checkpoint: Path):
    with raises_naming(AotiError, "no NVIDIA GPU", "--device cpu"):
        aoti.main(AotiConfig(checkpoint=tiny_checkpoint, device="cuda"))


@pytest.mark.slow
def test_after_an_interrupted_build_nothing_is_left_and_the_next_one_works(
    tiny_checkpoint: Path, tmp_path: Path
):
    output = tmp_path / "artifact"
    flags = ["--checkpoint", str(tiny_checkpoint), "--output", str(output)]
    command = [*COMMAND, *flags, "--batches", str(STATIC_BATCH)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any(line.startswith("compile model") for line in process.stderr)
        assert list(tmp_path.iterdir()) and not output.exists()
        process.send_signal(signal.SIGINT)
        process.stderr.read()
    assert process.returncode == 130
    assert not list(tmp_path.iterdir())

    subprocess.run(command, check=True)
    assert (output / f"model-b{STATIC_BATCH}.pt2").is_file()
    images = digits(STATIC_BATCH)
    expected = open_runtime(tiny_checkpoint).infer(images)
    opened = open_runtime(output)
    for num_images in (1, 3, STATIC_BATCH):
        found = opened.infer(images[:num_images])
        np.testing.assert_allclose(found, expected[:num_images], atol=1e-4)
    with raises_naming(ValueError, 5, "1 to 4"):
        opened.infer(digits(5))


def test_cudnn_stays_on_while_a_graph_is_captured():
    for precision, uses_tf32 in (("fp32", False), ("fp16", True)):
        with cudnn_as_compiled(precision):
            assert torch.backends.cudnn.enabled
            assert torch.backends.cudnn.allow_tf32 == uses_tf32


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("batches", [None, (1, 4)])
def test_a_program_for_the_gpu_answers_like_the_checkpoint(
    batches: tuple[int, ...] | None, fused: bool, tiny_checkpoint: Path, tmp_path: Path
):
    config = AotiConfig(
        checkpoint=tiny_checkpoint,
        output=tmp_path / "artifact",
        device="cuda",
        precision="fp16",
        batches=batches,
        fused_squeeze_excite=fused,
    )
    opened = open_runtime(aoti.main(config))
    images = digits(4)
    expected = open_runtime(tiny_checkpoint).infer(images)
    for num_images in (1, 3, 4, 1):
        found = opened.infer(images[:num_images])
        np.testing.assert_allclose(found, expected[:num_images], atol=0.05 * expected.std())
