import io
import json
import os
import pickle
import shlex
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Generator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch
from facts import raises_naming, require_named
from PIL import Image

from efficientnet.images import fetching
from efficientnet.images.brace_expansion import expand_braces
from efficientnet.images.datasets import (
    Dataset,
    DatasetError,
    data_name,
    load_dataset,
    load_held_out,
    sha256_of_samples,
    without_broken_images,
)
from efficientnet.images.shards import is_shard_source, split_image_key, with_image_key
from efficientnet.images.tar_index import TarMember
from serving.demo import choose_picture
from training.inputs.training_data import load_training_data
from training.learning.distributed import Ranks
from training.run import parse


def png(value: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.full((8, 8), value % 256, dtype=np.uint8)).save(content, "PNG")
    return content.getvalue()


def write_tar(path: Path, files: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pairs(first: int, num: int, num_classes: int = 2) -> list[tuple[str, bytes]]:
    files: list[tuple[str, bytes]] = []
    for index in range(first, first + num):
        files.append((f"{index:06d}.png", png(index)))
        files.append((f"{index:06d}.cls", str(index % num_classes).encode()))
    return files


def write_set(folder: Path, train: int = 2, val: int = 0, images: int = 10) -> Path:
    for part, num in (("train", train), ("val", val)):
        for number in range(num):
            first = number * images + 100 * (part == "val")
            write_tar(folder / f"{part}-{number:04d}.tar", pairs(first, images))
    return folder


def images_of(dataset: Dataset) -> Counter[bytes]:
    return Counter(sample.read() for sample in (*dataset.train, *dataset.val))


def test_every_image_of_the_shards_comes_once_with_its_label(tmp_path: Path):
    write_set(tmp_path, train=3, val=1)
    dataset = load_dataset(tmp_path)
    assert (len(dataset.train), len(dataset.val)) == (30, 10)
    assert images_of(dataset) == Counter(png(i) for i in [*range(30), *range(100, 110)])
    assert all(s.label == int(Path(s.name).stem) % 2 for s in (*dataset.train, *dataset.val))
    assert dataset.class_names == ("0", "1")
    assert dataset.train[10].name == "train-0001.tar/000010.png"


def test_shards_without_val_are_split_within_each_class_the_same_way_each_time(tmp_path: Path):
    write_set(tmp_path, train=3)
    first, second = load_dataset(tmp_path), load_dataset(tmp_path)
    assert first == second
    assert (len(first.train), len(first.val)) == (24, 6)
    assert Counter(sample.label for sample in first.val) == {0: 3, 1: 3}
    assert images_of(first) == Counter(png(i) for i in range(30))


def test_a_folder_a_glob_and_a_brace_pattern_give_the_same(tmp_path: Path):
    write_set(tmp_path, train=3, val=2)
    folder = load_dataset(tmp_path)
    glob = load_dataset(f"{tmp_path}/*.tar")
    braces = load_dataset(f"{tmp_path}/{{val-{{0000..0001}},train-{{0000..0002}}}}.tar")
    assert folder.train == glob.train == braces.train
    assert folder.val == glob.val == braces.val


def test_a_shard_that_a_pattern_names_twice_is_taken_once(tmp_path: Path):
    write_set(tmp_path, train=2)
    dataset = load_dataset(f"{tmp_path}/{{train-0001,*}}.tar")
    assert images_of(dataset) == Counter(png(i) for i in range(20))


def test_shards_of_one_name_in_two_folders_are_both_taken(tmp_path: Path):
    write_tar(tmp_path / "a" / "0.tar", pairs(0, 6))
    write_tar(tmp_path / "b" / "0.tar", pairs(10, 6))
    dataset = load_dataset(f"{tmp_path}/{{a,b}}/0.tar")
    names = {sample.name for sample in (*dataset.train, *dataset.val)}
    assert len(names) == 12 and {"a/0.tar/000000.png", "b/0.tar/000010.png"} <= names


@pytest.mark.parametrize("as_pattern", [False, True])
def test_the_source_of_a_dataset_gives_the_same_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_pattern: bool
):
    write_set(tmp_path / "data", train=2)
    monkeypatch.chdir(tmp_path)
    dataset = load_dataset("data/train-{0000..0001}.tar" if as_pattern else "data")
    monkeypatch.chdir("/")
    assert load_dataset(dataset.source) == dataset


