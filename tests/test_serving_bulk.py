import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from facts import raises_naming, require_named
from PIL import Image
from processes import fork, wait_until

pq = pytest.importorskip("pyarrow.parquet")

from efficientnet.images.datasets import load_dataset  # noqa: E402
from efficientnet.images.preprocess import preprocess  # noqa: E402
from efficientnet.runtimes import open_runtime  # noqa: E402
from efficientnet.runtimes.probabilities import softmax  # noqa: E402
from serving.bulk_parts import (  # noqa: E402
    PLAN_FILE,
    BulkError,
    PartClassifier,
    Plan,
    list_pictures,
    open_plan,
    part_path,
    read_plan,
)
from serving.settings import artifact_sha256  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
BROKEN = "broken.jpg"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bulk") / "pictures"
    (folder / "inner").mkdir(parents=True)
    for index in range(10):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("inner" if index % 2 else "") / f"{index}.png")
    (folder / BROKEN).write_bytes((folder / "0.png").read_bytes()[:300])
    (folder / ".thumbnail.png").write_bytes(b"hidden")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def shards(folder: Path) -> Path:
    shards = folder.parent / "shards"
    shards.mkdir()
    files = sorted(path for path in folder.rglob("*.*") if path.is_file())
    for number in range(2):
        with tarfile.open(shards / f"{number}.tar", "w") as tar:
            for path in files[number::2]:
                tar.add(path, path.name)
    return shards


def wanted(data: Path, artifact: Path, top_k: int = 2, part_images: int = 4) -> Plan:
    sha256 = artifact_sha256(artifact)
    return Plan(
        data=str(data), artifact_sha256=sha256, top_k=top_k, part_images=part_images, num_images=0
    )


def classify_all(table: Path, artifact: Path, batch: int = 3) -> None:
    classifier = PartClassifier(table, artifact, batch, cores=1)
    for part in read_plan(table).missing(table):
        classifier.classify(part)


def rows_of(table: Path) -> dict[str, dict]:
    rows = pq.read_table(table).to_pylist()
    assert len({row["image"] for row in rows}) == len(rows)
    return {row["image"]: row for row in rows}


def bulk(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "serving" / "bulk.py"), *map(str, arguments)]


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_the_classes_are_those_of_the_runtime_whatever_the_batch(
    folder: Path, tiny_artifact: Path, tmp_path: Path, batch: int
):
    open_plan(tmp_path, wanted(folder, tiny_artifact), num_networks=1)
    classify_all(tmp_path, tiny_artifact, batch)
    rows = rows_of(tmp_path)
    runtime = open_runtime(tiny_artifact)
    assert rows.keys() == {"0.png", "2.png", "4.png", "6.png", "8.png", BROKEN} | {
        f"inner/{index}.png" for index in (1, 3, 5, 7, 9)
    }
    for name, row in rows.items():
        if name == BROKEN:
            continue
        image = preprocess((folder / name).read_bytes(), runtime.info.preprocess)[None]
        probabilities = softmax(runtime.infer(image))[0]
        best = np.argsort(-probabilities)[:2]
        assert row["error"] is None and row["class_indices"] == best.tolist()
        assert row["labels"] == [runtime.info.class_names[index] for index in best]
        np.testing.assert_allclose(row["probabilities"], probabilities[best], rtol=1e-4)


def test_a_broken_picture_has_its_error_in_the_place_of_classes(
    folder: Path, tiny_artifact: Path, tmp_path: Path
):
    open_plan(tmp_path, wanted(folder, tiny_artifact), num_networks=1)
    (folder / "gone.png").unlink(missing_ok=True)
    classify_all(tmp_path, tiny_artifact)
    row = rows_of(tmp_path)[BROKEN]
    require_named(row["error"], "damaged")
    assert (row["labels"], row["class_indices"], row["probabilities"]) == (None, None, None)


