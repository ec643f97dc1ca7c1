import json
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import optuna
import psycopg
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from processes import wait_until
from sqlalchemy.exc import OperationalError

from efficientnet.network.variant_file import read_variant_file, write_variant_file
from efficientnet.network.variants import VARIANTS
from training.recipe.config import TrainConfig
from training.running.command_line import parse
from training.searching import search_study, storage, worker
from training.searching.experiment import DivergedError, prepare
from training.searching.reward import Exponents
from training.searching.search_config import SearchConfig, target_of
from training.searching.search_pictures import pareto_front
from training.searching.search_record import SearchRecord, importances, read_record
from training.searching.search_report import section_name
from training.searching.search_tables import shares
from training.searching.space import SearchSpace
from training.searching.step_time import ratio_of, step_ratio
from training.searching.storage import StorageError, open_storage
from training.searching.study import NETWORK, TWIN, SearchError, open_study, setting_of
from training.searching.worker import Worker

ROOT = Path(__file__).resolve().parents[1]

# As little as a network can be trained and measured.
BRIEF = {
    "epochs": 1,
    "flags": "--steps 2",
    "turns": 2,
    "turn_seconds": 0.001,
    "seeds": 0,
    "name": "brief",
}
TWO_NETWORKS = {
    "operators": ("fused_mbconv",),
    "kernel_sizes": (3,),
    "expand_ratios": (1, 4),
    "layer_changes": (-9,),
}


def brief(output: Path, **changes: object) -> SearchConfig:
    return SearchConfig(**{**BRIEF, "trials": 3, "output": output, **changes})  # type: ignore[arg-type]


def one_expansion(output: Path, **changes: object) -> SearchConfig:
    """Few networks: of each stage one layer, fused, that expands by 1 or 4."""
    return brief(output, **{**TWO_NETWORKS, **changes})


def record_of(config: SearchConfig) -> SearchRecord:
    return read_record(config.directory / "search.json")


def worker_of(config: SearchConfig) -> Worker:
    experiment, space = prepare(config), config.space()
    opened = open_storage(config.storage, config.directory, 5, config.heartbeat)
    study = open_study(config, opened, setting_of(config, experiment, space))
    return Worker(config, experiment, space, study, opened, None)


SPACE = SearchConfig(name="x").space()


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
    ("changes", "said"),
    [
        ({"operators": ()}, "operators is empty"),
        ({"kernel_sizes": (3, 3)}, "given twice"),
        ({"kernel_sizes": (4,)}, "expected an odd one"),
        ({"expand_ratios": (0,)}, "expand_ratio is 0"),
        ({**TWO_NETWORKS, "expand_ratios": (1,)}, "one network only"),
        ({"backbone": "b99"}, "unknown variant"),
    ],
)
def test_an_empty_or_contradictory_space_is_refused(changes: dict[str, object], said: str):
    with pytest.raises(ValueError, match=said):
        SearchConfig(name="x", **changes).space()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trials": 1001}, "expected 0 to 1,000"),
        ({"hours": 0.0}, "hours is 0"),
        ({"w": float("nan")}, "expected -10 to 10"),
        ({"minival": 0.9}, "minival is 0.9"),
        ({"target_artifact": "onnx"}, "expected ort, ov"),
        ({"rivals": ("b99",)}, "unknown variant"),
        ({"record": Path("x"), "trials": 5}, "--trials given with --record"),
    ],
)
def test_values_outside_their_limits_are_refused(changes: dict[str, object], said: str):
    with pytest.raises(ValueError, match=said):
        SearchConfig(**changes)  # type: ignore[arg-type]


def test_targets_are_a_runtime_and_a_precision():
    assert target_of("ov-int8") == ("ov.py", "int8")
    assert target_of("torch-trt") == ("torch_trt.py", "fp16")
    assert target_of("torch-trt-fp32") == ("torch_trt.py", "fp32")
    assert target_of("ort") == ("ort.py", "fp32")


def test_the_reward_is_the_papers():
    paper = Exponents(-0.07, -0.05, -0.07)
    assert paper.reward(0.8, 1, 1) == 0.8
    assert paper.reward(0.8, 2, 0.5) == pytest.approx(0.8 * 0.952638 * 1.035265, abs=1e-6)
    assert paper.reward(0.8, 1, 1, 2) == pytest.approx(0.8 * 2**-0.07)
    assert Exponents(0, 0, 0).reward(0.8, 9, 9, 9) == 0.8


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
    assert ratio_of([2, 2, 20], [1, 1, 1]).value == pytest.approx(2)  # one slow turn