def test_a_folder_with_tars_and_class_folders_is_read_as_folders(tmp_path: Path):
    write_tar(tmp_path / "archive.tar", pairs(0, 4))
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(2):
            (tmp_path / name / f"{index}.png").write_bytes(png(index))
    assert load_dataset(tmp_path).class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("name", "is_val"),
    [
        ("val-0000.tar", True),
        ("imagenet1k-validation-00.tar", True),
        ("VALID_3.tar", True),
        ("my.test.tar", True),
        ("cifar10val.tar", True),
        ("interval-0000.tar", False),
        ("latest-0001.tar", False),
        ("contest.tar", False),
    ],
)
def test_val_is_a_word_of_its_own_in_the_name(tmp_path: Path, name: str, is_val: bool):
    write_tar(tmp_path / "train-0.tar", pairs(0, 10))
    write_tar(tmp_path / name, pairs(50, 7))
    dataset = load_dataset(tmp_path)
    assert (len(dataset.val) == 7) == is_val


@pytest.mark.parametrize(
    ("parent", "folders"), [("data", ("train", "val")), ("test-data", ("a", "Validation"))]
)
def test_shards_in_a_folder_for_val_are_held_out_but_not_for_a_common_one(
    tmp_path: Path, parent: str, folders: tuple[str, str]
):
    write_tar(tmp_path / parent / folders[0] / "0.tar", pairs(0, 10))
    write_tar(tmp_path / parent / folders[1] / "0.tar", pairs(50, 7))
    dataset = load_dataset(f"{tmp_path / parent}/*/0.tar")
    assert (len(dataset.train), len(dataset.val)) == (10, 7)


def test_val_shards_alone_are_refused_for_training_but_serve_published_weights(tmp_path: Path):
    write_set(tmp_path, train=0, val=2)
    with raises_naming(DatasetError, "validation"):
        load_dataset(tmp_path)
    dataset = load_held_out("sample-photos", tmp_path, ("0", "1"), needs_labels=True)
    assert (len(dataset.train), len(dataset.val)) == (0, 20)


def test_class_names_come_from_the_list_beside_the_shards(tmp_path: Path):
    write_set(tmp_path)
    (tmp_path / "classes.json").write_text('["cat", "dog", "fox"]')
    assert load_dataset(tmp_path).class_names == ("cat", "dog", "fox")


def test_shards_without_a_list_of_classes_are_told_where_it_is_looked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write_set(tmp_path)
    load_dataset(tmp_path)
    require_named(caplog.text, f"{tmp_path}/classes.json", "0 to 1")
    caplog.clear()
    (tmp_path / "classes.json").write_text('["cat", "dog"]')
    load_dataset(tmp_path)
    assert not caplog.records


@pytest.mark.parametrize("label", [("x.cls", b"7"), ("x.txt", b"cow")])
def test_a_label_outside_the_list_of_classes_is_named(tmp_path: Path, label: tuple[str, bytes]):
    write_tar(tmp_path / "train-0.tar", [*pairs(0, 4), ("x.jpg", png(9)), label])
    (tmp_path / "classes.json").write_text('["cat", "dog"]')
    with raises_naming(DatasetError, "train-0.tar", "x.jpg", label[1].decode(), 2):
        load_dataset(tmp_path)


@pytest.mark.parametrize("text", ['{"a": 1}', '["cat", 3]', '["cat", "cat"]', "cat"])
def test_a_list_of_classes_that_is_none_is_an_error(tmp_path: Path, text: str):
    write_set(tmp_path)
    (tmp_path / "classes.json").write_text(text)
    with raises_naming(DatasetError, "classes.json"):
        load_dataset(tmp_path)