def test_shards_need_no_labels_and_name_their_pictures(
    shards: Path, folder: Path, tiny_artifact: Path, tmp_path: Path
):
    open_plan(tmp_path / "a", wanted(shards, tiny_artifact), num_networks=1)
    classify_all(tmp_path / "a", tiny_artifact)
    open_plan(tmp_path / "b", wanted(folder, tiny_artifact), num_networks=1)
    classify_all(tmp_path / "b", tiny_artifact)
    of_shards, of_files = rows_of(tmp_path / "a"), rows_of(tmp_path / "b")
    assert {name.partition("/")[0] for name in of_shards} == {"0.tar", "1.tar"}

    def by_name(rows: dict[str, dict]) -> dict[str, object]:
        return {name.rpartition("/")[2]: row["class_indices"] for name, row in rows.items()}

    assert by_name(of_shards) == by_name(of_files) and len(of_shards) == 11


def test_labelled_shards_are_taken_without_their_labels(tmp_path: Path):
    (sample, *_) = load_dataset("digits").val
    (tmp_path / "left.png").write_bytes(sample.read())
    (tmp_path / "left.cls").write_text("3")
    with tarfile.open(tmp_path / "digits.tar", "w") as tar:
        for name in ("left.png", "left.cls"):
            tar.add(tmp_path / name, f"7.{name}")
    (picture,) = list_pictures(str(tmp_path / "digits.tar"))
    assert picture.name == "digits.tar/7.left.png" and picture.read() == sample.read()


def test_a_run_that_was_killed_goes_on_and_does_nothing_twice(
    folder: Path, tiny_artifact: Path, tmp_path: Path
):
    pytest.importorskip("ray")
    table = tmp_path / "results.parquet"
    open_plan(table, wanted(folder, tiny_artifact, part_images=1), num_networks=1)
    first = fork(classify_all, table, tiny_artifact)
    assert wait_until(lambda: part_path(table, 0).exists() or not first.is_alive(), 120)
    first.kill()
    first.join()
    # As if it had come no further.
    done = {path: path.stat().st_ino for path in sorted(table.glob("part-*"))[:3]}
    assert done
    for path in set(table.glob("part-*")) - done.keys():
        path.unlink()
    command = bulk("--data", folder, "--artifact", tiny_artifact, "--output", table)
    command += ["--part-images", "1", "--top-k", "2"]
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    assert second.stdout.splitlines() == [str(table)]
    assert {path: path.stat().st_ino for path in done} == done
    assert len(rows_of(table)) == 11
    (told,) = re.findall(r"(\d+) of 11 pictures", second.stderr)
    assert int(told) == len(done)
    require_named(second.stderr, BROKEN)


