import errno
import io
import json
import pickle
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import URLError

import numpy as np
import pytest
from facts import raises_naming, require_named
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import CIFAR10

from efficientnet.images.datasets import DatasetError, load_dataset
from efficientnet.images.preprocess import decode_image
from training.inputs import named_sets
from training.inputs.named_sets import NAMED_SETS, NamedSet, prepare_named_set


def picture(value: int, size: int = 8) -> Image.Image:
    return Image.fromarray(np.full((size, size, 3), value, dtype=np.uint8))


def jpeg(value: int) -> bytes:
    content = io.BytesIO()
    picture(value).save(content, "JPEG")
    return content.getvalue()


class ArraySet:
    """Like CIFAR10: images out of arrays."""

    classes = ("cat", "dog")
    times_opened = 0

    def __init__(self, root: Path, train: bool, download: bool) -> None:
        type(self).times_opened += 1
        assert download and root.is_dir()
        self._values = range(0, 14) if train else range(100, 104)

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return picture(self._values[index]), self._values[index] % 2


class FileSet:
    """Like Flowers102: images out of files, three splits."""

    classes = ("rose", "iris")

    def __init__(self, root: Path, split: str, loader: Any, download: bool) -> None:
        first = {"train": 0, "val": 50, "test": 100}[split]
        self._loader = loader
        self._files = [root / f"{value}.jpg" for value in range(first, first + 4)]
        for path in self._files:
            path.write_bytes(jpeg(int(path.stem)))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return self._loader(str(self._files[index])), int(self._files[index].stem) % 2


def table(name: str, dataset: Any) -> Mapping[str, NamedSet]:
    return {name: replace(NAMED_SETS[name], dataset=dataset)}


def test_a_set_of_arrays_becomes_shards_of_the_same_pixels(tmp_path: Path):
    folder = prepare_named_set("cifar10", tmp_path, table("cifar10", ArraySet))
    dataset = load_dataset(folder)
    assert folder == tmp_path / "cifar10"
    assert dataset.class_names == ("cat", "dog")
    assert (len(dataset.train), len(dataset.val)) == (14, 4)
    pixels = [decode_image(sample.read()) for sample in dataset.train]
    assert [np.asarray(image)[0, 0, 0] for image in pixels] == list(range(14))
    assert [sample.label for sample in dataset.train] == [i % 2 for i in range(14)]


def test_a_set_that_is_there_is_not_made_again(tmp_path: Path):
    sets = table("cifar10", ArraySet)
    prepare_named_set("cifar10", tmp_path, sets)
    before = ArraySet.times_opened
    assert prepare_named_set("cifar10", tmp_path, sets) == tmp_path / "cifar10"
    assert ArraySet.times_opened == before


def test_shards_without_their_list_of_classes_are_made_again(tmp_path: Path):
    sets = table("cifar10", ArraySet)
    folder = prepare_named_set("cifar10", tmp_path, sets)
    (folder / "classes.json").unlink()
    (folder / "train-0000.tar").write_bytes(b"half")
    assert len(load_dataset(prepare_named_set("cifar10", tmp_path, sets)).train) == 14


def test_shards_hold_as_many_images_as_they_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(named_sets, "IMAGES_PER_SHARD", 5)
    folder = prepare_named_set("cifar10", tmp_path, table("cifar10", ArraySet))
    counts: dict[str, int] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as shard:
            counts[path.name] = len(shard.getnames()) // 2
    assert counts == {
        "train-0000.tar": 5,
        "train-0001.tar": 5,
        "train-0002.tar": 4,
        "val-0000.tar": 4,
    }
    assert len({sample.read() for sample in load_dataset(folder).train}) == 14


