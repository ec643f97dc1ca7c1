import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from facts import raises_naming
from small_trainings import epoch_metrics

from training.recipe.config import config_to_json
from training.recipe.recipes import digits_recipe
from training.running.metrics import write_metrics
from training.studies.side_by_side_study import SideBySideConfig, SideBySideError, main, table_of


def write_run(
    checkpoint: Path, folder: Path, top1: list[float], weights: str | None, **changes: object
) -> Path:
    shutil.copytree(checkpoint, folder / "checkpoint")
    record = json.loads((folder / "checkpoint" / "checkpoint.json").read_text())
    config = replace(digits_recipe("tiny"), weights=weights)
    record |= {"train_config": config_to_json(config), **changes}
    (folder / "checkpoint" / "checkpoint.json").write_text(json.dumps(record))
    epochs = [epoch_metrics(i, top1=t, elapsed_s=10.0 * i) for i, t in enumerate(top1, start=1)]
    write_metrics(folder, epochs)
    return folder


def test_runs_stand_beside_each_other_epoch_by_epoch_and_in_the_readme(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- fine-tuning: by a command -->\n<!-- /fine-tuning -->\n")
    tuned = write_run(tiny_checkpoint, tmp_path / "tuned", [0.5, 0.75], "package:lite0")
    scratch = write_run(tiny_checkpoint, tmp_path / "scratch", [0.25, 0.3, 0.35], None)
    found = main(SideBySideConfig((tuned, scratch), publish=True, readme=readme))
    assert [curve.start for curve in found.curves] == ["package:lite0", None]
    assert table_of(found).rows == (
        ("1", "50.0 % (10 s)", "25.0 % (10 s)"),
        ("2", "75.0 % (20 s)", "30.0 % (20 s)"),
        ("3", "-", "35.0 % (30 s)"),
    )
    assert "tuned: package:lite0, learning rate" in readme.read_text()
    assert len(list(tmp_path.glob("reports/published/*/fine-tuning-tiny-digits.json"))) == 1


def test_runs_on_other_images_are_not_compared(tiny_checkpoint: Path, tmp_path: Path):
    runs = (
        write_run(tiny_checkpoint, tmp_path / "a", [0.5], None),
        write_run(tiny_checkpoint, tmp_path / "b", [0.5], None, data="sample-photos"),
    )
    with raises_naming(SideBySideError, "data"):
        main(SideBySideConfig(runs))
    with raises_naming(ValueError, 1, "two"):
        SideBySideConfig(runs[:1])