def test_one_class_only_is_an_error(tmp_path: Path):
    write_tar(tmp_path / "train-0.tar", pairs(0, 4, num_classes=1))
    with raises_naming(DatasetError, "one class", "two"):
        load_dataset(tmp_path)


def test_cls_wins_over_json_and_other_files_are_ignored(tmp_path: Path):
    files = [
        ("a.json", b'{"label": 0, "caption": "x"}'),
        ("a.PNG", png(1)),
        ("a.cls", b" 1\n"),
        ("a.seg.png", b"a mask"),
        ("b.txt", b"words"),
        ("b.json", b'{"label": 0}'),
        ("b.png", png(2)),
        ("info.json", b'{"about": "the shard"}'),
        ("README", b""),
        ("._a.png", b"of a Mac"),
    ]
    write_tar(tmp_path / "train-0.tar", [*files, *pairs(0, 8)])
    dataset = load_dataset(tmp_path)
    labels = {Path(s.name).name: s.label for s in (*dataset.train, *dataset.val)}
    assert (labels["a.PNG"], labels["b.png"], len(labels)) == (1, 0, 10)


def views(first: int, num: int) -> list[tuple[str, bytes]]:
    return [
        file
        for index in range(first, first + num)
        for file in (
            (f"{index}.left.png", png(index)),
            (f"{index}.RIGHT.PNG", png(index + 100)),
            (f"{index}.cls", str(index % 2).encode()),
        )
    ]


@pytest.mark.parametrize(("image_key", "first"), [("left.png", 0), ("right.png", 100)])
def test_of_several_images_of_a_key_one_is_chosen_and_the_source_gives_it_again(
    tmp_path: Path, image_key: str, first: int
):
    write_tar(tmp_path / "train-0.tar", views(0, 6))
    dataset = load_dataset(with_image_key(str(tmp_path), image_key))
    assert images_of(dataset) == Counter(png(first + i) for i in range(6))
    assert load_dataset(dataset.source) == dataset
    assert data_name(dataset.source) == tmp_path.name
    pattern = load_dataset(f"{tmp_path}/train-{{0..0}}.tar#{image_key}")
    assert (pattern.train, pattern.val) == (dataset.train, dataset.val)


def test_training_takes_the_chosen_image_and_a_checkpoint_names_it(tmp_path: Path):
    write_tar(tmp_path / "train-0.tar", views(0, 6))
    recipe = parse(["tiny", "--data", str(tmp_path), "--image-key", "right.png"])
    dataset = load_training_data(recipe, Ranks(0, 1, torch.device("cpu")), left_out=None)
    assert images_of(dataset) == Counter(png(100 + i) for i in range(6))
    assert load_held_out(dataset.source, None, ("0", "1")).val == dataset.val


def test_an_image_key_that_no_image_has_is_told_with_those_there_are(tmp_path: Path):
    write_tar(tmp_path / "train-0.tar", views(0, 6))
    with raises_naming(DatasetError, "top.png", 2, "left.png, right.png"):
        load_dataset(f"{tmp_path}#top.png")


def test_an_image_key_needs_shards_and_the_end_of_an_images_name(tmp_path: Path):
    write_set(tmp_path / "shards")
    with raises_naming(DatasetError, "left"):
        with_image_key(str(tmp_path / "shards"), "left")
    (tmp_path / "cat").mkdir()
    with raises_naming(DatasetError, "left.png", tmp_path):
        with_image_key(str(tmp_path), "left.png")


def test_a_number_sign_in_a_folders_name_is_no_image_key(tmp_path: Path):
    write_set(tmp_path / "shards#left.png")
    assert len(load_dataset(tmp_path / "shards#left.png").train) == 16
    assert split_image_key("/data/c#/train.tar") == ("/data/c#/train.tar", None)
    assert split_image_key("pipe:cat x.tar#png") == ("pipe:cat x.tar", "png")


