import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from common_fixtures import TINY_PREPROCESS
from facts import raises_naming

from efficientnet.formats.checkpoint import (
    CheckpointError,
    load_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from efficientnet.network.variants import NetworkOptions


@pytest.fixture
def copy_of_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def edit_record(directory: Path, **changes: object) -> None:
    path = directory / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_checkpoint_comes_back_as_it_was_saved(tiny_checkpoint: Path, tmp_path: Path):
    model, record = load_checkpoint(tiny_checkpoint)
    again = save_checkpoint(tmp_path / "again", model.state_dict(), record, {"step": 3})
    assert again == record
    loaded, _ = load_checkpoint(tmp_path / "again")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert record.preprocess == TINY_PREPROCESS
    assert not loaded.training
    assert torch.load(tmp_path / "again" / "train_state.pt", weights_only=True) == {"step": 3}


def test_the_record_names_weights_that_everybody_may_read(tiny_checkpoint: Path):
    assert (tiny_checkpoint / "weights.safetensors").stat().st_mode & 0o044


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path):
    with raises_naming(CheckpointError, "no checkpoint.json"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ('{"model": "resnet50"}', "variant"),
        ('{"format_version": 1, "vari', "JSON"),
        ('{"format_version": 7}', "version 7"),
    ],
)
def test_a_foreign_or_truncated_record_is_refused(copy_of_checkpoint: Path, text: str, fact: str):
    path = copy_of_checkpoint / "checkpoint.json"
    path.write_text(text)
    with raises_naming(CheckpointError, path, fact):
        load_checkpoint(copy_of_checkpoint)


def test_damaged_weights_are_found_by_their_hash(copy_of_checkpoint: Path):
    weights = copy_of_checkpoint / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with raises_naming(CheckpointError, "weights.safetensors", "SHA-256"):
        load_checkpoint(copy_of_checkpoint)


@pytest.mark.parametrize("name", ["features.0.0.weight", "features.0.1.running_mean"])
def test_a_network_with_values_that_are_not_finite_is_refused_by_name(
    tiny_checkpoint: Path, tmp_path: Path, name: str
):
    model, record = load_checkpoint(tiny_checkpoint)
    model.state_dict()[name].view(-1)[0] = torch.inf
    save_checkpoint(tmp_path / "broken", model.state_dict(), record, None)
    with raises_naming(CheckpointError, name):
        load_checkpoint(tmp_path / "broken")


def test_missing_weights_mean_a_checkpoint_that_is_not_whole(copy_of_checkpoint: Path):
    (copy_of_checkpoint / "weights.safetensors").unlink()
    with raises_naming(CheckpointError, "no weights.safetensors"):
        load_checkpoint(copy_of_checkpoint)


@pytest.mark.parametrize(
    "changes",
    [
        {"variant": "v2-s"},
        {"num_classes": 11, "class_names": [str(index) for index in range(11)]},
        {"variant": "v3-x"},
    ],
)
def test_weights_of_another_network_are_refused(copy_of_checkpoint: Path, changes: dict):
    edit_record(copy_of_checkpoint, **changes)
    with raises_naming(CheckpointError, copy_of_checkpoint, changes.get("variant", "tiny")):
        load_checkpoint(copy_of_checkpoint)


def test_without_a_complete_run_the_error_says_how_to_make_one(tmp_path: Path):
    with raises_naming(CheckpointError, "python training/run.py v2-s"):
        newest_checkpoint(tmp_path)


def test_a_disk_that_fills_up_leaves_the_older_checkpoint(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, record = load_checkpoint(tiny_checkpoint)
    target = tmp_path / "checkpoint"
    save_checkpoint(target, model.state_dict(), record, {"step": 1})
    original = Path.write_bytes

    def write_bytes(path: Path, data: bytes) -> int:
        if path.name == "train_state.pt":
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with raises_naming(OSError, "No space left on device"):
        save_checkpoint(target, model.state_dict(), record, {"step": 2})
    assert torch.load(target / "train_state.pt", weights_only=True) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_preprocessing_that_was_changed_by_hand_is_found(tiny_checkpoint: Path, tmp_path: Path):
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    record = json.loads((copy / "checkpoint.json").read_text())
    assert record["preprocess_sha256"] == read_checkpoint(copy).preprocess.sha256
    record["preprocess"]["interpolation"] = "bilinear"
    (copy / "checkpoint.json").write_text(json.dumps(record))
    with raises_naming(CheckpointError, "by hand"):
        read_checkpoint(copy)


def test_a_checkpoint_from_before_padding_and_hashes_still_means_the_same(
    tiny_checkpoint: Path, tmp_path: Path
):
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    record = json.loads((copy / "checkpoint.json").read_text())
    del record["network"], record["preprocess_sha256"], record["preprocess"]["method"]
    (copy / "checkpoint.json").write_text(json.dumps(record))
    assert read_checkpoint(copy).network == NetworkOptions(padding="symmetric")
    assert read_checkpoint(copy).preprocess == read_checkpoint(tiny_checkpoint).preprocess