def test_a_search_finds_a_network_that_trains_like_any_other(tmp_path: Path):
    config = brief(tmp_path, trials=3, seeds=1, rivals=("tiny",), backbone="tiny", width=2.0)
    report = search_study.main(config)
    record = record_of(config)
    assert len(record.whole) == 3 and not record.count("failed")
    best = record.best_trial
    assert best is not None and best.reward == max(t.reward or 0 for t in record.whole)
    assert best.reward == pytest.approx(best.top1 * best.step_ratio**-0.07 * best.size_ratio**-0.05)
    found = read_variant_file(tmp_path / "found.json")
    assert found == record.best and found.name == best.network
    assert [s.out_channels for s in record.space.backbone.stages] == [16, 32, 48, 64]
    trained = parse(["--variant-file", str(tmp_path / "found.json")])
    assert isinstance(trained, TrainConfig) and trained.spec == found
    # The found network, the reference and a rival, by one seed.
    assert Counter(run.role for run in record.compared) == {"found": 1, "reference": 1, "rival": 1}
    assert {run.seed for run in record.compared} == {1}
    text = report.read_text()
    for said in ("## The found network", "Beside others", "3 networks", "tiny-width-2", "A * S^w"):
        assert said in text
    for name in ("reward", "plane", "choices"):
        assert (tmp_path / f"report-{name}.png").read_bytes().startswith(b"\x89PNG")

    # The same command again: nothing is trained. More trials: it goes on.
    before = (tmp_path / "search.json").read_bytes()
    search_study.main(config)
    assert record_of(config).trials == record.trials
    search_study.main(replace(config, trials=4, seeds=0))
    assert len(record_of(config).trials) == 4
    assert record_of(config).trials[:3] == record.trials

    # A record is written and published again.
    (tmp_path / "again.json").write_bytes(before)
    readme = tmp_path / "results.md"
    readme.write_text("<!-- search-brief: x -->\n<!-- /search-brief -->\n")
    assert section_name("brief") == "search-brief"
    search_study.main(SearchConfig(record=tmp_path / "again.json"))
    assert (tmp_path / "again.md").read_text().replace("again-", "report-") == text
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        published = search_study.main(
            SearchConfig(record=tmp_path / "again.json", publish=True, readme=readme)
        )
    assert (tmp_path / published).name == "search-brief.md"
    assert "found is better by" in readme.read_text()
    named = tmp_path / published.parent / "search-brief-found.json"
    assert read_variant_file(named) == found


def test_a_network_that_is_known_is_not_trained_again(tmp_path: Path):
    config = brief(tmp_path, **{**TWO_NETWORKS, "backbone": str(tmp_path / "one.json")})
    one = replace(VARIANTS["tiny"], name="one", stages=VARIANTS["tiny"].stages[:1])
    write_variant_file(tmp_path / "one.json", one, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "MAX_REUSED_IN_A_ROW", 10)
        search_study.main(replace(config, sampler="random"))
    record = record_of(config)
    assert record.space.num_choices == len(record.whole) == 2
    reused = [trial for trial in record.trials if trial.outcome == "reused"]
    assert len(reused) >= 10
    by_number = {trial.number: trial for trial in record.trials}
    for trial in reused:
        assert trial.reused is not None
        first = by_number[trial.reused]
        assert (first.network, first.reward) == (trial.network, trial.reward)
        assert first.outcome == "whole"


def test_networks_that_diverge_count_as_failed_and_the_search_goes_on(tmp_path: Path):
    config = brief(tmp_path, trials=3, flags="--steps 3 --optimizer.learning-rate 1e30")
    search_study.main(config)
    record = record_of(config)
    assert record.count("failed") == 3 and record.best is None
    assert "finite" in str(record.trials[0].failure) or "nan" in str(record.trials[0].failure)
    text = (tmp_path / "report.md").read_text()
    assert "3 failed" in text and "nothing to show" in text and "## Failures" in text
    assert not (tmp_path / "found.json").exists()


