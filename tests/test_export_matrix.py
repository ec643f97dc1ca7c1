"""Every runtime that runs here in every precision, on networks that know something."""

import errno
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import openvino as ov
import pytest
from facts import raises_naming
from processes import fork, wait_until

from efficientnet.formats.artifact import ArtifactError, read_artifact
from efficientnet.machine.atomic import sha256_of_file
from efficientnet.machine.processor import has_vnni
from efficientnet.network.variants import Padding
from efficientnet.runtimes import open_runtime
from export import ort
from export import ov as openvino_export
from export.builders import onnxruntime_builder as ort_build
from export.builders import openvino_builder as ov_build
from export.checks.logit_agreement import compare_logits, require_parity, tolerances_for
from export.inputs.config import ExportConfig, OpenVinoConfig, OrtConfig
from export.inputs.reference import Reference, load_reference

CAPABILITIES = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")

SMALL = {"num_parity_images": 64, "num_calibration_images": 64, "batch": (1, 1, 16)}

# 360 held-out digits: one of them is 0.28 points.
MAX_DROP = 1.2


@pytest.fixture(scope="module")
def references(fitted_checkpoints: dict[Padding, Path]) -> dict[Padding, Reference]:
    return {
        padding: load_reference(ExportConfig(checkpoint=checkpoint, num_parity_images=128))
        for padding, checkpoint in fitted_checkpoints.items()
    }


@pytest.fixture(scope="module")
def reference(references: dict[Padding, Reference]) -> Reference:
    return references["same"]


def export(kind: str, checkpoint: Path, output: Path, precision: str) -> Path:
    if kind == "onnxruntime":
        return ort.main(
            OrtConfig(checkpoint, output, precision, max_drop=MAX_DROP, **SMALL)  # type: ignore
        )
    return openvino_export.main(
        OpenVinoConfig(checkpoint, output, precision, max_drop=MAX_DROP, **SMALL)  # type: ignore
    )


