from pathlib import Path
from typing import Any

import numpy as np
import pytest
from facts import raises_naming
from PIL import Image
from timm.data import ImageNetInfo
from torchvision.models import EfficientNet_B0_Weights

from efficientnet.images.datasets import (
    IMAGENET_CLASSES,
    Dataset,
    DatasetError,
    Sample,
    data_name,
    hold_out,
    load_dataset,
    load_held_out,
    sha256_of_samples,
    without_broken_images,
)
from efficientnet.images.preprocess import decode_image
from efficientnet.images.sample_images import digit_images, sample_photos


def fill(folder: Path, num_images: int, value: int = 100) -> None:
    folder.mkdir(parents=True)
    for index in range(num_images):
        pixels = np.full((8, 8), (value + index) % 256, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03d}.png")


def test_digits_are_split_stratified_into_1437_and_360():
    dataset = load_dataset("digits")
    assert (len(dataset.train), len(dataset.val)) == (1437, 360)
    assert dataset.class_names == tuple("0123456789")
    counts = np.bincount([sample.label for sample in dataset.val])
    assert counts.min() >= 35 and counts.max() <= 37
    assert not {s.name for s in dataset.train} & {s.name for s in dataset.val}


def test_digits_are_the_same_in_every_process():
    dataset = load_dataset("digits")
    assert sha256_of_samples(dataset.val) == (
        "8069c09c70d5712c69aa3bd8a1f4747a90ee0008cd02d8362a30758e02d5d845"
    )


def test_a_folder_of_classes_is_split_the_same_way_each_time(tmp_path: Path):
    fill(tmp_path / "cat", 10)
    fill(tmp_path / "dog", 20)
    first, second = load_dataset(tmp_path), load_dataset(tmp_path)
    assert first == second
    assert first.class_names == ("cat", "dog")
    assert [sum(s.label == k for s in first.val) for k in (0, 1)] == [2, 4]
    assert (len(first.train), len(first.val)) == (24, 6)


def test_a_folder_with_train_and_val_is_taken_as_it_is(tmp_path: Path):
    for part, num in (("train", 3), ("val", 1)):
        fill(tmp_path / part / "a", num)
        fill(tmp_path / part / "b", num)
    dataset = load_dataset(tmp_path)
    assert (len(dataset.train), len(dataset.val)) == (6, 2)
    names = {sample.name for sample in (*dataset.train, *dataset.val)}
    assert len(names) == 8 and {"train/a/000.png", "val/a/000.png"} <= names


@pytest.mark.parametrize(("sizes", "num_val"), [((2, 7, 4, 7), 4), ((2, 7, 4, 8), 5)])
def test_a_fifth_is_rounded_up_but_not_because_floats_were_added(
    sizes: tuple[int, ...], num_val: int
):
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    samples = tuple(Sample(str(index), label, b"") for index, label in enumerate(labels))
    held = hold_out(Dataset("", ("a", "b", "c", "d"), samples, ()), 0.2)
    assert len(held.val) == num_val


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (None, "digits"),
        ("digits", "digits"),
        ("/somewhere/pets/", "pets"),
        ("/data/{train-{000..099},val-{0..4}}.tar", "{train-{000..099},val-{0..4}}.tar"),
        ("/somewhere/{ann/train-0,bob/train-1}.tar", "train-0.tar"),
        ("https://ann:secret@host/x/train-{0..9}.tar?key=secret", "train-{0..9}.tar"),
        ("https://host/{a.tar?key=secret,b.tar?key=secret}", "a.tar"),
        ("https://host", "data"),
        ("pipe:aws s3 cp s3://bucket/train-{0..9}.tar - --key secret", "train-{0..9}.tar"),
        ("pipe:curl -u ann:secret https://host/data", "pipe"),
        ("/", "data"),
    ],
)
def test_the_name_of_data_tells_no_path_and_no_secret(source: str | None, name: str):
    assert data_name(source) == name


