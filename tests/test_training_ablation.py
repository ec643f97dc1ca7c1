import json
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from commands import run as run_command
from facts import raises_naming, require_named
from small_trainings import epoch_metrics

from efficientnet.formats.checkpoint import CheckpointRecord, save_checkpoint
from efficientnet.machine.atomic import write_text
from efficientnet.machine.environment import current_environment
from efficientnet.reporting.publishing import PublishError
from training.ablations import ablation_study
from training.ablations.ablation_plan import (
    FIXED,
    PROGRESSIVE,
    PROGRESSIVE_ADAPTIVE,
    RANDOM,
    RANDOM_ADAPTIVE,
    AblationConfig,
    AblationError,
    PlannedRun,
    plan_rounds,
    plan_rows,
)
from training.ablations.ablation_report import schedules_table, to_markdown
from training.ablations.ablation_results import AblationRecord, gains, read_result, time_saved
from training.ablations.ablation_study import main, train_all
from training.recipe.config import config_to_json
from training.recipe.stages import plan_stages
from training.running.command_line import parse
from training.running.metrics import write_metrics
from training.studies.spread import Spread, spread

TOP1 = {
    PROGRESSIVE_ADAPTIVE: (0.97, 0.98, 0.96),
    PROGRESSIVE: (0.94, 0.95, 0.92),
    FIXED: (0.96, 0.965, 0.975),
    RANDOM: (0.90, 0.93, 0.88),
    RANDOM_ADAPTIVE: (0.85, 0.87, 0.84),
}
IMAGES_PER_S = {FIXED: 100.0}


