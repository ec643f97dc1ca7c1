import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from facts import raises_naming, require_named
from searches import FOUR_NETWORKS, brief, outcomes, searched, worker_of

from efficientnet.network.variant_file import read_variant_file, write_variant_file
from efficientnet.network.variants import VARIANTS
from training.recipe.config import TrainConfig
from training.running.command_line import parse
from training.searching import search_study, worker
from training.searching.search_config import TARGETS, SearchConfig, target_of
from training.searching.search_pictures import pareto_front
from training.searching.search_record import SearchRecord, importances, read_record
from training.searching.search_report import section_name, to_markdown
from training.searching.search_tables import choices_table, shares
from training.searching.step_time import ratio_of, step_ratio
from training.searching.study import SearchError

SPACE = SearchConfig(name="x").space()


def record_of(config: SearchConfig) -> SearchRecord:
    return read_record(config.directory / "search.json")


def test_networks_have_the_backbones_channels_and_strides():
    first = {name: choices[0] for name, choices in SPACE.parameters.items()}
    last = {name: choices[-1] for name, choices in SPACE.parameters.items()}
    small, large, backbone = SPACE.network(first), SPACE.network(last), VARIANTS["tiny"]
    assert [s.out_channels for s in large.stages] == [s.out_channels for s in backbone.stages]
    assert [s.stride for s in large.stages] == [s.stride for s in backbone.stages]
    assert [s.num_layers for s in large.stages] == [2, 3, 3, 3]
    assert [s.num_layers for s in small.stages] == [1, 1, 1, 1]
    assert {s.squeeze_ratio for s in large.stages} == {None}  # fused
    assert {s.squeeze_ratio for s in small.stages} == {0.25}
    assert small.name != large.name == SPACE.network(last).name


def test_a_stage_that_keeps_the_maps_size_may_be_left_out_but_not_the_first():
    space = SearchConfig(name="x", backbone="b0", layer_changes=(-1, 0)).space()
    assert space.parameters["stage1.num_layers"] == (1,)
    assert space.parameters["stage2.num_layers"] == (1, 2)
    assert space.parameters["stage7.num_layers"] == (0, 1)
    chosen = {name: choices[0] for name, choices in space.parameters.items()}
    network = space.network(chosen)
    assert len(network.stages) == 6
    # What is chosen of a stage that is not there makes no other network.
    assert space.network(chosen | {"stage7.kernel_size": 5}) == network


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"operators": ()}, ("operators", "empty")),
        ({"kernel_sizes": (3, 3)}, ("kernel_sizes", "(3, 3)", "twice")),
        ({"kernel_sizes": (4,)}, ("kernel_size", 4, "odd")),
        ({"expand_ratios": (0,)}, ("expand_ratio", 0)),
        ({**FOUR_NETWORKS, "expand_ratios": (1,)}, ("one network", "more than one choice")),
        ({"backbone": "b99"}, ("b99", "v2-s")),
    ],
)
def test_an_empty_or_contradictory_space_is_refused(
    changes: dict[str, object], facts: tuple[object, ...]
):
    with raises_naming(ValueError, *facts):
        SearchConfig(name="x", **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"trials": 1001}, ("--trials", 1001, "1,000")),
        ({"hours": 0.0}, ("--hours", 0)),
        ({"turn_seconds": 0.0}, ("--turn-seconds", 0)),
        ({"w": float("nan")}, ("--w", "nan", "-10", "10")),
        ({"minival": 0.9}, ("--minival", 0.9, 0.5)),
        ({"target_artifact": "onnx"}, ("--target-artifact", "onnx", "ort", "ov-int8")),
        ({"target_artifact": "native-fp32"}, ("--target-artifact", "native-fp32")),
        ({"target_artifact": "int8"}, ("--target-artifact", "int8")),
        ({"rivals": ("b99",)}, ("b99", "v2-s")),
        ({"record": Path("x"), "trials": 5}, ("--trials", "--record")),
    ],
)
def test_values_outside_their_limits_are_refused(
    changes: dict[str, object], facts: tuple[object, ...]
):
    with raises_naming(ValueError, *facts):
        SearchConfig(**changes)  # type: ignore[arg-type]


def test_targets_are_a_runtime_and_a_precision():
    assert target_of("ov-int8") == ("ov.py", "int8")
    assert target_of("torch-trt") == ("torch_trt.py", "fp16")
    assert target_of("torch-trt-fp32") == ("torch_trt.py", "fp32")
    assert target_of("ort") == ("ort.py", "fp32")
    for name in TARGETS:
        command, usual = target_of(name)
        assert target_of(f"{name}-{usual}") == (command, usual), "the runtime has no such precision"