def test_the_name_of_the_folder_that_one_is_in_is_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "pets").mkdir()
    monkeypatch.chdir(tmp_path / "pets")
    assert data_name(".") == "pets" and data_name("..") == tmp_path.name


def test_an_empty_class_folder_is_named(tmp_path: Path):
    fill(tmp_path / "cat", 3)
    (tmp_path / "dog").mkdir()
    with raises_naming(DatasetError, tmp_path / "dog"):
        load_dataset(tmp_path)


def test_one_class_only_is_an_error(tmp_path: Path):
    fill(tmp_path / "cat", 3)
    with raises_naming(DatasetError, "two class", "cat"):
        load_dataset(tmp_path)


def test_a_class_that_only_val_has_is_an_error(tmp_path: Path):
    write_classes(tmp_path / "train", "cat", "dog")
    write_classes(tmp_path / "val", "cat", "fox")
    with raises_naming(DatasetError, "only val", "fox"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("is_there_but_empty", [False, True])
def test_held_out_folders_may_lack_classes_which_are_named_and_shift_no_label(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_there_but_empty: bool
):
    write_classes(tmp_path / "train", "ape", "cat", "dog")
    write_classes(tmp_path / "val", "dog")
    if is_there_but_empty:
        (tmp_path / "val" / "ape").mkdir()
    dataset = load_dataset(tmp_path)
    assert dataset.class_names == ("ape", "cat", "dog")
    assert {s.label for s in dataset.val} == {2}
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "ape; cat" in record.getMessage()


def test_held_out_folders_without_any_image_are_an_error(tmp_path: Path):
    write_classes(tmp_path / "train", "cat", "dog")
    (tmp_path / "val" / "cat").mkdir(parents=True)
    with raises_naming(DatasetError, tmp_path / "val"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("folders", "taken"),
    [
        (("valid",), "valid"),
        (("validation",), "validation"),
        (("test",), "test"),
        (("test", "validation"), "validation"),
        (("test", "valid", "validation"), "valid"),
        (("test", "val"), "val"),
    ],
)
def test_what_other_tools_call_val_is_taken_in_a_fixed_order_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, folders: tuple[str, ...], taken: str
):
    caplog.set_level("INFO")
    for name in ("train", *folders):
        write_classes(tmp_path / name, "cat", "dog")
    assert {Path(s.name).parts[0] for s in load_dataset(tmp_path).val} == {taken}
    (said,) = caplog.messages
    assert str(tmp_path / taken) in said
    assert all(name in said for name in folders)


@pytest.mark.parametrize("parts", [("",), ("train", "val")])
def test_hidden_images_count_nowhere_and_the_log_says_how_many(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, parts: tuple[str, ...]
):
    caplog.set_level("INFO")
    for part in parts:
        write_classes(tmp_path / part, "cat", "dog")
    last = tmp_path / parts[-1]
    for hidden in (
        last / "cat" / ".ipynb_checkpoints",
        last / "cat" / "pictures" / ".thumbs" / "small",
        last / ".cache",
        last / "__MACOSX" / "cat",
        last / "dog" / "__MACOSX",
    ):
        fill(hidden, 2)
    (last / "dog" / "._000.png").write_bytes(b"of a Mac")
    (last / "dog" / ".DS_Store").write_bytes(b"of a Mac")
    dataset = load_dataset(tmp_path)
    assert len(dataset.train) + len(dataset.val) == 10 * len(parts)
    assert dataset.class_names == ("cat", "dog")
    assert [message for message in caplog.messages if "hidden" in message] == [
        f"passed over 11 hidden images under {last}"
    ]


def test_a_folder_below_a_hidden_one_is_read(tmp_path: Path):
    data = write_classes(tmp_path / ".cache" / "pets", "cat", "dog")
    assert len(load_dataset(data).train) == 8


def test_train_without_val_is_an_error(tmp_path: Path):
    fill(tmp_path / "train" / "cat", 2)
    fill(tmp_path / "train" / "dog", 2)
    with raises_naming(DatasetError, "no 'val'"):
        load_dataset(tmp_path)