@pytest.fixture(scope="module", autouse=True)
def flags_are_read_once() -> Iterator[None]:
    """Keep the recipes that flags stand for: 42 runs are asked for theirs again and again."""
    kept = cache(lambda words: parse(list(words)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.ablations.ablation_plan.parse", lambda words: kept(tuple(words)))
        yield


def tiny(output: Path, **changes: object) -> AblationConfig:
    config = AblationConfig(
        "tiny", image_sizes=(16, 24, 32), epochs=2, batch_size=128, output=output
    )
    return replace(config, **changes)


def top1_of(run: PlannedRun) -> float:
    """Let larger images want more augmentation, by more than the seeds differ."""
    row = run.row
    if row.magnitude is None:
        return TOP1[row.name][run.seed]
    favorite = {16: 5, 24: 10, 32: 15}[row.image_size]
    return 0.8 + row.image_size / 400 - abs(row.magnitude - favorite) / 500 + run.seed / 1000


def finish(run: PlannedRun) -> None:
    """Write what a complete run leaves."""
    config = run.config
    rate = IMAGES_PER_S.get(run.row.name, 160.0)
    epochs = [
        epoch_metrics(epoch, top1=top1_of(run), images_per_s=rate * epoch) for epoch in (1, 2)
    ]
    record = CheckpointRecord(
        variant=config.variant,
        num_classes=10,
        class_names=tuple("0123456789"),
        preprocess=config.preprocess_spec(None),
        data="digits",
        weights_sha256="",
        epoch=2,
        step=22,
        top1=epochs[-1].top1,
        top5=0.99,
        num_images_evaluated=360,
        recipe="digits-tiny",
        train_config=config_to_json(config),
        environment=current_environment(),
    )
    save_checkpoint(run.directory / "checkpoint", {}, record, None)
    write_metrics(run.directory, epochs)
    write_text(run.directory / "report.md", "complete")


def finish_all(config: AblationConfig) -> AblationRecord:
    for run in plan_rounds(config, plan_rows(config)):
        finish(run)
    text = main(config)
    return AblationRecord.model_validate_json(text.with_suffix(".json").read_text())


def changed(record: AblationRecord, field: str, values: dict[str, tuple]) -> AblationRecord:
    """Give the runs of some rows other values, by seed."""
    runs = tuple(
        run.model_copy(update={field: values[run.row][run.seed]}) if run.row in values else run
        for run in record.runs
    )
    return record.model_copy(update={"runs": runs})


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> AblationRecord:
    return finish_all(tiny(tmp_path_factory.mktemp("ablation")))


def flag(flags: tuple[str, ...], name: str, num_values: int = 1) -> tuple[str, ...]:
    index = flags.index(name)
    return flags[index + 1 : index + 1 + num_values]


def test_the_schedules_differ_in_schedule_stages_and_regularisation_only(tmp_path: Path):
    rows = {row.name: row.flags for row in plan_rows(tiny(tmp_path, epochs=11))}
    assert {name: flag(rows[name], "--schedule")[0] for name in TOP1} == {
        PROGRESSIVE_ADAPTIVE: "paper",
        PROGRESSIVE: "paper",
        FIXED: "fixed",
        RANDOM: "random",
        RANDOM_ADAPTIVE: "random",
    }
    assert {name: flag(rows[name], "--progressive.num-stages")[0] for name in TOP1} == {
        PROGRESSIVE_ADAPTIVE: "4",
        PROGRESSIVE: "4",
        FIXED: "1",
        RANDOM: "8",
        RANDOM_ADAPTIVE: "8",
    }
    for name in TOP1:
        is_adaptive = "adaptive" in name
        first = "3" if is_adaptive else "6"
        assert flag(rows[name], "--progressive.randaugment-magnitude", 2) == (first, "6")
        first = "0" if is_adaptive else "0.1"
        assert flag(rows[name], "--progressive.dropout-rate", 2) == (first, "0.1")
        assert flag(rows[name], "--progressive.image-size", 2) == ("16", "32")
        assert flag(rows[name], "--eval-image-size") == ("32",)
        assert flag(rows[name], "--recipe") == ("digits",)
    few = plan_rows(tiny(tmp_path, epochs=2))
    assert all(int(flag(row.flags, "--progressive.num-stages")[0]) <= 2 for row in few)


def test_magnitudes_are_trained_and_evaluated_at_each_size(tmp_path: Path):
    config = tiny(tmp_path, experiments="magnitudes", magnitudes=(3, 6, 9))
    rows = plan_rows(config)
    assert len(rows) == 9
    for row in rows:
        assert row.magnitude is not None
        size, magnitude = str(row.image_size), f"{row.magnitude:g}"
        assert flag(row.flags, "--progressive.image-size", 2) == (size, size)
        assert flag(row.flags, "--eval-image-size") == (size,)
        assert flag(row.flags, "--progressive.randaugment-magnitude", 2) == (magnitude, magnitude)
    (stage,) = plan_stages(plan_rounds(config, rows)[0].config.progressive)
    assert (stage.image_size, stage.randaugment_magnitude) == (16, 3)


def test_flags_of_the_user_reach_all_runs_and_give_the_range(tmp_path: Path):
    flags = "--horizontal-flip --progressive.randaugment-magnitude 4 12"
    config = tiny(tmp_path, flags=flags, minival=0.1, experiments="schedules")
    for run in plan_rounds(config, plan_rows(config)):
        assert run.config.horizontal_flip and run.config.minival == 0.1
        first, last = run.config.progressive.randaugment_magnitude
        assert last == 12 and first == (4 if "adaptive" in run.row.name else 12)


def test_a_recipe_without_a_range_of_regularisation_is_refused(tmp_path: Path):
    flags = (
        "--progressive.randaugment-magnitude 5 5 --progressive.mixup-alpha 0 0 "
        "--progressive.dropout-rate 0 0"
    )
    with raises_naming(ValueError, "regularisation"):
        plan_rows(tiny(tmp_path, flags=flags))


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"image_sizes": (32, 32, 64)}, ("image_sizes",)),
        ({"magnitudes": (9, 6, 3)}, ("magnitudes",)),
        ({"jobs": 0}, ("--jobs", 0)),
    ],
)
def test_wrong_values_are_refused(changes: dict, facts: tuple[object, ...], tmp_path: Path):
    with raises_naming(ValueError, *facts):
        tiny(tmp_path, **changes)


def test_a_round_is_all_rows_of_a_seed_and_rounds_begin_with_different_rows(tmp_path: Path):
    config = tiny(tmp_path)
    rows = plan_rows(config)
    planned = plan_rounds(config, rows)
    assert len(rows) == 14 and len(planned) == 42
    rounds = [planned[i : i + 14] for i in (0, 14, 28)]
    for seed, runs in enumerate(rounds):
        assert {run.seed for run in runs} == {seed} == {run.config.seed for run in runs}
        assert Counter(run.row for run in runs) == Counter(rows)
    assert [rows.index(runs[0].row) for runs in rounds] == [0, 5, 10]
    assert len({run.directory for run in planned}) == 42


def test_a_spread_is_the_mean_and_the_sample_std():
    assert (spread([1, 2, 3]).mean, spread([1, 2, 3]).std) == (2, 1)
    assert spread([5]).std is None and spread([5]).text() == "5.0"
    assert spread([1, 2, 3]).text() == "2.0 ± 1.0"


@pytest.mark.parametrize(("num_seeds", "quantile"), [(2, 12.706), (3, 4.303), (20, 2.093)])
def test_the_margin_is_half_of_the_95_percent_confidence_interval(num_seeds: int, quantile: float):
    margin = Spread(0.0, 3.0, num_seeds).margin
    assert margin == pytest.approx(quantile * 3.0 / num_seeds**0.5, rel=1e-3)


