from pathlib import Path

import numpy as np
import pytest
from facts import raises_naming
from PIL import Image

from efficientnet.images.datasets import DatasetError
from efficientnet.images.preprocess_spec import PreprocessSpec
from perf.measurements import preprocessing
from perf.measurements.preprocessing import (
    PreprocessingConfig,
    PreprocessingReport,
    describe,
    measure,
    results_table,
)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for index, size in enumerate([(60, 40), (40, 61), (150, 90)]):
        small = Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(folder / f"{index}.jpg")
    return folder


def test_the_record_tells_times_pixels_and_answers_of_a_checkpoint(
    photos: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "out" / "preprocessing.json"
    config = PreprocessingConfig(photos, checkpoint=tiny_checkpoint, rounds=1, output=output)
    assert preprocessing.main(config) == output
    (record,) = PreprocessingReport.model_validate_json(output.read_text()).cases
    assert record.num_images == 3 and record.spec.image_size == 32
    assert set(record.ms_per_image) == {"timm", "timm again", "exact", "fast"}
    assert min(record.ms_per_image.values()) > 0
    assert record.differences["exact"].max_counts < 1.01
    assert record.differences["fast"].mean_counts > record.differences["exact"].mean_counts
    assert record.top1_agreement in [0, 1 / 3, 2 / 3, 1]
    shown = capsys.readouterr().out
    assert "exact / timm" in shown and "32 px, squash, bicubic" in shown


def test_publishing_measures_several_sizes_and_writes_the_table(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "docs" / "results.md"
    results.parent.mkdir()
    results.write_text("a\n<!-- preprocessing: here -->\nold\n<!-- /preprocessing -->\nb\n")
    made = preprocessing.main(PreprocessingConfig(photos, rounds=1, publish=True))
    cases = PreprocessingReport.model_validate_json(made.read_text()).cases
    assert len(cases) == 9 and made.parent.parent == Path("reports/published")
    text = results.read_text()
    assert text.startswith("a\n<!-- preprocessing: here -->\n\n| preprocessing | timm ms |")
    assert "old" not in text and text.endswith("<!-- /preprocessing -->\nb\n")
    assert "| 384 px, squash, bilinear |" in text
    # No checkpoint, so nobody was asked for a class.
    assert all(row[-1] == "-" for row in results_table(cases).rows)


def test_a_squash_before_a_crop_is_described():
    spec = PreprocessSpec(
        image_size=300,
        interpolation="bicubic",
        crop_fraction=0.9,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        is_squashed=True,
    )
    assert describe(spec) == "300 px, squash, crop 0.9, bicubic"


def test_every_contender_sees_every_photo_in_every_round():
    seen: dict[str, list[bytes]] = {"a": [], "b": []}
    photos = [bytes([number]) for number in range(40)]
    measure({name: seen[name].append for name in seen}, photos, num_rounds=3)
    warm_up = photos[:1]
    assert sorted(seen["a"]) == sorted(seen["b"]) == sorted(warm_up + 3 * photos)


def test_a_photo_counts_with_the_median_of_its_rounds(monkeypatch: pytest.MonkeyPatch):
    clock = iter([0, 0.002, 10, 10.5, 20, 20.004])
    monkeypatch.setattr(preprocessing.time, "perf_counter", lambda: next(clock))
    assert measure({"only": len}, [b"photo"], num_rounds=3) == {"only": pytest.approx(4.0)}


def test_a_folder_without_photos_is_refused(tmp_path: Path):
    with raises_naming(DatasetError, "no images", tmp_path):
        preprocessing.main(PreprocessingConfig(tmp_path))