def test_one_broken_image_in_more_than_a_hundred_is_named_and_left_out(tmp_path: Path):
    fill(tmp_path / "cat", 60)
    fill(tmp_path / "dog", 60)
    (tmp_path / "cat" / "007.png").write_bytes(b"not a picture")
    dataset = without_broken_images(load_dataset(tmp_path))
    assert len(dataset.train) + len(dataset.val) == 119
    assert len(dataset.broken) == 1 and dataset.broken[0].startswith("cat/007.png: ")


def test_one_percent_of_broken_images_is_an_error(tmp_path: Path):
    fill(tmp_path / "cat", 60)
    fill(tmp_path / "dog", 60)
    for name in ("007.png", "008.png"):
        (tmp_path / "cat" / name).write_bytes((tmp_path / "cat" / name).read_bytes()[:40])
    with raises_naming(DatasetError, "2 of 120", "cat/007.png"):
        without_broken_images(load_dataset(tmp_path))


def test_a_class_that_loses_all_its_images_is_an_error(tmp_path: Path):
    for part in ("train", "val"):
        fill(tmp_path / part / "cat", 150)
        fill(tmp_path / part / "dog", 1 if part == "val" else 5)
    (tmp_path / "val" / "dog" / "000.png").write_bytes(b"")
    with raises_naming(DatasetError, "dog", "val"):
        without_broken_images(load_dataset(tmp_path))


def test_a_missing_source_lists_all_that_are_accepted(tmp_path: Path):
    accepted = ("digits", "sample-photos", "train/", "val/", "*.tar", "https:", "pipe:")
    with raises_naming(FileNotFoundError, *accepted):
        load_dataset(tmp_path / "nowhere")


def test_a_part_of_train_held_out_is_stratified_and_the_same_each_time():
    dataset = load_dataset("digits")
    first, second = hold_out(dataset, 0.1), hold_out(dataset, 0.1)
    assert first == second
    assert (len(first.train), len(first.val)) == (1293, 144)
    counts = np.bincount([sample.label for sample in first.val])
    assert counts.min() >= 14 and counts.max() <= 15
    # Nothing comes from val.
    names = sorted(sample.name for sample in (*first.train, *first.val))
    assert names == sorted(sample.name for sample in dataset.train)


def test_a_small_part_has_an_image_of_each_class(tmp_path: Path):
    for part in ("train", "val"):
        fill(tmp_path / part / "cat", 2)
        fill(tmp_path / part / "dog", 30)
    held = hold_out(load_dataset(tmp_path), 0.05)
    assert [sum(s.label == k for s in held.val) for k in (0, 1)] == [1, 1]


def test_no_class_is_held_out_whole(tmp_path: Path):
    fill(tmp_path / "rare", 2)
    for index in range(4):
        fill(tmp_path / f"class{index}", 11)
    dataset = load_dataset(tmp_path)
    assert {sample.label for sample in dataset.train} == set(range(5))
    assert len(dataset.val) == 10


@pytest.mark.parametrize("fraction", [0, -0.1, 0.51, 1, float("nan")])
def test_a_fraction_outside_its_limits_is_refused(fraction: float):
    with raises_naming(ValueError, "0.5"):
        hold_out(load_dataset("digits"), fraction)


def test_a_class_with_one_train_image_cannot_be_held_out(tmp_path: Path):
    for part in ("train", "val"):
        fill(tmp_path / part / "cat", 1)
        fill(tmp_path / part / "dog", 5)
    with raises_naming(DatasetError, "cat", "one", "two"):
        hold_out(load_dataset(tmp_path), 0.2)


def test_nothing_can_be_held_out_without_train_images():
    with raises_naming(DatasetError, "sample-photos", "no train images"):
        hold_out(load_dataset("sample-photos"), 0.1)


def write_classes(folder: Path, *names: str) -> Path:
    for index, name in enumerate(names):
        fill(folder / name, 5, 10 * index)
    return folder


