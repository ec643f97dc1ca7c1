import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from facts import raises_naming, require_named
from PIL import Image

from efficientnet.images.preprocess import preprocess
from efficientnet.runtimes import open_runtime
from efficientnet.runtimes.probabilities import softmax
from serving.classify import ClassifyConfig, ClassifyError, main


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "inner").mkdir(parents=True)
    for index, name in enumerate(("b.png", "a.png", "inner/c.png")):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_the_best_classes_of_a_picture_are_those_of_the_runtime(
    pictures: Path, tiny_artifact: Path, capsys: pytest.CaptureFixture[str]
):
    path = pictures / "a.png"
    main(ClassifyConfig((str(path),), artifact=tiny_artifact, top_k=3, json=True))
    answer = json.loads(capsys.readouterr().out)
    runtime = open_runtime(tiny_artifact)
    logits = runtime.infer(preprocess(path.read_bytes(), runtime.info.preprocess)[None])
    expected = np.argsort(-logits[0])[:3]
    assert answer["picture"] == str(path)
    assert [p["class_index"] for p in answer["predictions"]] == expected.tolist()
    probabilities = [p["probability"] for p in answer["predictions"]]
    np.testing.assert_allclose(probabilities, softmax(logits)[0, expected])


def test_a_folder_is_taken_in_order_with_those_within_and_as_text(
    pictures: Path, tiny_artifact: Path, capsys: pytest.CaptureFixture[str]
):
    main(ClassifyConfig((str(pictures),), artifact=tiny_artifact, top_k=2))
    lines = capsys.readouterr().out.splitlines()
    names = [Path(line).name for line in lines if not line.startswith(" ")]
    assert names == ["a.png", "b.png", "c.png"]
    assert len(lines) == 9 and "%" in lines[1]


def test_a_checkpoint_classifies_a_picture_on_standard_input(
    pictures: Path,
    tiny_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    data = (pictures / "a.png").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    main(ClassifyConfig(("-",), artifact=tiny_checkpoint, json=True))
    answer = json.loads(capsys.readouterr().out)
    assert answer["picture"] == "-" and len(answer["predictions"]) == 5


def test_broken_files_are_named_and_the_others_classified(
    pictures: Path,
    tiny_artifact: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
):
    (pictures / "a.png").write_bytes((pictures / "a.png").read_bytes()[:500])
    with raises_naming(ClassifyError, "2 of 4"):
        main(
            ClassifyConfig(
                (str(pictures), str(pictures / "notes.txt")), artifact=tiny_artifact, json=True
            )
        )
    found = [json.loads(line)["picture"] for line in capsys.readouterr().out.splitlines()]
    assert [Path(name).name for name in found] == ["b.png", "c.png"]
    require_named(caplog.text, pictures / "a.png", "damaged", pictures / "notes.txt", "10 bytes")


def test_what_is_not_there_is_told_before_anything_is_classified(
    pictures: Path, tiny_artifact: Path, capsys: pytest.CaptureFixture[str]
):
    (pictures / "empty").mkdir()
    for path in ("nowhere.png", "empty"):
        both = (str(pictures / "a.png"), str(pictures / path))
        with raises_naming(FileNotFoundError, pictures / path):
            main(ClassifyConfig(both, artifact=tiny_artifact))
    assert capsys.readouterr().out == ""
