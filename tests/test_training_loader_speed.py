import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT
from facts import raises_naming
from PIL import Image

from efficientnet.machine.environment import current_environment
from efficientnet.measuring.contender import Contender, ContenderError, running
from training.studies.loader_speed_study import (
    CONTENDERS,
    LoaderCase,
    LoaderReport,
    LoaderSpeedConfig,
    LoaderSpeedError,
    LoaderSubject,
    find_jpegs,
    main,
    to_table,
)


def write_photos(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.JPEG", "JPEG")


def test_each_loader_gives_the_images_of_a_turn(tmp_path: Path):
    write_photos(tmp_path, 2)
    config = LoaderSpeedConfig(tmp_path, (32,), num_workers=1, batch_size=2)
    rows = [Contender(name, partial(LoaderSubject, name, config)) for name in CONTENDERS]
    with running(rows):
        for row in rows:
            loaded = row.ask("turn", find_jpegs(tmp_path) * 2, 1, 32)
            assert loaded.images_per_s > 0 and loaded.core_ms_per_image > 0


@pytest.mark.slow
def test_all_loaders_are_measured_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_photos(tmp_path / "photos", 3)
    write_photos(tmp_path / "photos" / "inner", 2)
    config = LoaderSpeedConfig(
        tmp_path / "photos",
        image_sizes=(32,),
        num_workers=1,
        batch_size=2,
        rounds=1,
        passes=1,
        output=tmp_path / "reports" / "loader.json",
    )
    assert main(config) == config.output
    report = LoaderReport.model_validate(json.loads(config.output.read_text()))
    assert report.num_images == 5
    (case,) = report.cases
    assert case.image_size == 32 and set(case.images_per_s) == set(CONTENDERS)
    for values in (*case.images_per_s.values(), *case.core_ms_per_image.values()):
        assert len(values) == 1 and values[0] > 0
    assert "cpu / timm" in capsys.readouterr().out


def test_a_damaged_photo_is_told_by_its_name(tmp_path: Path):
    write_photos(tmp_path, 2)
    damaged = tmp_path / "1.JPEG"
    damaged.write_bytes(b"damaged")
    config = LoaderSpeedConfig(tmp_path, (32,), num_workers=1, batch_size=2)
    row = Contender("cpu", partial(LoaderSubject, "cpu", config))
    with running([row]), pytest.raises(ContenderError, match=r"cpu: .*ImageError: 1"):
        row.ask("turn", (damaged,) * 4, 1, 32)


def test_the_table_has_medians_and_ratios_within_turns():
    rates = {"timm": (100.0, 200.0, 150.0), "cpu": (150.0, 400.0, 300.0)}
    rates |= {"device": (300.0, 600.0, 450.0), "timm again": (100.0, 180.0, 150.0)}
    core_ms = {name: (1.0, 2.0, 3.0) for name in rates}
    report = LoaderReport(
        num_images=256,
        num_workers=2,
        batch_size=32,
        num_passes=4,
        magnitude=10,
        cases=(LoaderCase(image_size=128, images_per_s=rates, core_ms_per_image=core_ms),),
        timm_version="1.0",
        environment=current_environment(),
        started_at="2025-01-01T00:00:00Z",  # pyright: ignore[reportArgumentType]
    )
    table = to_table(report)
    (row,) = table.rows
    assert row[:4] == ("128 px", "150", "300", "450")
    assert row[4:7] == (
        "2.00 (1.50 to 2.00)",
        "3.00 (3.00 to 3.00)",
        "1.00 (0.90 to 1.00)",
    )
    assert row[7:] == ("2.00", "2.00", "2.00") and len(row) == len(table.columns)
    assert "256 images" in table.notes[0] and "median and range" in table.notes[0].lower()


def test_a_folder_without_photos_is_told(tmp_path: Path):
    with raises_naming(FileNotFoundError, tmp_path / "nowhere"):
        find_jpegs(tmp_path / "nowhere")
    (tmp_path / "note.txt").write_text("no photo")
    with raises_naming(LoaderSpeedError, tmp_path, ".jpg"):
        find_jpegs(tmp_path)


def test_make_clean_removes_the_report():
    clean = (ROOT / "Makefile").read_text().partition("\nclean:")[2]
    assert str(LoaderSpeedConfig(Path()).output) in clean.split()