def test_a_part_that_fails_is_told_in_one_line_and_the_others_stay(
    folder: Path, tiny_artifact: Path, tmp_path: Path
):
    pytest.importorskip("ray")
    shard = tmp_path / "cut.tar"
    with tarfile.open(shard, "w") as tar:
        for path in sorted(folder.glob("[0-9].png")):
            tar.add(path, path.name)
    table = tmp_path / "table"
    plan = open_plan(table, wanted(shard, tiny_artifact, top_k=5, part_images=1), 1)
    shard.write_bytes(shard.read_bytes()[: -2 * 10240])
    done = subprocess.run(
        bulk("--data", shard, "--artifact", tiny_artifact, "--output", table),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    require_named(done.stderr.splitlines()[-1], "error", shard)
    assert plan.num_parts == 5 and plan.missing(table)


def test_a_picture_that_ends_the_process_is_broken_and_the_others_are_not(
    folder: Path, tiny_artifact: Path, tmp_path: Path
):
    open_plan(tmp_path, wanted(folder, tiny_artifact, part_images=100), num_networks=1)
    program = (
        "import os, serving.bulk_parts as parts\n"
        "from pathlib import Path\n"
        "def deadly(data, spec, inner=parts.preprocess):\n"
        f"    return os._exit(9) if data == Path({str(folder / '4.png')!r}).read_bytes() else "
        "inner(data, spec)\n"
        "parts.preprocess = deadly\n"
        f"own = parts.PartClassifier(Path({str(tmp_path)!r}), Path({str(tiny_artifact)!r}), 3, 1)\n"
        "[own.classify(part) for part in range(4)]\n"
    )
    codes = list[int]()
    while not codes or codes[-1] == 9:
        codes.append(subprocess.run([sys.executable, "-c", program], check=False).returncode)
    # Once at full speed, and twice picture by picture; each part is one of these.
    assert codes == [9, 9, 9, 0]
    rows = rows_of(tmp_path)
    errors = {name: row["error"] for name, row in rows.items() if row["error"] is not None}
    assert errors.keys() == {"4.png", BROKEN} and len(rows) == 11
    require_named(errors["4.png"], "the process ended", 2)
    assert not list(tmp_path.glob("_trying-*"))


@pytest.mark.parametrize(
    ("change", "facts"), [({"top_k": 3}, ("--top-k", 2, 3)), ({"data": "/other"}, ("/other",))]
)
def test_a_table_is_not_gone_on_with_by_other_settings(
    folder: Path, tiny_artifact: Path, tmp_path: Path, change: dict, facts: tuple[object, ...]
):
    plan = wanted(folder, tiny_artifact)
    open_plan(tmp_path, plan, num_networks=1)
    with raises_naming(BulkError, tmp_path, "--output", *facts):
        open_plan(tmp_path, plan.model_copy(update=change), num_networks=1)


def test_pictures_that_come_later_do_not_move_the_parts(
    folder: Path, tiny_artifact: Path, tmp_path: Path
):
    plan = wanted(folder, tiny_artifact)
    first = open_plan(tmp_path, plan, num_networks=1)
    late = folder / "00.png"
    late.write_bytes((folder / "0.png").read_bytes())
    try:
        assert open_plan(tmp_path, plan, num_networks=8) == first
    finally:
        late.unlink()


def test_parts_are_small_enough_for_every_network_to_have_some(
    folder: Path, tiny_artifact: Path, tmp_path: Path
):
    plan = open_plan(tmp_path, wanted(folder, tiny_artifact, part_images=1000), num_networks=2)
    assert (plan.num_images, plan.part_images, plan.num_parts) == (11, 2, 6)
    assert sum(map(plan.size_of, plan.missing(tmp_path))) == 11


def test_a_machine_with_another_artifact_does_nothing(
    folder: Path, tiny_artifact: Path, tmp_path: Path
):
    plan = wanted(folder, tiny_artifact).model_copy(update={"artifact_sha256": "0" * 64})
    open_plan(tmp_path, plan, num_networks=1)
    with raises_naming(BulkError, tiny_artifact, "0" * 64, artifact_sha256(tiny_artifact)):
        PartClassifier(tmp_path, tiny_artifact, 1, 1)


def test_a_picture_that_is_gone_is_broken_and_a_folder_that_is_gone_ends_the_run(
    folder: Path, tiny_artifact: Path, tmp_path: Path
):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("0.png", "2.png"):
        (data / name).write_bytes((folder / name).read_bytes())
    table = tmp_path / "table"
    open_plan(table, wanted(data, tiny_artifact), num_networks=1)
    (data / "0.png").unlink()
    classifier = PartClassifier(table, tiny_artifact, 1, 1)
    for part in (0, 1):
        classifier.classify(part)
    assert [row["error"] is None for row in rows_of(table).values()] == [False, True]
    data.rename(tmp_path / "elsewhere")
    with raises_naming(BulkError, data / "0.png"):
        classifier.classify(0)


@pytest.mark.parametrize("kind", ["foreign", "file"])
def test_what_is_no_table_is_not_written_into(
    folder: Path, tiny_artifact: Path, tmp_path: Path, kind: str
):
    table = tmp_path / "table"
    if kind == "foreign":
        table.mkdir()
        (table / "mine.txt").write_text("mine")
    else:
        table.write_text("mine")
    with raises_naming(BulkError, table, PLAN_FILE):
        open_plan(table, wanted(folder, tiny_artifact), num_networks=1)


def test_data_without_pictures_is_refused(tiny_artifact: Path, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("none")
    with raises_naming(BulkError, tmp_path, ".jpg"):
        open_plan(tmp_path / "table", wanted(tmp_path, tiny_artifact), num_networks=1)
    assert not (tmp_path / "table").exists()
