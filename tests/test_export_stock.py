import json
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from facts import raises_naming

from efficientnet.command import parse_flags
from efficientnet.formats.artifact import ArtifactError
from efficientnet.machine.environment import current_environment
from export.inputs.config import OpenVinoConfig
from export.inputs.reference import load_reference
from export.inputs.study_config import StockConfig
from export.ov import main as export_openvino
from export.studies.stock_comparison import (
    Comparison,
    Comparisons,
    Ratio,
    publish,
    section_of,
)
from export.studies.stock_tools import find_stock_artifacts

ROOT = Path(__file__).resolve().parent.parent


def comparison(batch_size: int, is_for_time_only: bool = False) -> Comparison:
    ratios = tuple(
        Ratio(program="openvino-int8", p50_ms=10.0, other=other, ratio=r, low=r, high=2 * r)
        for other, r in (("eager", 0.25), ("stock-openvino-bf16", 0.5))
    )
    return Comparison(
        variant="v2-s",
        num_threads=2,
        environment=current_environment(),
        cpu_features=("avx2",),
        started_at=datetime.now(UTC),
        batch_size=batch_size,
        image_size=384,
        is_for_time_only=is_for_time_only,
        ratios=ratios,
    )


def test_a_comparison_tells_the_ratios_and_on_what_they_were_measured():
    text = section_of(comparison(1))
    assert "| openvino-int8 | 10.0 | 0.25 (0.25 to 0.50) | 0.50 (0.50 to 1.00) |" in text
    assert "v2-s, 384 px, batch 1" in text and "avx2" in text and "2 threads" in text
    assert "Time only" not in text
    assert "Time only" in section_of(comparison(1, is_for_time_only=True))


def test_comparisons_are_published_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- stock: written by a command -->\n<!-- /stock -->\n")
    publish(comparison(1), readme)
    publish(comparison(16), readme)
    assert "batch 1**" in readme.read_text() and "batch 16**" in readme.read_text()


def test_a_comparison_of_another_day_stays_in_the_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- stock: written by a command -->\n<!-- /stock -->\n")
    first, other = comparison(1), comparison(16)
    publish(first, readme)
    publish(other, readme)
    a_day = timedelta(days=1)
    publish(other.model_copy(update={"started_at": other.started_at + a_day}), readme)
    text = readme.read_text()
    assert text.count("batch 1**") == text.count("batch 16**") == 1
    later = f"{other.started_at + a_day:%Y-%m-%d}"
    assert len(list((tmp_path / "reports/published").glob(f"{later}-*/stock-*.json"))) == 1


@pytest.mark.slow
def test_the_stock_tools_take_turns_with_ours(fitted_checkpoint: Path, tmp_path: Path):
    few = {"num_parity_images": 64, "num_calibration_images": 64}
    ours = export_openvino(
        OpenVinoConfig(checkpoint=fitted_checkpoint, output=tmp_path / "ours", **few)  # type: ignore
    )
    command = [
        *(sys.executable, str(ROOT / "export/stock.py"), str(ours)),
        *("--checkpoint", str(fitted_checkpoint), "--num-parity-images", "64"),
        *("--num-calibration-images", "64", "--seconds", "0.5", "--turns", "2"),
        *("--batch-sizes", "1", "2", "--json"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stock = tmp_path / "artifacts/tiny/stock"
    again = parse_flags(StockConfig, None, [*command[2:], "--made"]).export_config
    reference = load_reference(again)
    assert sorted(find_stock_artifacts(reference, again, stock)) == sorted(stock.iterdir())
    with raises_naming(ArtifactError, "batches of 4", "--made"):
        find_stock_artifacts(reference, replace(again, batches=(1, 4)), stock)
    found = Comparisons.model_validate(json.loads(done.stdout.splitlines()[-1])).comparisons
    assert [one.batch_size for one in found] == [1, 2]
    for one in found:
        others = {ratio.other for ratio in one.ratios}
        assert {"eager", "stock-onnxruntime-fp32", "stock-onnxruntime-int8"} < others
        assert all(0 < ratio.low <= ratio.ratio <= ratio.high for ratio in one.ratios)