@pytest.mark.parametrize("extension", ["cls", "txt", "json"])
@pytest.mark.parametrize("classes", [None, '["fox", "dog", "cat"]'])
def test_a_label_may_be_a_class_name(tmp_path: Path, extension: str, classes: str | None):
    names = ["dog", "cat"]
    files: list[tuple[str, bytes]] = []
    for index in range(10):
        name = names[index % 2]
        text = json.dumps({"label": name}) if extension == "json" else f"{name}\n"
        files += [(f"{index}.png", png(index)), (f"{index}.{extension}", text.encode())]
    write_tar(tmp_path / "train-0.tar", files)
    if classes:
        (tmp_path / "classes.json").write_text(classes)
    dataset = load_dataset(tmp_path)
    assert dataset.class_names == (("fox", "dog", "cat") if classes else ("cat", "dog"))
    for sample in (*dataset.train, *dataset.val):
        assert dataset.class_names[sample.label] == names[int(Path(sample.name).stem) % 2]


def test_a_number_in_a_txt_is_a_label_and_a_long_txt_a_caption(tmp_path: Path):
    files = [(f"{i}.png", png(i)) for i in range(8)]
    files += [(f"{i}.txt", str(i % 2).encode()) for i in range(8)]
    files += [("c.png", png(9)), ("c.txt", b"a cat on a mat " * 20), ("c.cls", b"1")]
    write_tar(tmp_path / "train-0.tar", files)
    dataset = load_dataset(tmp_path)
    assert Counter(s.label for s in (*dataset.train, *dataset.val)) == {0: 4, 1: 5}


def test_hidden_files_in_and_among_the_shards_are_passed_over_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    hidden = [
        ("._000000.png", b"of a Mac"),
        ("./.thumbs/a.png", b"a thumbnail"),
        ("__MACOSX/sub/b.png", b"x"),
        ("__MACOSX/sub/b.cls", b"1"),
        (".cache/c.json", b'{"label": 1}'),
    ]
    write_tar(tmp_path / "train-0.tar", [*hidden, *pairs(0, 10)])
    (tmp_path / "._train-0.tar").write_bytes(b"of a Mac")
    (tmp_path / "__MACOSX").mkdir()
    dataset = load_dataset(tmp_path)
    assert images_of(dataset) == Counter(png(i) for i in range(10))
    assert "passed over 3 hidden images in the shards" in caplog.messages


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("folder", ["", "./", "v1.2/klasse-ä/", "deep/" * 30])
def test_names_of_any_length_and_form_are_read(tmp_path: Path, form: int, folder: str):
    files = [(folder + name, content) for name, content in pairs(0, 10)]
    path = write_tar(tmp_path / "train-0.tar", files, form)
    dataset = load_dataset(path)
    assert {s.name for s in (*dataset.train, *dataset.val)} == {
        f"train-0.tar/{name}" for name, _ in files if name.endswith("png")
    }
    assert images_of(dataset) == Counter(png(i) for i in range(10))


def test_a_tar_made_by_the_command_is_read(tmp_path: Path):
    for name, content in pairs(0, 10):
        folder = tmp_path / "files" / "sub"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    subprocess.run(["tar", "cf", tmp_path / "t.tar", "-C", tmp_path / "files", "."], check=True)
    assert images_of(load_dataset(tmp_path / "t.tar")) == Counter(png(i) for i in range(10))