@pytest.mark.parametrize(
    "error",
    [
        DivergedError("the loss is nan"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError("no more"),
    ],
)
def test_a_failure_is_told_and_the_next_network_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    calls: list[str] = []
    train = worker.train

    def once(*args: object) -> object:
        calls.append("")
        if len(calls) == 1:
            raise error
        return train(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(worker, "train", once)
    config = brief(tmp_path, trials=2)
    search_study.main(config)
    assert [trial.outcome for trial in record_of(config).trials] == ["failed", "whole"]


def test_an_error_of_ours_is_not_taken_for_a_failed_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: object) -> object:
        raise RuntimeError("a bug")

    monkeypatch.setattr(worker, "train", broken)
    config = brief(tmp_path, trials=1)
    with pytest.raises(RuntimeError, match="a bug"):
        search_study.main(config)
    monkeypatch.undo()
    search_study.main(config)
    assert [trial.outcome for trial in record_of(config).trials] == ["cut short", "whole"]


def test_many_failures_in_a_row_end_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def diverging(*_: object) -> object:
        raise DivergedError("the loss is nan")

    monkeypatch.setattr(worker, "train", diverging)
    monkeypatch.setattr(worker, "MAX_FAILURES_IN_A_ROW", 3)
    with pytest.raises(SearchError, match="3 networks in a row failed, the last one: the loss"):
        search_study.main(brief(tmp_path, trials=50))


def test_a_network_behind_the_others_is_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tops = iter([0.9, 0.9] * 4 + [0.1, 0.1])

    def fake(*_: object) -> Iterator[float]:
        yield next(tops)
        yield next(tops)
        return None

    class Done:
        average = None

    def finishing(*args: object):
        yield from fake(*args)
        return Done

    monkeypatch.setattr(worker, "train", finishing)
    for name, value in (("NUM_UNPRUNED_TRIALS", 3), ("NUM_UNPRUNED_EPOCHS", 0)):
        monkeypatch.setattr(f"training.searching.study.{name}", value)
    config = brief(tmp_path, trials=5, w=0.0, v=0.0)
    search_study.main(config)
    assert [trial.outcome for trial in record_of(config).trials] == [*["whole"] * 4, "pruned"]


def test_a_study_of_another_space_or_data_is_refused_and_the_difference_named(tmp_path: Path):
    config = brief(tmp_path, trials=0)
    worker_of(config)
    for changes, said in (
        ({"kernel_sizes": (3,)}, r"kernel_sizes \[3, 5\] and now \[3\]"),
        ({"w": 0.0}, r"w -0\.07 and now 0\.0"),
        ({"backbone": "b0"}, "another backbone: tiny and now b0"),
        ({"minival": 0.3}, r"train images 11\d\d and now 100\d"),
        ({"image_size": 48}, "eval_image_size 32 and now 48"),
        ({"target_artifact": "ort"}, 'target_artifact null and now "ort"'),
    ):
        with pytest.raises(SearchError, match=said) as refused:
            worker_of(replace(config, **changes))
        assert "another --name" in str(refused.value)
    worker_of(replace(config, trials=9, hours=1.0, sampler="random", turns=3))


def test_two_workers_never_train_the_same_network(tmp_path: Path):
    one = worker_of(one_expansion(tmp_path))
    # The other one has chosen every network that there is and still trains them.
    names = list(one.space.parameters)
    rest = {name: choices[0] for name, choices in one.space.parameters.items()}
    expansions = [name for name in names if name.endswith("expand_ratio")]
    for number in range(2 ** len(expansions)):
        bits = {e: (1, 4)[number >> i & 1] for i, e in enumerate(expansions)}
        one.study.enqueue_trial(rest | bits)
        other = one.study.ask()
        chosen = {n: other.suggest_categorical(n, c) for n, c in one.space.parameters.items()}
        other.set_user_attr(NETWORK, one.space.network(chosen).name)
        one.storage.record_heartbeat(other._trial_id)
    told = one._one_trial()
    assert told is not None
    assert told.state == TrialState.FAIL and TWIN in told.user_attrs
    assert one.others_are_at_work()


def test_a_dead_workers_network_is_trained_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = one_expansion(tmp_path, trials=1, heartbeat=1)
    one = worker_of(config)
    trial = one.study.ask()
    chosen = {n: trial.suggest_categorical(n, c) for n, c in one.space.parameters.items()}
    trial.set_user_attr(NETWORK, one.space.network(chosen).name)
    one.storage.record_heartbeat(trial._trial_id)
    assert one.others_are_at_work()
    one.storage.grace_period = 1
    assert wait_until(lambda: not one.others_are_at_work(), 10)
    one.study.enqueue_trial(chosen)
    one.run()
    states = [t.state for t in one.trials()]
    assert states == [TrialState.FAIL, TrialState.COMPLETE]
    assert one.trials()[0].user_attrs[NETWORK] == one.trials()[1].user_attrs[NETWORK]


def test_a_worker_that_died_before_it_said_its_network_is_not_waited_for_without_end(
    tmp_path: Path,
):
    config = one_expansion(tmp_path, trials=1, heartbeat=1)
    one = worker_of(config)
    one.study.ask()  # and no more was heard of it
    one.storage.grace_period = 1
    told = one._one_trial()
    assert told is not None and told.state == TrialState.COMPLETE
    assert one.trials()[0].state == TrialState.FAIL


def test_an_interrupted_network_counts_as_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "train", interrupted)
    config = brief(tmp_path, trials=1)
    with pytest.raises(
        KeyboardInterrupt, match=r"interrupted in trial 0.*the same command goes on"
    ):
        search_study.main(config)
    monkeypatch.undo()
    search_study.main(config)
    assert [trial.outcome for trial in record_of(config).trials] == ["cut short", "whole"]