def test_the_same_set_makes_the_same_bytes(tmp_path: Path):
    sets = table("cifar10", ArraySet)
    first, second = (prepare_named_set("cifar10", tmp_path / name, sets) for name in "ab")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_train_and_val_of_the_flowers_are_train_and_the_files_are_unchanged(tmp_path: Path):
    dataset = load_dataset(prepare_named_set("flowers102", tmp_path, table("flowers102", FileSet)))
    expected = [jpeg(value) for value in (0, 1, 2, 3, 50, 51, 52, 53)]
    assert [sample.read() for sample in dataset.train] == expected
    assert [sample.read() for sample in dataset.val] == [jpeg(v) for v in range(100, 104)]
    assert {Path(sample.name).suffix for sample in dataset.train} == {".jpg"}


def write_cars(root: Path, *missing: str) -> None:
    folder = root / "torchvision" / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    fields = [("fname", object), ("class", np.uint8)]
    for part, annotations in (
        ("cars_train", "devkit/cars_train_annos.mat"),
        ("cars_test", "cars_test_annos_withlabels.mat"),
    ):
        (folder / part).mkdir()
        rows = [(f"{index:05d}.jpg", index % 2 + 1) for index in range(4)]
        for name, label in rows:
            (folder / part / name).write_bytes(jpeg(10 * label))
        savemat(folder / annotations, {"annotations": np.array(rows, dtype=fields)})
    names = np.array(["Audi S4 2012", "Ram C/V 2012"], dtype=object)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    for name in missing:
        (folder / name).unlink()


def test_the_cars_are_read_from_torchvisions_layout(tmp_path: Path):
    write_cars(tmp_path)
    dataset = load_dataset(prepare_named_set("stanford_cars", tmp_path))
    assert dataset.class_names == ("Audi S4 2012", "Ram C/V 2012")
    assert [sample.label for sample in dataset.train] == [0, 1, 0, 1]
    assert dataset.val[1].read() == jpeg(20)


@pytest.mark.parametrize("missing", ["devkit/cars_meta.mat", "cars_test_annos_withlabels.mat"])
def test_cars_that_are_not_there_are_told_with_their_layout(tmp_path: Path, missing: str):
    write_cars(tmp_path, missing)
    layout = ("cars_train", "cars_test", "devkit/cars_meta.mat", tmp_path / "torchvision")
    with raises_naming(DatasetError, *layout):
        prepare_named_set("stanford_cars", tmp_path)
    assert not (tmp_path / "stanford_cars").exists()


def test_without_a_network_the_error_tells_what_to_bring(tmp_path: Path):
    class Unreachable(CIFAR10):
        url = "http://127.0.0.1:9/cifar-10-python.tar.gz"

    with pytest.raises(DatasetError) as raised:
        prepare_named_set("cifar10", tmp_path, table("cifar10", Unreachable))
    message = str(raised.value)
    require_named(message, "cifar10", "refused", CIFAR10.url, tmp_path / "torchvision")
    assert not (tmp_path / "cifar10").exists()


