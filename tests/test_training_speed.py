from datetime import UTC, datetime
from pathlib import Path

import pytest
from facts import raises_naming

from efficientnet.formats.records import TrainingSpeedRecord, read_records
from efficientnet.machine.environment import current_environment
from efficientnet.reporting.publishing import PublishError
from training.recipe.recipes import imagenet_recipe
from training.studies.speed_plan import SpeedConfig, plan
from training.studies.speed_study import main
from training.studies.speed_tables import document, publish, timms_ratio

BEGIN, END = "<!-- training-speed: written by a command -->", "<!-- /training-speed -->"


def record(images_per_s: float | None = 100.0, **values) -> TrainingSpeedRecord:
    plain = TrainingSpeedRecord(
        variant="b6",
        contender="ours",
        image_size=512,
        micro_batch_size=12,
        precision="fp16",
        num_classes=1000,
        is_compiled=False,
        is_loader_fed=False,
        data="synthetic",
        num_workers=0,
        num_threads=2,
        num_warm_up_steps=2,
        num_steps=20,
        images_per_s=images_per_s,
        step_p50_ms=120.0,
        turn_p50_ms=(120.0,),
        compile_s=None,
        peak_memory_bytes=8_000_000_000,
        predicted_memory_bytes=9_000_000_000,
        device_memory_bytes=16_000_000_000,
        mfu=0.25,
        device_peak="125 TFLOP/s",
        is_out_of_memory=images_per_s is None,
        environment=current_environment(),
        started_at=datetime(2026, 1, 2, tzinfo=UTC),
    )
    return plain.model_copy(update=values)