def test_a_front_has_no_single_reward(tmp_path: Path):
    config = brief(tmp_path, trials=4, pareto=True)
    search_study.main(config)
    record = record_of(config)
    assert len(record.whole) == 4 and record.setting["objective"] == "front"
    files = {path.name for path in (tmp_path / "front").iterdir()}
    assert files == {f"trial-{trial.number}.json" for trial in record.front}
    assert record.best_trial in record.whole
    assert pareto_front([(1, 5), (2, 4), (3, 7), (0.5, 1)]) == [(0.5, 1), (1, 5), (3, 7)]


def test_importances_say_what_the_reward_depends_on(tmp_path: Path):
    config = one_expansion(tmp_path, trials=1)
    search_study.main(config)
    (trial,) = record_of(config).whole
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


def gone(*_: object) -> OperationalError:
    return OperationalError("x", {}, Exception("server closed the connection"))


def test_a_database_that_goes_away_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage, "SECONDS_BETWEEN_TRIES", 0.01)
    opened = open_storage(None, tmp_path, 5, 20)
    study = optuna.create_study(storage=opened)
    left = 3

    real = RDBStorage._create_new_trial

    def shaky(*args: object, **named: object) -> object:
        nonlocal left
        left -= 1
        if left >= 0:
            raise gone()
        return real(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(RDBStorage, "_create_new_trial", shaky)
    assert study.ask().number == 0
    assert left < 0
    left, opened.wait_s = 10**9, 0.05
    with pytest.raises(StorageError, match=r"(?s)has not answered.*the same command again"):
        study.ask()


def test_an_error_that_waiting_does_not_mend_is_raised_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    opened = open_storage(None, tmp_path, 5, 20)
    with pytest.raises(KeyError):
        opened.get_trial(99)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://nobody@127.0.0.1:1/none", "cannot be used"),
        ("oracel://x/y", "expected postgresql://USER@HOST/DATABASE"),
        ("runs/study.db", "expected postgresql://USER@HOST/DATABASE"),
        ("postgresql://me:secret@127.0.0.1:1/none", "cannot be used"),
    ],
)
def test_a_database_that_cannot_be_used_is_told_at_once_without_its_password(
    tmp_path: Path, url: str, said: str
):
    with pytest.raises(StorageError, match=said) as refused:
        open_storage(url, tmp_path, 60, 20)
    assert "secret" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ort", "ov-int8"])
def test_the_latency_of_the_export_is_part_of_the_reward(tmp_path: Path, target: str):
    pytest.importorskip("onnxruntime" if target == "ort" else "openvino")
    config = brief(tmp_path, trials=1, target_artifact=target, flags="--steps 30")
    report = search_study.main(config)
    (trial,) = record_of(config).whole
    assert trial.latency_ratio is not None and trial.latency_ratio > 0
    assert trial.reward == pytest.approx(
        trial.top1 * trial.step_ratio**-0.07 * trial.size_ratio**-0.05 * trial.latency_ratio**-0.07
    )
    assert "L^u" in report.read_text()
    assert sorted(path.name for path in (tmp_path / "artifacts").iterdir()) == ["reference"]


def test_a_target_that_cannot_be_exported_to_ends_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(
        __import__("training.searching.search_config", fromlist=["TARGETS"]).TARGETS,
        "trt",
        ("missing.py", "fp16"),
    )
    with pytest.raises(SearchError, match="the reference cannot be exported"):
        search_study.main(brief(tmp_path, target_artifact="trt"))