def test_sizes_beyond_octal_are_read_from_their_binary_and_pax_forms(tmp_path: Path):
    path = write_tar(tmp_path / "train-0.tar", pairs(0, 4))
    data = bytearray(path.read_bytes())
    # The same size in GNU's form, which tar writes from 8 GiB on.
    size = int(data[124:135], 8)
    data[124:136] = b"\x80" + size.to_bytes(11)
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    with tarfile.open(tmp_path / "train-1.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in pairs(10, 4):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(content), {"size": str(len(content))}
            tar.addfile(info, io.BytesIO(content))
    expected = Counter(png(i) for i in [*range(4), *range(10, 14)])
    assert images_of(load_dataset(tmp_path)) == expected


def test_a_member_survives_the_way_to_another_process(tmp_path: Path):
    write_set(tmp_path)
    sample = load_dataset(tmp_path).train[0]
    assert isinstance(sample.source, TarMember)
    assert pickle.loads(pickle.dumps(sample)).read() == sample.read()


def test_a_shard_that_became_shorter_is_told_when_it_is_read(tmp_path: Path):
    write_set(tmp_path, train=1)
    sample = load_dataset(tmp_path).train[-1]
    os.truncate(tmp_path / "train-0000.tar", 100)
    with raises_naming(DatasetError, "train-0000.tar", "replaced"):
        sample.read()


def test_val_shards_may_lack_a_class_which_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write_tar(tmp_path / "train-0.tar", pairs(0, 9, num_classes=3))
    write_tar(tmp_path / "val-0.tar", pairs(0, 4))
    (tmp_path / "classes.json").write_text('["cat", "dog", "fox"]')
    assert len(without_broken_images(load_dataset(tmp_path)).val) == 4
    require_named(caplog.text, "1 of the 3 classes", "fox")


WRONG_SHARDS: dict[str, tuple[list[tuple[str, bytes]], tuple[str, ...]]] = {
    "image without label": (
        [("000123.jpg", b"x")],
        ("train-0003.tar", "000123.jpg", "no label", "000123.cls"),
    ),
    "label without image": ([("7.cls", b"1")], ("train-0003.tar", "7.cls", "no image")),
    "json without image": ([("7.json", b'{"label": 1}')], ("7.json", "no image")),
    "name among numbers": (
        [("7.jpg", b"x"), ("7.cls", b"cat")],
        ("train-0003.tar", "7.jpg", "cat"),
    ),
    "no text": ([("7.jpg", b"x"), ("7.cls", b"\xff")], ("7.cls", r"b'\xff'")),
    "empty": ([("7.jpg", b"x"), ("7.txt", b" \n")], ("7.txt", r"b' \n'")),
    "negative": ([("7.jpg", b"x"), ("7.cls", b"-1")], ("7.cls", "b'-1'")),
    "json without label": (
        [("7.jpg", b"x"), ("7.json", b'{"l": 1}')],
        ("7.jpg", "no label", "7.json"),
    ),
    "json of a bool": ([("7.jpg", b"x"), ("7.json", b'{"label": true}')], ("7.json", "no object")),
    "same image": ([("7.jpg", b"x"), ("7.cls", b"1"), ("7.jpg", b"y")], ("key 7", "twice")),
    "two images": (
        [("7.jpg", b"x"), ("7.png", b"x")],
        ("key 7", "7.jpg", "7.png", "--image-key jpg"),
    ),
    "two views": (
        [("7.left.png", b"x"), ("7.right.png", b"x"), ("7.cls", b"1")],
        ("key 7", "2 images", "left.png", "right.png", "--image-key left.png"),
    ),
    "two labels": ([("7.jpg", b"x"), ("7.cls", b"1"), ("7.cls", b"1")], ("key 7", "twice")),
}


@pytest.mark.parametrize("case", WRONG_SHARDS)
def test_images_and_labels_that_do_not_belong_together_are_named(tmp_path: Path, case: str):
    files, facts = WRONG_SHARDS[case]
    write_tar(tmp_path / "train-0002.tar", pairs(0, 4))
    write_tar(tmp_path / "train-0003.tar", [*pairs(10, 4), *files])
    with raises_naming(DatasetError, *facts):
        load_dataset(tmp_path)


@pytest.mark.parametrize("files", [[], [("cat.0001.jpg", b"x"), ("cat.0002.jpg", b"x")]])
def test_a_shard_without_labelled_images_is_an_error(tmp_path: Path, files: list[Any]):
    write_tar(tmp_path / "train-0.tar", files)
    found = ("cat.0001.jpg",) if files else ("no files",)
    with raises_naming(DatasetError, "train-0.tar", *found):
        load_dataset(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_an_image_that_is_a_link_is_not_lost_in_silence(tmp_path: Path, kind: bytes):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        info = tarfile.TarInfo("7.jpg")
        info.type, info.linkname = kind, "8.jpg"
        tar.addfile(info)
    with raises_naming(DatasetError, "7.jpg", "link", "--dereference"):
        load_dataset(tmp_path)


def test_a_tar_cut_short_anywhere_but_at_a_block_is_an_error(tmp_path: Path):
    data = write_tar(tmp_path / "whole.tar", pairs(0, 2)).read_bytes()
    path = tmp_path / "cut.tar"
    # Within a header, within an image, in the padding behind it, and within the end's zeros.
    for size in (100, 512 + 30, 512 + len(png(0)), 512 + 500, 1024 + 10, len(data) - 100):
        path.write_bytes(data[:size])
        with raises_naming(DatasetError, "cut.tar", "cut short", f"{size} bytes"):
            load_dataset(path)


def test_a_tar_that_ends_within_an_image_at_a_block_is_an_error(tmp_path: Path):
    files = [("1.jpg", b"x" * 3000), ("1.cls", b"0")]
    path = write_tar(tmp_path / "cut.tar", files)
    os.truncate(path, 512 + 1024)
    with raises_naming(DatasetError, 1536, "1.jpg"):
        load_dataset(path)


@pytest.mark.parametrize("num_images", [2, 4])
def test_a_tar_without_its_end_mark_may_lack_images_and_is_an_error(
    tmp_path: Path, num_images: int
):
    path = write_tar(tmp_path / "open.tar", pairs(0, 4))
    os.truncate(path, num_images * 2048)
    with raises_naming(DatasetError, "open.tar", "end-of-archive"):
        load_dataset(path)


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        (b"", ("0 bytes",)),
        (b"<html>no such page</html>" * 50, ("not a tar", "b'<html>")),
        (b"\x1f\x8b" + b"z" * 1022, ("not a tar", "compressed")),
    ],
)
def test_what_is_no_tar_is_told(tmp_path: Path, content: bytes, facts: tuple[str, ...]):
    (tmp_path / "train-0.tar").write_bytes(content)
    with raises_naming(DatasetError, "train-0.tar", *facts):
        load_dataset(tmp_path)