def test_training_steps_are_measured_for_real(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "speed.jsonl"
    config = SpeedConfig(
        "tiny", image_sizes=(32,), batch_sizes=(4,), data="digits", num_workers=0, threads=1,
        seconds=0.1, output=output,
    )  # fmt: skip
    assert main(config) == output
    synthetic, fed = read_records(output, TrainingSpeedRecord)
    assert [synthetic.is_loader_fed, fed.is_loader_fed] == [False, True]
    assert [synthetic.data, fed.data] == ["synthetic", "digits"]
    for row in (synthetic, fed):
        assert row.num_steps >= 1 and row.images_per_s and row.step_p50_ms
        assert not row.is_out_of_memory and row.compile_s is None
        assert 0 < (row.peak_memory_bytes or 0) < row.device_memory_bytes
        assert row.mfu is None or 0 < row.mfu < 1
    printed = capsys.readouterr().out
    assert "of synthetic" in printed and "tiny, fp32, images of digits" in printed


def test_what_a_cpu_cannot_hold_is_marked_and_not_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "speed.jsonl"
    sizes = {"image_sizes": (128, 300), "batch_sizes": (64,)}
    main(SpeedConfig("v2-s", precision="bf16", memory_limit_bytes=10**9, output=output, **sizes))
    small, large = read_records(output, TrainingSpeedRecord)
    assert small.is_out_of_memory and large.is_out_of_memory
    assert small.images_per_s is None and large.num_steps == 0
    assert 1e9 < (small.predicted_memory_bytes or 0) < (large.predicted_memory_bytes or 0)
    assert capsys.readouterr().out.count("OOM") == 2


def test_our_step_and_timms_take_turns(tmp_path: Path):
    output = tmp_path / "speed.jsonl"
    short = {"image_sizes": (32,), "batch_sizes": (2,), "seconds": 0.2, "turns": 2, "threads": 1}
    main(SpeedConfig("b0", peer="timm", output=output, **short))
    run = read_records(output, TrainingSpeedRecord)
    assert [row.contender for row in run] == ["ours", "timm", "timm again"]
    assert all(len(row.turn_p50_ms) == 2 and row.num_steps >= 2 for row in run)
    found = timms_ratio(run, run[0])
    assert found and 0 < found.low <= found.high


def test_a_ratio_to_timm_is_taken_within_a_turn():
    # The machine slows down threefold in the second turn; within a turn ours is twice as fast.
    run = [
        record(contender="ours", turn_p50_ms=(5.0, 15.0)),
        record(contender="timm", turn_p50_ms=(10.0, 30.0), contender_version="1.0"),
        record(contender="timm again", turn_p50_ms=(12.5, 30.0), contender_version="1.0"),
    ]
    assert timms_ratio(run, run[0]) == (2.0, 2.0, 2.0)
    text = document(run, as_markdown=True)
    assert "b6 beside timm's training step, fp16" in text and "timm 1.0" in text
    rows = [line for line in text.splitlines() if line.startswith("| 512")]
    assert rows[0].endswith("| ours | 2.00 | 2.00 to 2.00 |")
    assert rows[1].endswith("| timm | 1.00 | - |")
    assert rows[2].endswith("| timm again | 0.90 | 0.80 to 1.00 |")


def test_the_rows_of_a_paper_table_are_told_by_variant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "speed.jsonl"
    main(SpeedConfig(table=3, precision="bf16", memory_limit_bytes=1, output=output))
    rows = read_records(output, TrainingSpeedRecord)
    assert [row.table for row in rows] == [3] * 4
    text = document(rows, as_markdown=True)
    assert "| b4-fused-1-7 | 380 | 32 | OOM |" in text and "Table 3 of the paper" in text
    assert "b4-fused-1-5" in capsys.readouterr().out


def test_sizes_are_the_recipes_and_the_tables_unless_given():
    recipe = imagenet_recipe("v2-s").progressive.image_size
    assert SpeedConfig().variants == ("v2-s",) and SpeedConfig().image_size_list == recipe
    assert SpeedConfig("b0").image_size_list == (176,)
    groups = plan(SpeedConfig(table=2))
    shapes = [(case.image_size, case.micro_batch_size) for (case,) in groups]
    assert shapes == [(512, 12), (512, 24), (380, 12), (380, 24)]
    assert [case.padding for case in plan(SpeedConfig("b7", peer="timm"))[0]] == ["same"] * 3


def test_a_batch_that_the_images_do_not_fill_is_refused():
    config = SpeedConfig("tiny", batch_sizes=(100_000,), data="digits")
    with raises_naming(ValueError, "training images", "batch"):
        plan(config)


def test_publishing_without_a_place_in_the_readme_is_refused_before_any_work(tmp_path: Path):
    readme = tmp_path / "README.md"
    readme.write_text("nothing\n")
    config = SpeedConfig("tiny", publish=True, readme=readme, output=tmp_path / "speed.jsonl")
    with raises_naming(PublishError, readme, "training-speed"):
        main(config)
    assert not config.output.exists()


def test_publishing_keeps_other_runs_and_replaces_one_of_the_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    day = datetime(2026, 1, 2, tzinfo=UTC)
    publish([record(111.0, started_at=day)], readme)
    publish([record(222.0, started_at=day.replace(hour=1), precision="bf16")], readme)
    directory = publish([record(333.0, started_at=day.replace(hour=2))], readme)
    published = read_records(directory / "training-speed.jsonl", TrainingSpeedRecord)
    assert [row.images_per_s for row in published] == [222.0, 333.0]
    text = readme.read_text()
    assert "| 222 |" in text and "| 333 |" in text and "| 111 |" not in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "| 333 |" in (directory / "training-speed.md").read_text()


def test_a_step_is_of_the_papers_recipe_without_mixup():
    (case,) = plan(SpeedConfig("v2-m", image_sizes=(64,), batch_sizes=(8,)))[0]
    config, recipe = case.train_config(), imagenet_recipe("v2-m")
    assert config.progressive.image_size == (64, 64) and config.batch_size == 8
    assert recipe.progressive.mixup_alpha[1] > 0 and config.progressive.mixup_alpha == (0, 0)
    assert config.optimizer == recipe.optimizer