def server_programs() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


@pytest.fixture(name="server")
def _server() -> Iterator["Server"]:
    programs = server_programs()
    if programs is None or shutil.which("setpriv") is None:
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    # Not in tmp_path, which another user, as whom it must run, may not look into.
    folder = Path(tempfile.mkdtemp(prefix="search-server-"))
    try:
        server = Server(programs, folder)
        server.start()
        yield server
        server.stop()
    finally:
        shutil.rmtree(folder)


class Server:
    """A PostgreSQL of this test's own, on loopback."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs, self._folder = programs, folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._as_user: list[str] = []
        if os.getuid() == 0:  # It refuses to run as root.
            user = pwd.getpwnam("postgres")
            os.chown(folder, user.pw_uid, user.pw_gid)
            ids = ["--reuid", str(user.pw_uid), "--regid", str(user.pw_gid), "--clear-groups"]
            self._as_user = ["setpriv", *ids]
        self._run("initdb", "-D", folder / "data", "-U", "tester", "--auth", "trust", "-N")

    @property
    def url(self) -> str:
        return f"postgresql://tester@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = f"-p {self.port} -k {self._folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        log = self._folder / "log"
        self._run("pg_ctl", "start", "-w", "-D", self._folder / "data", "-l", log, "-o", options)

    def stop(self) -> None:
        self._run("pg_ctl", "stop", "-w", "-m", "fast", "-D", self._folder / "data")

    def _run(self, program: str, *arguments: object) -> None:
        words = [*self._as_user, str(self._programs / program), *map(str, arguments)]
        subprocess.run(
            words, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL, cwd="/"
        )

    def numbers(self, query: str) -> list[int]:
        with psycopg.connect(self.url) as connection:
            return [row[0] for row in connection.execute(query).fetchall()]


@pytest.mark.slow
def test_four_workers_share_a_server_that_goes_away_and_one_of_them_is_killed(
    server: Server, tmp_path: Path
):
    trials = 14
    words = [sys.executable, str(ROOT / "training/search.py"), "--storage", server.url]
    words += ["--epochs", "1", "--flags=--steps 2", "--turns", "2", "--turn-seconds", "0.01"]
    words += ["--seeds", "0", "--name", "shared", "--trials", str(trials), "--heartbeat", "1"]
    words += ["--kernel-sizes", "3", "--operators", "mbconv"]
    logs = [tmp_path / f"worker-{number}.log" for number in range(4)]
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for number, path in enumerate(logs):
            with path.open("wb") as output:
                workers.append(
                    subprocess.Popen(
                        [*words, "--output", str(tmp_path / f"worker-{number}")],
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        cwd=ROOT,
                        env=os.environ | {"PYTHONPATH": str(ROOT)},
                    )
                )
        told = "select count(*)::int from trials where state = 'COMPLETE'"

        def has(count: int) -> bool:
            try:
                return server.numbers(told) >= [count]
            except psycopg.errors.UndefinedTable:
                return False

        assert wait_until(lambda: has(2), 200), [path.read_text() for path in logs]
        workers[0].send_signal(signal.SIGKILL)
        workers[0].wait()
        server.stop()
        time.sleep(6)
        server.start()
        for process in workers[1:]:
            assert process.wait(timeout=400) == 0, [path.read_text() for path in logs]
    finally:
        for process in workers:
            process.kill()
            process.wait()
    assert any("waiting" in path.read_text() for path in logs[1:])
    assert any("answers again" in path.read_text() for path in logs[1:])
    # The last to end has all of it.
    records = [
        SearchRecord.model_validate_json((tmp_path / f"worker-{n}" / "search.json").read_text())
        for n in (1, 2, 3)
    ]
    record = max(records, key=lambda r: len(r.whole) + r.count("pruned"))
    trained = [t for t in record.trials if t.outcome in ("whole", "pruned", "failed")]
    assert trials <= len(trained) <= trials + 3
    assert len({trial.network for trial in trained}) == len(trained)  # none twice
    assert not record.count("failed")
    assert json.loads((tmp_path / "worker-1" / "search.json").read_text())["name"] == "shared"


def test_the_space_of_a_record_is_the_configs(tmp_path: Path):
    space = SearchConfig(name="x").space()
    assert SearchSpace.model_validate_json(space.model_dump_json()) == space