def test_a_damaged_header_is_told(tmp_path: Path):
    path = write_tar(tmp_path / "train-0.tar", pairs(0, 4))
    data = bytearray(path.read_bytes())
    data[1024:1030] = b"\xff" * 6
    path.write_bytes(data)
    with raises_naming(DatasetError, "byte 1024"):
        load_dataset(path)


def test_images_behind_the_end_of_a_joined_tar_are_not_lost_in_silence(tmp_path: Path):
    one = write_tar(tmp_path / "one", pairs(0, 4)).read_bytes()
    two = write_tar(tmp_path / "two", pairs(4, 4)).read_bytes()
    (tmp_path / "both.tar").write_bytes(one + two)
    with raises_naming(DatasetError, "byte 8192"):
        load_dataset(tmp_path / "both.tar")


@pytest.mark.parametrize("pattern", ["*.tar", "x-{0..1}.tar", "only.tar"])
def test_a_pattern_without_shards_is_an_error(tmp_path: Path, pattern: str):
    with raises_naming(DatasetError, pattern, ".tar"):
        load_dataset(f"{tmp_path}/{pattern}")


def test_a_shard_that_a_pattern_names_and_is_not_there_is_an_error(tmp_path: Path):
    write_set(tmp_path, train=2)
    with raises_naming(DatasetError, "train-0002.tar", "1 of the 3"):
        load_dataset(f"{tmp_path}/train-{{0000..0002}}.tar")


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("a-{08..11}.tar", "a-08.tar a-09.tar a-10.tar a-11.tar"),
        ("{train-{00..01},val-{0..1}}", "train-00 train-01 val-0 val-1"),
        ("{3..1}", "3 2 1"),
        ("{0..10..5}", "0 5 10"),
        ("{a,{b,c}d}e{f,}", "aef ae bdef bde cdef cde"),
        ("{a}${a,b}{a,b", "{a}${a,b}{a,b"),
    ],
)
def test_braces_expand_as_in_bash(pattern: str, expanded: str):
    assert expand_braces(pattern) == expanded.split(" ")