def test_a_difference_is_taken_seed_by_seed(record: AblationRecord):
    ahead = changed(record, "top1", {FIXED: (0.96, 0.97, 0.95)})
    assert gains(ahead, PROGRESSIVE_ADAPTIVE, FIXED) == pytest.approx([1, 1, 1])


def test_seconds_are_those_in_training_without_evaluation(tmp_path: Path):
    config = tiny(tmp_path)
    run = plan_rounds(config, plan_rows(config))[0]
    finish(run)
    result = read_result(run)
    assert result.seconds == pytest.approx(11 * 128 / 160 + 11 * 128 / 320)
    assert result.images_per_s == pytest.approx(22 * 128 / result.seconds)
    assert result.mean_pixels == (16**2 + 32**2) / 2


def test_time_is_saved_seed_by_seed(record: AblationRecord):
    seconds = {PROGRESSIVE_ADAPTIVE: (8.0, 15.6, 32.4), FIXED: (10.0, 20.0, 40.0)}
    faster = changed(record, "seconds", seconds)
    assert time_saved(faster, PROGRESSIVE_ADAPTIVE) == pytest.approx([20, 22, 19])
    assert "| 20 (4) |" in schedules_table(faster).markdown()


def test_the_data_has_the_name_of_the_record(record: AblationRecord):
    named = record.model_copy(update={"name": "cifar10", "data": "train-0000.tar"})
    text = to_markdown(named, "")
    assert text.startswith("# tiny on cifar10\n") and "train-0000" not in text


def test_all_files_are_written_from_complete_runs_without_training(tmp_path: Path):
    record = finish_all(tiny(tmp_path))
    assert record.num_rounds == 3 and len(record.runs) == 42
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "ablation.md").read_text()
    for row in (
        "| progressive + adaptive | 97.0 ± 1.0 | +0.3 (4.0) | 13.2 ± 0.0 | 0.62 | 38 (0) | 85.1 |",
        "83.1 in 9.4 h, 55 % saved |",
        "| fixed | 96.7 ± 0.8 | - | 21.1 ± 0.0 | 1.00 | - | - | 82.9 in 20.8 h |",
        "| progressive + adaptive | progressive | +3.3 (1.4) | +0.8 |",
        "| random resize + adaptive | random resize | -5.0 (2.5) | +0.7 |",
        "| 5 | **84.1 ± 0.1** |",
        "**78.3 ± 0.16** | 81.2 ± 0.06 |",
        "| from 5 to 15 (margin) | -2.0 (0.0) | +0.0 (0.0) | +2.0 (0.0) | from 5 to 15 | -0.6 |",
    ):
        assert row in text, row
    require_named(text, "95 %", "+4.0 (0.0) points", "360 held-out images", "0.28 points")
    assert text.startswith("# tiny on digits\n") and not (tmp_path / "logs").exists()


@pytest.mark.parametrize("experiments", ["schedules", "magnitudes"])
def test_one_experiment_alone_is_written(experiments: str, tmp_path: Path):
    finish_all(tiny(tmp_path, experiments=experiments, seeds=1))
    text = (tmp_path / "ablation.md").read_text()
    assert ("## Schedules" in text) == (experiments == "schedules")
    assert ("magnitude by image size" in text) == (experiments == "magnitudes")
    assert "(-)" in text and "1 seed," in text
    assert (tmp_path / "ablation.png").is_file()


def test_a_complete_run_with_other_values_is_not_taken(tmp_path: Path):
    config = tiny(tmp_path, seeds=1)
    finish_all(config)
    with raises_naming(AblationError, "epochs 2 and now 3"):
        main(replace(config, epochs=3))


def test_a_record_is_written_again_without_training(record: AblationRecord, tmp_path: Path):
    path = tmp_path / "ablation-digits.json"
    path.write_text(record.model_dump_json(indent=1) + "\n")
    before = path.read_bytes()
    text = main(AblationConfig(record=path))
    assert text == tmp_path / "ablation-digits.md" and path.read_bytes() == before
    assert text.read_text() == to_markdown(record, "ablation-digits.png")
    assert {p.name for p in tmp_path.iterdir()} == {
        f"ablation-digits.{suffix}" for suffix in ("md", "png", "json")
    }