Make = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def made(fitted_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Artifacts by runtime and precision, each exported once; tests change copies of them."""
    folder = tmp_path_factory.mktemp("artifacts")

    @cache
    def make(kind: str, precision: str) -> Path:
        return export(kind, fitted_checkpoint, folder / f"{kind}-{precision}", precision)

    return make


MATRIX = [
    ("onnxruntime", "fp32"),
    ("onnxruntime", "fp16"),
    ("onnxruntime", "int8"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "fp16"),
    ("openvino", "int8"),
]


# Padding is of the graph, the same in all precisions; of int8 it also has ranges.
@pytest.mark.parametrize(
    ("kind", "precision", "padding"),
    [(*one, "same") for one in MATRIX] + [(*one, "symmetric") for one in MATRIX if "int8" in one],
)
def test_an_artifact_answers_like_the_network(
    references: dict[Padding, Reference],
    made: Make,
    tmp_path: Path,
    kind: str,
    precision: str,
    padding: Padding,
):
    reference = references[padding]
    if kind == "openvino" and precision != "int8" and precision.upper() not in CAPABILITIES:
        with raises_naming(ArtifactError, precision, "this processor"):
            export(kind, reference.checkpoint, tmp_path / "artifact", precision)
        assert not list(tmp_path.iterdir())
        return
    if padding == "same":
        artifact = made(kind, precision)
    else:
        artifact = export(kind, reference.checkpoint, tmp_path / "artifact", precision)
    manifest = read_artifact(artifact)
    assert (manifest.runtime, manifest.precision) == (kind, precision)
    logits = open_runtime(artifact).infer(reference.parity_images[:16])
    record = compare_logits(
        logits,
        reference.parity_logits[:16],
        tolerances_for(manifest.precision, reference.parity_logits),
    )
    assert record.top1_agreement >= 0.9 and np.isfinite(logits).all()
    if precision in ("int8",):
        assert manifest.gate is not None and manifest.quantization is not None
        assert manifest.gate.num_images == 360
        assert manifest.gate.drop <= MAX_DROP / 100
        assert json.loads((artifact / "calibration.json").read_text())["num_images"] == 64
    else:
        assert manifest.gate is None
    # A batch size that nothing was prepared for, and the largest.
    for size in (3, 16):
        more = open_runtime(artifact).infer(reference.parity_images[:size])
        np.testing.assert_allclose(more[0], logits[0], atol=0.05 * float(logits.std()) + 1e-4)
    with raises_naming(ValueError, 17, "1 to 16"):
        open_runtime(artifact).infer(reference.parity_images[:17])


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_the_onnx_files_load_in_other_tools(made: Make, reference: Reference, precision: str):
    artifact = made("onnxruntime", precision)
    onnx.checker.check_model(onnx.load(artifact / "model.onnx"), full_check=True)
    model = ov.Core().read_model(artifact / "model.onnx")
    compiled = ov.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    (logits,) = compiled([reference.parity_images]).values()
    # Others fuse otherwise, and round at other places: not more than ours may.
    expected = reference.parity_logits
    require_parity(compare_logits(logits, expected, tolerances_for(precision, expected)))


@pytest.mark.parametrize("batches", [(1,), (1, 8)])
def test_int8_is_judged_in_batches_that_the_program_takes(
    fitted_checkpoint: Path, tmp_path: Path, batches: tuple[int, ...]
):
    small = {name: value for name, value in SMALL.items() if name != "batch"}
    config = OrtConfig(
        fitted_checkpoint,
        tmp_path / "a",
        "int8",
        batches=batches,
        max_drop=MAX_DROP,
        **small,  # type: ignore
    )
    manifest = read_artifact(ort.main(config))
    assert manifest.input.batch.max == max(batches) and manifest.input.batch.opt == batches[0]
    assert manifest.gate is not None and manifest.gate.num_images == 360


def test_programs_of_two_precisions_of_the_same_weights_have_two_hashes(made: Make, tmp_path: Path):
    graph = ov_build.read_fused(onnx.load(made("onnxruntime", "fp32") / "model.onnx"))
    found: set[str] = set()
    for precision in ("fp32", "bf16", "fp16"):
        (tmp_path / precision).mkdir()
        ov_build.save(graph, tmp_path / precision, precision)
        found.add(sha256_of_file(tmp_path / precision / "model.xml"))
    assert len(found) == 3


def test_a_full_disk_is_told_as_such_where_openvino_does_not(
    made: Make, fitted_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    artifact = shutil.copytree(made("openvino", "fp32"), tmp_path / "artifact")
    before = read_artifact(artifact)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("iostream error")

    monkeypatch.setattr(ov, "save_model", fail)
    for free, code in ((0, errno.ENOSPC), (10**12, errno.EIO)):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        with raises_naming(OSError, "iostream error") as caught:
            export("openvino", fitted_checkpoint, artifact, "fp32")
        assert caught.value.errno == code
    assert read_artifact(artifact) == before
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_any_size_from_32_pixels_can_be_exported(fitted_checkpoint: Path, tmp_path: Path):
    size = 33
    config = OrtConfig(fitted_checkpoint, tmp_path / "a", size=size, **SMALL)  # type: ignore
    manifest = read_artifact(ort.main(config))
    assert manifest.input.shape == (3, size, size)
    assert manifest.preprocess.image_size == size


NO_GPU_PACKAGE = pytest.mark.skipif(
    "CUDA" in str(onnxruntime.get_available_providers()), reason="onnxruntime-gpu is installed"
)


@NO_GPU_PACKAGE
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_there_is_an_error_and_not_the_cpu(
    tiny_checkpoint: Path, tmp_path: Path, provider
):
    config = OrtConfig(tiny_checkpoint, tmp_path / "a", "fp16", provider=provider)
    with raises_naming(ArtifactError, "pip install onnxruntime-gpu"):
        ort.main(config)
    assert not list(tmp_path.iterdir())


@NO_GPU_PACKAGE
def test_an_artifact_for_another_provider_is_refused(tiny_artifact: Path, tmp_path: Path):
    copy = shutil.copytree(tiny_artifact, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["provider"] = "CUDAExecutionProvider"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with raises_naming(ArtifactError, "no CUDAExecutionProvider"):
        open_runtime(copy)


@pytest.mark.skipif(has_vnni(), reason="this processor has VNNI")
def test_weights_for_vnni_are_refused_without_it(tiny_artifact: Path, tmp_path: Path):
    copy = shutil.copytree(tiny_artifact, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["binding"] = {
        "library": "onnxruntime",
        "version": "",
        "compute_capability": None,
        "device": "VNNI",
        "rebuild": "python export/ort.py --precision int8",
    }
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with raises_naming(ArtifactError, "VNNI", "python export/ort.py --precision int8"):
        open_runtime(copy)


def test_a_lost_or_damaged_weights_file_is_found(made: Make, tmp_path: Path):
    artifact = shutil.copytree(made("openvino", "fp32"), tmp_path / "artifact")
    weights = artifact / "model.bin"
    data = bytearray(weights.read_bytes())
    data[100] ^= 1
    weights.write_bytes(data)
    with raises_naming(ArtifactError, weights, "SHA-256"):
        open_runtime(artifact)
    weights.unlink()
    with raises_naming(ArtifactError, "no program model.bin"):
        open_runtime(artifact)


def test_a_killed_export_leaves_the_older_artifact_whole(
    tiny_checkpoint: Path, tiny_artifact: Path, tmp_path: Path
):
    output = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    config = OrtConfig(tiny_checkpoint, output, num_parity_images=64)
    before = read_artifact(output).build
    export = fork(ort_build.main, config)
    assert wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 60)  # in the middle of the work
    export.kill()
    export.join()
    assert read_artifact(output).build == before
    ort.main(config)
    assert read_artifact(output).build != before
    # Nor does what was half built stay for ever.
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]