def test_the_reward_is_the_papers():
    paper = SearchConfig()
    assert paper.reward(0.8, 1, 1) == 0.8
    assert paper.reward(0.8, 2, 0.5) == pytest.approx(0.8 * 0.952638 * 1.035265, abs=1e-6)
    assert paper.reward(0.8, 1, 1, 2) == pytest.approx(0.8 * 2**-0.07)
    assert SearchConfig(w=0, v=0, u=0).reward(0.8, 9, 9, 9) == 0.8


def test_the_ratio_of_step_times_outlives_a_machine_that_gets_slower():
    now, slowness = 0, 1.0

    def step_of(ns: int):
        def step() -> None:
            nonlocal now, slowness
            now += round(ns * slowness)
            slowness *= 1.01  # all steps, the reference's too

        return step

    ratio = step_ratio(step_of(2_000), step_of(1_000), 6, 5e-6, clock=lambda: now)
    assert slowness > 1.5
    assert ratio.value == pytest.approx(2, rel=0.05)
    assert 0 < ratio.noise < 0.05
    assert ratio_of([2, 2, 20], [1, 1, 1]).value == 2  # one slow turn


def test_a_search_finds_a_network_that_trains_like_any_other(tmp_path: Path):
    config = brief(tmp_path, seeds=1, rivals=("tiny",), width=2.0)
    report = search_study.main(config)
    record = record_of(config)
    assert len(record.whole) == 3 and not outcomes(record)["failed"]
    best = record.best_trial
    assert best is not None and best.reward == max(t.reward or 0 for t in record.whole)
    assert (best.top1, best.step_ratio, best.size_ratio) != (None, None, None)
    assert best.reward == config.reward(best.top1 or 0, best.step_ratio or 0, best.size_ratio or 0)
    found = read_variant_file(tmp_path / "found.json")
    assert found == record.best and found.name == best.network
    assert [s.out_channels for s in record.space.backbone.stages] == [16, 32]
    trained = parse(["--variant-file", str(tmp_path / "found.json")])
    assert isinstance(trained, TrainConfig) and trained.spec == found
    # The found network, the reference and a rival, by one seed.
    assert Counter(run.role for run in record.compared) == {"found": 1, "reference": 1, "rival": 1}
    assert {run.seed for run in record.compared} == {1}
    text = report.read_text()
    require_named(
        text, "| trained to their end | 3 |", "two-width-2", "A * S^w * P^v", "tiny (rival)"
    )
    for name in ("reward", "plane", "choices"):
        assert (tmp_path / f"report-{name}.png").read_bytes().startswith(b"\x89PNG")

    # The same command again: nothing is trained. More trials: it goes on.
    assert searched(config).trials == record.trials
    more = searched(replace(config, trials=4))
    assert len(more.trials) == 4 and more.trials[:3] == record.trials

    # A record is published, with the same text.
    readme = tmp_path / "results.md"
    readme.write_text("<!-- search-brief: x -->\n<!-- /search-brief -->\n")
    assert section_name("brief") == "search-brief"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        published = search_study.main(
            SearchConfig(record=tmp_path / "search.json", publish=True, readme=readme)
        )
    assert (tmp_path / published).name == "search-brief.md"
    again = (tmp_path / published).read_text()
    assert again.replace("(search-brief-", "(report-") == text
    assert "found is better by" in readme.read_text()
    named = tmp_path / published.parent / "search-brief-found.json"
    assert read_variant_file(named) == found


def test_a_network_that_is_known_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    one = replace(VARIANTS["tiny"], name="one", stages=VARIANTS["tiny"].stages[:1])
    write_variant_file(tmp_path / "one.json", one, {})
    monkeypatch.setattr(worker, "MAX_REUSED_IN_A_ROW", 5)
    backbone = str(tmp_path / "one.json")
    record = searched(brief(tmp_path, **FOUR_NETWORKS, backbone=backbone, sampler="random"))
    assert record.space.num_choices == len(record.whole) == 2
    reused = [trial for trial in record.trials if trial.outcome == "reused"]
    assert len(reused) >= 5
    by_number = {trial.number: trial for trial in record.trials}
    for trial in reused:
        assert trial.reused is not None
        first = by_number[trial.reused]
        assert (first.network, first.reward) == (trial.network, trial.reward)
        assert first.outcome == "whole"

    # Of a worker that died while it chose.
    name, choice = next(iter(record.trials[0].chosen.items()))
    part = record.trials[0].model_copy(
        update={"outcome": "cut short", "network": None, "chosen": {name: choice}}
    )
    with_part = record.model_copy(update={"trials": (*record.trials, part)})
    assert choices_table(with_part) == choices_table(record)