def test_an_archive_brought_by_hand_is_not_fetched(tmp_path: Path):
    class ByHand(CIFAR10):
        url = "http://127.0.0.1:9/cifar-10-python.tar.gz"
        tgz_md5 = None
        train_list = (("data_batch_1", None),)
        test_list = (("test_batch", None),)
        meta: ClassVar = {"filename": "batches.meta", "key": "label_names", "md5": None}

    images = np.arange(4 * 3072, dtype=np.uint8).reshape(4, 3072)
    batch = {"data": images, "labels": [0, 1, 1, 0]}
    (tmp_path / "torchvision").mkdir()
    with tarfile.open(tmp_path / "torchvision" / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name, content in (
            ("data_batch_1", batch),
            ("test_batch", batch),
            ("batches.meta", {"label_names": ["cat", "dog"]}),
        ):
            data = pickle.dumps(content)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    dataset = load_dataset(prepare_named_set("cifar10", tmp_path, table("cifar10", ByHand)))
    assert [sample.label for sample in dataset.train] == [0, 1, 1, 0]
    pixels = np.asarray(decode_image(dataset.val[2].read()))
    assert np.array_equal(pixels, images[2].reshape(3, 32, 32).transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (URLError("Name or service not known"), "Name or service not known"),
        (RuntimeError("File not found or corrupted."), "File not found or corrupted"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_every_way_to_fail_names_its_reason(tmp_path: Path, error: Exception, reason: str):
    def fail(**_: Any) -> None:
        raise error

    with raises_naming(DatasetError, "flowers102", reason):
        prepare_named_set("flowers102", tmp_path, table("flowers102", fail))


def test_a_full_disk_is_not_told_as_a_missing_set(tmp_path: Path):
    def fail(**_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with raises_naming(OSError, "No space left on device"):
        prepare_named_set("flowers102", tmp_path, table("flowers102", fail))


def test_a_set_that_fails_midway_leaves_no_folder(tmp_path: Path):
    class Breaking(ArraySet):
        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            if index == 3:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        prepare_named_set("cifar10", tmp_path, table("cifar10", Breaking))
    assert {path.name for path in tmp_path.iterdir()} == {"torchvision", ".cifar10.lock"}


def test_an_unknown_name_lists_the_sets(tmp_path: Path):
    with raises_naming(ValueError, "mnist", "cifar10, cifar100, flowers102"):
        prepare_named_set("mnist", tmp_path)


def unpack(root: Path, split: str) -> None:
    for synset in ("n01440764", "n01443537"):
        (root / split / synset).mkdir(parents=True)
        for index in range(2):
            (root / split / synset / f"{index}.JPEG").write_bytes(jpeg(index))


ARCHIVES = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")


def test_imagenet_is_unpacked_into_class_folders_once(tmp_path: Path):
    folder = tmp_path / "imagenet"
    folder.mkdir()
    for name in ARCHIVES:
        (folder / name).touch()
    sets = table("imagenet", unpack)
    assert prepare_named_set("imagenet", tmp_path, sets) == folder
    assert prepare_named_set("imagenet", tmp_path, sets) == folder
    dataset = load_dataset(folder)
    assert dataset.class_names == ("n01440764", "n01443537")
    assert (len(dataset.train), len(dataset.val)) == (4, 4)


def test_missing_archives_of_imagenet_are_named_with_where_to_put_them(tmp_path: Path):
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "imagenet" / ARCHIVES[1]).touch()
    with pytest.raises(DatasetError) as raised:
        prepare_named_set("imagenet", tmp_path)
    lacking, _, advice = str(raised.value).partition(": ")
    require_named(lacking, tmp_path / "imagenet", ARCHIVES[0], ARCHIVES[2])
    assert ARCHIVES[1] not in lacking
    require_named(advice, "https://image-net.org/", tmp_path / "imagenet")


def test_a_damaged_archive_of_imagenet_is_told(tmp_path: Path):
    (tmp_path / "imagenet").mkdir()
    for name in ARCHIVES:
        (tmp_path / "imagenet" / name).touch()
    with raises_naming(DatasetError, "ILSVRC2012_devkit_t12.tar.gz"):
        prepare_named_set("imagenet", tmp_path)


@pytest.mark.parametrize(
    "leftover", ["train/n01440764.tar", "val/ILSVRC2012_val_00000001.JPEG", "train"]
)
def test_an_interrupted_unpacking_of_imagenet_is_not_taken_for_whole(tmp_path: Path, leftover: str):
    path = tmp_path / "imagenet" / leftover
    path.parent.mkdir(parents=True)
    path.touch() if path.suffix else path.mkdir()
    with raises_naming(DatasetError, tmp_path / "imagenet" / Path(leftover).parts[0], "remove it"):
        prepare_named_set("imagenet", tmp_path)


def test_the_list_of_classes_is_json(tmp_path: Path):
    folder = prepare_named_set("cifar10", tmp_path, table("cifar10", ArraySet))
    assert json.loads((folder / "classes.json").read_text()) == ["cat", "dog"]