@pytest.mark.parametrize(
    ("source", "is_one"),
    [
        ("https://host/{0..9}.tar", True),
        ("pipe:cat x.tar", True),
        ("nowhere/*.tar", True),
        ("nowhere/0.tar", True),
        ("nowhere", False),
    ],
)
def test_shards_are_told_from_folders(source: str, is_one: bool):
    assert is_shard_source(source) == is_one


class Server(ThreadingHTTPServer):
    folder: Path
    requests: Counter[str]
    faults: dict[str, list[str]]
    """What to do wrong, request by request, for a file."""
    delay_s = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def __init__(self, request: Any, address: Any, server: Server) -> None:
        super().__init__(request, address, server, directory=str(server.folder))

    def do_GET(self) -> None:
        name = self.path.strip("/").split("?")[0]
        self.server.requests[name] += 1
        faults = self.server.faults.get(name, [])
        fault = faults.pop(0) if faults else None
        sleep(self.server.delay_s)
        if fault == "cut":
            data = (self.server.folder / name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:700])
        elif fault:
            self.send_error(int(fault))
        else:
            super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Server]:
    monkeypatch.setenv("EFFICIENTNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fetching, "RETRY_WAIT_S", 0.01)
    with Server(("127.0.0.1", 0), Handler) as running:
        running.folder, running.requests, running.faults = tmp_path / "www", Counter(), {}
        write_set(running.folder, train=2, val=1)
        thread = Thread(target=running.serve_forever, args=(0.05,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def source_of(server: Server) -> str:
    return server.url + "/{train-{0000..0001},val-0000}.tar"


def test_shards_of_a_server_are_fetched_once_and_equal_local_ones(server: Server):
    (server.folder / "classes.json").write_text('["cat", "dog"]')
    dataset = load_dataset(source_of(server))
    again = load_dataset(dataset.source)
    local = load_dataset(server.folder)
    assert again == dataset and dataset.source == source_of(server)
    assert [s.name for s in dataset.train] == [s.name for s in local.train]
    assert sha256_of_samples(dataset.train) == sha256_of_samples(local.train)
    assert dataset.class_names == ("cat", "dog")
    assert set(server.requests.values()) == {1} and len(server.requests) == 4


@pytest.mark.parametrize("status", ["404", "403"])
def test_a_server_need_not_have_a_list_of_classes_and_is_asked_once(server: Server, status: str):
    server.faults["classes.json"] = [status]
    assert load_dataset(source_of(server)).class_names == ("0", "1")
    assert load_dataset(source_of(server)).class_names == ("0", "1")
    assert server.requests["classes.json"] == 1


def test_shards_in_the_cache_need_no_server(server: Server):
    dataset = load_dataset(source_of(server))
    server.shutdown()
    server.server_close()
    assert load_dataset(source_of(server)) == dataset


def test_two_processes_at_once_fetch_each_shard_once(server: Server):
    server.delay_s = 0.3
    module = "efficientnet.images.datasets"
    code = f"from {module} import load_dataset; load_dataset({source_of(server)!r})"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert {
        server.requests[f"{name}.tar"] for name in ("train-0000", "train-0001", "val-0000")
    } == {1}


def test_a_server_that_fails_twice_is_asked_a_third_time(server: Server):
    server.faults["train-0001.tar"] = ["503", "cut"]
    assert len(load_dataset(source_of(server)).train) == 20
    assert server.requests["train-0001.tar"] == 3


@pytest.mark.parametrize(
    ("fault", "facts", "num_requests"),
    [("404", ("404",), 1), ("503", ("503",), 3), ("cut", ("700", "3 times"), 3)],
)
def test_a_shard_that_cannot_be_fetched_is_told_and_leaves_nothing(
    server: Server, tmp_path: Path, fault: str, facts: tuple[str, ...], num_requests: int
):
    server.faults["train-0001.tar"] = [fault] * 3
    with raises_naming(DatasetError, f"{server.url}/train-0001.tar", *facts):
        load_dataset(source_of(server))
    assert server.requests["train-0001.tar"] == num_requests
    kept = [p.name for p in tmp_path.glob("cache/shards/*/*") if p.suffix != ".lock"]
    assert kept == ["train-0000.tar"]


def test_what_a_server_gives_must_be_a_whole_tar(server: Server, tmp_path: Path):
    (server.folder / "train-0001.tar").write_bytes(b"<html>please log in</html>" * 40)
    with raises_naming(DatasetError, f"{server.url}/train-0001.tar", "tar"):
        load_dataset(source_of(server))
    assert not list(tmp_path.glob("cache/shards/*/train-0001.tar"))


def test_two_remote_shards_of_one_name_are_an_error(server: Server):
    with raises_naming(DatasetError, 2, "0.tar"):
        load_dataset(f"{server.url}/{{a,b}}/0.tar")


@pytest.fixture
def piped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EFFICIENTNET_CACHE", str(tmp_path / "cache"))
    return write_set(tmp_path / "bucket", train=2, val=1)


def test_shards_come_from_a_command_once(piped: Path, tmp_path: Path):
    log = shlex.quote(str(tmp_path / "log"))
    names = "{train-{0000..0001},val-0000}.tar"
    source = f"pipe:echo x >> {log} && cat {shlex.quote(str(piped))}/{names}"
    dataset = load_dataset(source)
    assert load_dataset(dataset.source) == dataset
    assert sha256_of_samples(dataset.train) == sha256_of_samples(load_dataset(piped).train)
    assert len((tmp_path / "log").read_text().splitlines()) == 3
    assert dataset.train[0].name == "train-0000.tar/000000.png"


def test_a_command_that_a_file_names_is_not_run(piped: Path, tmp_path: Path):
    mark = tmp_path / "mark"
    command = f"pipe:touch {shlex.quote(str(mark))}; cat {shlex.quote(str(piped))}/train-0000.tar"
    with raises_naming(DatasetError, "touch", "not run", "--data"):
        load_held_out(command, None, ("0", "1"))
    with raises_naming(DatasetError, "not run", "--data"):
        choose_picture(command, None)
    assert not mark.exists()
    assert choose_picture(command, str(piped))[1] in ("0", "1")
    assert load_held_out(command, command, ("0", "1")).val
    assert mark.exists()


@pytest.mark.parametrize("tail", ["", " | cat"])
def test_a_command_that_fails_is_told_with_its_last_error(piped: Path, tmp_path: Path, tail: str):
    source = f"pipe:cat {piped}/missing-0000.tar{tail}"
    with raises_naming(DatasetError, "missing-0000.tar", "exit code 1", "No such file"):
        load_dataset(source)
    assert not list(tmp_path.glob("cache/shards/*/missing*"))


def test_a_command_that_stops_early_is_told(piped: Path):
    with raises_naming(DatasetError, "head -c 700", "cut short"):
        load_dataset(f"pipe:head -c 700 {piped}/train-0000.tar")


def test_a_command_that_names_no_shard_is_an_error():
    with raises_naming(DatasetError, "pipe:cat something", ".tar"):
        load_dataset("pipe:cat something")
