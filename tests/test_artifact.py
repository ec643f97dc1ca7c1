import json
import shutil
from pathlib import Path

import pytest
from facts import raises_naming

from efficientnet.formats.artifact import ArtifactError, new_artifact_directory, read_artifact
from efficientnet.formats.checkpoint import CheckpointError
from efficientnet.runtimes import open_runtime


@pytest.fixture
def copy_of_artifact(tiny_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))


def edit_manifest(directory: Path, **changes: object) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_manifest_tells_what_the_artifact_is(tiny_artifact: Path):
    manifest = read_artifact(tiny_artifact)
    assert (manifest.variant, manifest.runtime, manifest.precision) == (
        "tiny",
        "onnxruntime",
        "fp32",
    )
    assert manifest.class_names == tuple("0123456789")
    assert manifest.input.shape == (3, 32, 32) and manifest.output.shape == (10,)
    assert manifest.parity.num_images >= 64
    assert manifest.size_bytes == (tiny_artifact / "model.onnx").stat().st_size
    assert {path.name for path in tiny_artifact.iterdir()} == {
        "build.log",
        "manifest.json",
        "model.onnx",
    }


def test_a_damaged_program_is_found_by_its_hash(copy_of_artifact: Path):
    program = copy_of_artifact / "model.onnx"
    program.write_bytes(program.read_bytes()[:-10])
    with raises_naming(ArtifactError, "model.onnx", "SHA-256"):
        open_runtime(copy_of_artifact)


def test_a_missing_program_is_named(copy_of_artifact: Path):
    (copy_of_artifact / "model.onnx").unlink()
    with raises_naming(ArtifactError, "no program model.onnx"):
        open_runtime(copy_of_artifact)


def test_a_program_outside_the_artifact_is_refused(copy_of_artifact: Path):
    edit_manifest(copy_of_artifact, program_file="../artifact/model.onnx")
    with raises_naming(ArtifactError, "../artifact/model.onnx"):
        open_runtime(copy_of_artifact)


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("{}", ("variant",)),
        ("", ("JSON",)),
        ('{"format_version": 99}', ("version 99", 1)),
    ],
)
def test_a_foreign_manifest_is_refused(copy_of_artifact: Path, text: str, facts: tuple):
    (copy_of_artifact / "manifest.json").write_text(text)
    with raises_naming(ArtifactError, copy_of_artifact, *facts):
        open_runtime(copy_of_artifact)


@pytest.mark.parametrize("names", [["a", "b", "c"], [str(index) for index in range(11)]])
def test_names_that_are_not_as_many_as_the_outputs_are_refused(
    copy_of_artifact: Path, tiny_checkpoint: Path, tmp_path: Path, names: list[str]
):
    edit_manifest(copy_of_artifact, class_names=names)
    with raises_naming(ArtifactError, len(names), 10):
        open_runtime(copy_of_artifact)
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    record = json.loads((checkpoint / "checkpoint.json").read_text())
    (checkpoint / "checkpoint.json").write_text(json.dumps({**record, "class_names": names}))
    with raises_naming(CheckpointError, len(names), 10):
        open_runtime(checkpoint)


def test_a_runtime_that_is_not_known_is_named(copy_of_artifact: Path):
    edit_manifest(copy_of_artifact, runtime="abacus")
    with raises_naming(ArtifactError, "abacus"):
        open_runtime(copy_of_artifact)


@pytest.mark.parametrize("manifest", [None, '{"name": "a web page"}'])
def test_what_is_not_an_artifact_is_not_replaced_by_one(tmp_path: Path, manifest: str | None):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_text("dear to me")
    if manifest is not None:
        (photos / "manifest.json").write_text(manifest)
    with (
        raises_naming(ArtifactError, photos, "manifest.json", "--output"),
        new_artifact_directory(photos),
    ):
        pytest.fail("it was built all the same")
    assert (photos / "a.jpg").read_text() == "dear to me"


def test_an_artifact_an_empty_directory_and_nothing_are_replaced(
    copy_of_artifact: Path, tmp_path: Path
):
    (tmp_path / "empty").mkdir()
    for place in (copy_of_artifact, tmp_path / "empty", tmp_path / "nothing"):
        with new_artifact_directory(place) as fresh:
            (fresh / "manifest.json").write_text("{}")
        assert [path.name for path in place.iterdir()] == ["manifest.json"]


def test_a_link_is_not_replaced_by_an_artifact(copy_of_artifact: Path, tmp_path: Path):
    link = tmp_path / "default"
    link.symlink_to(copy_of_artifact)
    with (
        raises_naming(ArtifactError, link, "link", "--output"),
        new_artifact_directory(link),
    ):
        pytest.fail("it was built all the same")


def test_an_artifact_without_a_manifest_is_not_written(tmp_path: Path):
    with pytest.raises(ArtifactError), new_artifact_directory(tmp_path / "a") as directory:
        (directory / "model.onnx").write_bytes(b"half")
    assert list(tmp_path.iterdir()) == []