def test_digits_and_sample_photos_are_what_scikit_learn_loads():
    from sklearn.datasets import load_digits, load_sample_images  # takes over a second

    digits: Any = load_digits()
    names, images = digit_images()
    assert names == tuple(map(str, digits.target_names))
    assert [label for _, label, _ in images] == digits.target.tolist()
    pixels = np.stack([np.asarray(decode_image(png).convert("L")) for *_, png in images])
    assert np.array_equal(pixels, np.round(digits.images * (255 / 16)))
    photos: Any = load_sample_images()
    assert all(map(np.array_equal, sample_photos(), photos.images))


def test_sample_photos_are_photographs_without_labels_and_always_the_same():
    dataset = load_dataset("sample-photos")
    assert (len(dataset.train), len(dataset.val), dataset.class_names) == (0, 128, ())
    assert len({sample.read() for sample in dataset.val}) == 128
    sizes = [decode_image(sample.read()).size for sample in dataset.val]
    assert min(min(size) for size in sizes) >= 160 and max(max(size) for size in sizes) <= 640
    assert sha256_of_samples(dataset.val) == sha256_of_samples(load_dataset("sample-photos").val)


def test_images_without_labels_serve_any_network_but_no_accuracy():
    dataset = load_held_out("sample-photos", None, ("cat", "dog"))
    assert len(dataset.val) == 128 and dataset.class_names == ("cat", "dog")
    with raises_naming(DatasetError, "no labels", "--data"):
        load_held_out("sample-photos", None, ("cat", "dog"), needs_labels=True)


def test_labels_of_some_classes_count_in_those_of_the_network(tmp_path: Path):
    data = write_classes(tmp_path, "cat", "zebra")
    dataset = load_held_out("digits", data, ("zebra", "ape", "cat"))
    assert dataset.class_names == ("zebra", "ape", "cat")
    assert {s.label for s in dataset.val if s.name.startswith("cat")} == {2}
    assert {s.label for s in dataset.val if s.name.startswith("zebra")} == {0}
    assert {s.label for s in dataset.train} == {0, 2}


def test_folders_of_imagenet_may_have_wordnets_numbers(tmp_path: Path):
    names = tuple(line.split(" ", 1)[1] for line in IMAGENET_CLASSES.read_text().splitlines())
    data = write_classes(tmp_path, "n01440764", "n02012849")
    dataset = load_held_out("sample-photos", data, names, needs_labels=True)
    assert {names[s.label] for s in dataset.val} == {"tench", "crane bird"}
    # A network that was trained elsewhere has seen none of the images.
    assert len(dataset.val) == 10 and not dataset.train


def test_a_folder_that_is_no_class_of_the_network_is_an_error(tmp_path: Path):
    data = write_classes(tmp_path, "cat", "unicorn")
    with raises_naming(DatasetError, "cat, unicorn", "cat, dog"):
        load_held_out("digits", data, ("cat", "dog"))


def test_the_imagenet_classes_are_those_of_torchvision_and_timm():
    lines = [line.split(" ", 1) for line in IMAGENET_CLASSES.read_text().splitlines()]
    assert [name for _, name in lines] == EfficientNet_B0_Weights.DEFAULT.meta["categories"]
    timms = ImageNetInfo()
    assert [synset for synset, _ in lines] == [timms.index_to_label_name(i) for i in range(1000)]


def test_files_that_begin_with_wordnets_numbers_are_labelled_by_them(tmp_path: Path):
    for name in ("n01443537_goldfish.JPEG", "n01440764_tench.JPEG", "n01440764_2.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name, "JPEG")
    names = ("tench", "goldfish", "great white shark")
    found = load_held_out("sample-photos", tmp_path, names, needs_labels=True)
    assert [(s.name, s.label) for s in found.val] == [
        ("n01440764_2.jpg", 0),
        ("n01440764_tench.JPEG", 0),
        ("n01443537_goldfish.JPEG", 1),
    ]
    Image.new("RGB", (4, 4)).save(tmp_path / "other.jpg")
    with raises_naming(DatasetError, tmp_path, "two class"):
        load_held_out("sample-photos", tmp_path, names)