def test_networks_that_diverge_count_as_failed_and_the_search_goes_on(tmp_path: Path):
    config = brief(tmp_path, trials=2, flags="--steps 3 --optimizer.learning-rate 1e30")
    record = searched(config)
    assert outcomes(record)["failed"] == 2 and record.best is None
    assert "finite" in str(record.trials[0].failure) or "nan" in str(record.trials[0].failure)
    search_study.write_found(record, tmp_path)
    assert not (tmp_path / "found.json").exists()
    require_named(to_markdown(record, {}), "| failed | 2 |", "nothing to show", "## Failures")


def test_a_network_for_which_memory_does_not_suffice_fails_and_the_next_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train, errors = worker.train, [MemoryError("no more")]
    errors.append(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))

    def failing(*args: Any) -> Any:
        if errors:
            raise errors.pop()
        return train(*args)

    monkeypatch.setattr(worker, "train", failing)
    record = searched(brief(tmp_path))
    assert [trial.outcome for trial in record.trials] == ["failed", "failed", "whole"]


def test_a_network_behind_the_others_is_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tops = iter([0.9, 0.9] * 4 + [0.1, 0.1])

    def fake(*args: Any) -> tuple[float, None]:
        for epoch in (1, 2):
            args[-1](top1 := next(tops), epoch)
        return top1, None

    monkeypatch.setattr(worker, "train", fake)
    for name, value in (("NUM_UNPRUNED_TRIALS", 3), ("NUM_UNPRUNED_EPOCHS", 0)):
        monkeypatch.setattr(f"training.searching.study.{name}", value)
    record = searched(brief(tmp_path, trials=5, w=0.0, v=0.0))
    assert [trial.outcome for trial in record.trials] == [*["whole"] * 4, "pruned"]


def test_a_front_has_no_single_reward(tmp_path: Path):
    record = searched(brief(tmp_path, pareto=True))
    search_study.write_found(record, tmp_path)
    assert len(record.whole) == 3 and record.setting["objective"] == "front"
    files = {path.name for path in (tmp_path / "front").iterdir()}
    assert files == {f"trial-{trial.number}.json" for trial in record.front}
    assert record.best_trial in record.whole
    assert pareto_front([(1, 5), (2, 4), (3, 7), (0.5, 1)]) == [(0.5, 1), (1, 5), (3, 7)]


def test_importances_say_what_the_reward_depends_on(tmp_path: Path):
    config = brief(tmp_path, **FOUR_NETWORKS, trials=1)
    (trial,) = searched(config).whole
    space = config.space()
    made = []
    for number in range(24):
        draw = random.Random(number)
        chosen = {name: draw.choice(choices) for name, choices in space.parameters.items()}
        reward = 0.9 if chosen["stage2.expand_ratio"] == 4 else 0.1
        made.append(trial.model_copy(update={"chosen": chosen, "reward": reward}))
    found = importances(space, made)
    assert next(iter(found)) == "stage2.expand_ratio" and found["stage2.expand_ratio"] > 0.9
    assert importances(space, made[:5]) == {}
    assert shares(space, made, "stage2.kernel_size") == {3: 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ort", "ov-int8"])
def test_the_latency_of_the_export_is_part_of_the_reward(tmp_path: Path, target: str):
    pytest.importorskip("onnxruntime" if target == "ort" else "openvino")
    config = brief(tmp_path, trials=1, target_artifact=target, flags="--steps 30")
    report = search_study.main(config)
    (trial,) = record_of(config).whole
    assert trial.latency_ratio is not None and trial.latency_ratio > 0
    assert trial.step_ratio is not None and trial.size_ratio is not None
    assert trial.reward == config.reward(
        trial.top1 or 0, trial.step_ratio, trial.size_ratio, trial.latency_ratio
    )
    assert "L^u" in report.read_text()
    assert not list(tmp_path.glob("artifacts*"))


def test_a_target_that_cannot_be_exported_to_is_told_before_any_network_is_tried(tmp_path: Path):
    # There is no GPU in tests.
    config = brief(tmp_path, target_artifact="trt")
    with raises_naming(SearchError, "--target-artifact trt", "export/trt.py"):
        search_study.main(config)
    assert not worker_of(config).trials()
    assert not list(tmp_path.glob("artifacts*"))