def test_a_record_is_published_under_its_name_with_a_section(
    record: AblationRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("some.json").write_text(record.model_dump_json())
    config = AblationConfig(record=Path("some.json"), publish=True)
    Path("docs").mkdir()
    results = Path("docs/results.md")
    results.write_text("no place\n")
    with raises_naming(PublishError, "docs/results.md"):
        main(config)
    assert not Path("reports").exists()
    results.write_text("<!-- ablation-digits: made -->\nstale\n<!-- /ablation-digits -->\n")
    text = main(config)
    folder = text.parent
    assert folder.parent == Path("reports/published")
    assert folder.name.startswith(f"{record.finished_at:%Y-%m-%d}-")
    names = {path.name for path in folder.iterdir()}
    assert names == {f"ablation-digits.{suffix}" for suffix in ("md", "png", "json")}
    assert "](ablation-digits.png)" in text.read_text()
    section = results.read_text()
    assert schedules_table(record).markdown() in section and "stale" not in section
    assert f"](../{folder}/ablation-digits.md)" in section and "95 % confidence" in section


def test_what_is_no_record_and_flags_of_trainings_are_refused(tmp_path: Path):
    path = tmp_path / "ablation.json"
    with raises_naming(FileNotFoundError, path):
        main(AblationConfig(record=path))
    path.write_text('{"format_version": 1}')
    with raises_naming(AblationError, path):
        main(AblationConfig(record=path))
    with raises_naming(ValueError, "--seeds 2", "--epochs 5", "--record"):
        AblationConfig(record=path, epochs=5, seeds=2)


def test_nothing_is_trained_where_it_cannot_be_published(tmp_path: Path):
    config = tiny(tmp_path / "runs", publish=True, readme=tmp_path / "README.md")
    with raises_naming(PublishError, tmp_path / "README.md"):
        main(config)
    assert not (tmp_path / "runs").exists()


def fake_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(f"import pathlib, sys, time\n{body}")
    monkeypatch.setattr("training.ablations.ablation_study.RUN_COMMAND", program)


def test_a_failed_run_is_told_with_its_last_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake_program(tmp_path, monkeypatch, "sys.exit('the loss is nan')")
    config = tiny(tmp_path / "out", seeds=1)
    with raises_naming(AblationError, "seed 0", "code 1", "the loss is nan"):
        train_all(plan_rounds(config, plan_rows(config)), 1, lambda _: None)


def test_an_interruption_asks_each_run_once_and_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    body = (
        "import signal\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "name = sys.argv[sys.argv.index('--name') + 1]\n"
        f"place = pathlib.Path({str(tmp_path)!r}) / name\n"
        "try:\n"
        "    place.with_suffix('.began').touch(); time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    time.sleep(0.3); place.with_suffix('.saved').touch(); sys.exit(130)\n"
    )
    fake_program(tmp_path, monkeypatch, body)
    config = tiny(tmp_path / "out", seeds=1)
    planned = plan_rounds(config, plan_rows(config))
    waits = iter(range(10_000))

    def look(_: float) -> None:
        if next(waits) > 500:
            raise AssertionError("the runs have not begun")
        if len(list(tmp_path.glob("*.began"))) == 2:
            raise KeyboardInterrupt
        pause(0.02)

    pause = time.sleep
    monkeypatch.setattr("training.ablations.ablation_study.time.sleep", look)
    with raises_naming(KeyboardInterrupt, "14 runs"):
        train_all(planned, 2, lambda _: None)
    assert len(list(tmp_path.glob("*.saved"))) == 2


def test_a_planned_run_trains_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class EndedFork(subprocess.Popen):
        def __init__(self, words: list[str], **_: object) -> None:
            self.returncode = run_command(*words[1:], cwd=Path.cwd()).returncode

        def poll(self) -> int | None:
            return self.returncode

    monkeypatch.setattr(ablation_study.subprocess, "Popen", EndedFork)
    config = tiny(tmp_path, seeds=1, epochs=1, batch_size=256, experiments="schedules")
    planned = plan_rounds(config, plan_rows(config))[:1]
    finished: list[PlannedRun] = []
    train_all(planned, 1, finished.append)
    assert finished == planned
    result = read_result(planned[0])
    assert result.seconds > 0 and 0 < result.top1 <= result.top5


@pytest.mark.slow
def test_the_command_trains_and_returns_at_once_when_started_again(tmp_path: Path):
    command = ["training/ablation.py", "tiny", "--epochs", "1", "--seeds", "1"]
    command += ["--image-sizes", "16", "20", "24", "--batch-size", "256", "--jobs", "2"]
    command += ["--experiments", "schedules", "--output", str(tmp_path)]
    first = run_command(*command)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines() == [str(tmp_path / "ablation.md")]
    assert "5 of 5 runs" in first.stderr
    runs = json.loads((tmp_path / "ablation.json").read_text())["runs"]
    assert [run["row"] for run in runs] == list(TOP1)
    assert all(run["seconds"] > 0 and run["top1"] > 0 for run in runs)
    again = run_command(*command)
    assert again.returncode == 0 and "5 of them complete" in again.stderr
