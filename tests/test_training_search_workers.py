import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from facts import raises_naming
from optuna.trial import TrialState
from processes import wait_until
from searches import FOUR_NETWORKS, brief, outcomes, searched, worker_of
from sqlalchemy import NullPool, create_engine, event, text
from sqlalchemy.exc import OperationalError, PendingRollbackError, ProgrammingError

from training.searching import storage, worker
from training.searching.experiment import DivergedError
from training.searching.search_record import read_record
from training.searching.storage import StorageError, open_storage
from training.searching.study import NETWORK, TWIN, SearchError
from training.searching.worker import Worker

ROOT = Path(__file__).resolve().parents[1]


def begin_elsewhere(one: Worker, **chosen: object) -> dict[str, Any]:
    """Begin a trial as another worker would, and give one sign of life of it."""
    first = {name: choices[0] for name, choices in one.space.parameters.items()}
    one.study.enqueue_trial(first | chosen)
    other = one.study.ask()
    taken = {n: other.suggest_categorical(n, c) for n, c in one.space.parameters.items()}
    other.set_user_attr(NETWORK, one.space.network(taken).name)
    one.storage.record_heartbeat(other._trial_id)
    return taken


@pytest.mark.parametrize(
    ("error", "facts"),
    [
        (RuntimeError("a bug"), ("a bug",)),
        (KeyboardInterrupt(), ("trial 0", "not trained", "the same command")),
    ],
)
def test_a_bug_and_an_interruption_leave_a_network_that_counts_as_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, facts: tuple[str, ...]
):
    def raising(*_: object) -> object:
        raise error

    monkeypatch.setattr(worker, "train", raising)
    config = brief(tmp_path, trials=1)
    with raises_naming(type(error), *facts):
        searched(config)
    monkeypatch.undo()
    assert [trial.outcome for trial in searched(config).trials] == ["cut short", "whole"]


def test_many_failures_in_a_row_end_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def diverging(*_: object) -> object:
        raise DivergedError("the loss is nan")

    monkeypatch.setattr(worker, "train", diverging)
    monkeypatch.setattr(worker, "MAX_FAILURES_IN_A_ROW", 3)
    with raises_naming(SearchError, "3 networks in a row", "the loss is nan"):
        searched(brief(tmp_path, trials=50))


def test_a_study_of_another_space_or_data_is_refused_and_the_difference_named(tmp_path: Path):
    config = brief(tmp_path, trials=0)
    worker_of(config)
    for changes, facts in (
        ({"kernel_sizes": (3,)}, ("kernel_sizes [3, 5] and now [3]",)),
        ({"w": 0.0}, ("w -0.07 and now 0.0",)),
        ({"backbone": "b0"}, ("backbone", "two and now b0")),
        ({"minival": 0.3}, ("minival 0.05 and now 0.3", "train images")),
        ({"target_artifact": "ort"}, ('target_artifact null and now "ort"',)),
    ):
        with raises_naming(SearchError, *facts, "brief", "another --name"):
            worker_of(replace(config, **changes))
    worker_of(replace(config, trials=9, hours=1.0, sampler="random", turns=3))


def test_two_workers_never_train_the_same_network(tmp_path: Path):
    one = worker_of(brief(tmp_path, **FOUR_NETWORKS))
    # The other one has chosen every network that there is and still trains them.
    for first in (1, 4):
        for second in (1, 4):
            begin_elsewhere(one, **{"stage1.expand_ratio": first, "stage2.expand_ratio": second})
    told = one._one_trial()
    assert told is not None
    assert told.state == TrialState.FAIL and TWIN in told.user_attrs
    assert one.others_are_at_work()


def test_a_dead_workers_network_is_trained_by_the_next(tmp_path: Path):
    one = worker_of(brief(tmp_path, **FOUR_NETWORKS, trials=1, heartbeat=1))
    chosen = begin_elsewhere(one)
    assert one.others_are_at_work()
    one.storage.grace_period = 1
    assert wait_until(lambda: not one.others_are_at_work(), 10)
    one.study.enqueue_trial(chosen)
    one.run()
    assert [t.state for t in one.trials()] == [TrialState.FAIL, TrialState.COMPLETE]
    assert one.trials()[0].user_attrs[NETWORK] == one.trials()[1].user_attrs[NETWORK]


def test_a_worker_that_died_before_it_said_its_network_is_not_waited_for_without_end(
    tmp_path: Path,
):
    one = worker_of(brief(tmp_path, **FOUR_NETWORKS, trials=1, heartbeat=1))
    one.study.ask()  # and no more was heard of it
    one.storage.grace_period = 1
    told = one._one_trial()
    assert told is not None and told.state == TrialState.COMPLETE
    assert one.trials()[0].state == TrialState.FAIL


@pytest.mark.parametrize(
    "lost",
    [
        OperationalError("x", {}, Exception("server closed the connection")),
        # What a second query within a session that lost its connection gives.
        PendingRollbackError("server closed the connection"),
    ],
)
def test_a_database_that_goes_away_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: Exception
):
    monkeypatch.setattr(storage, "SECONDS_BETWEEN_TRIES", 0.01)
    opened = open_storage(None, tmp_path, 5, 20)
    study = optuna.create_study(storage=opened)
    num_lost = 0

    def lose(*_: object) -> None:
        nonlocal num_lost
        if num_lost < 3:
            num_lost += 1
            raise lost

    event.listen(opened.engine, "before_cursor_execute", lose)
    # Everything that a trial tells, each with a database that is away at first.
    trial = study.ask()
    for tell in (
        lambda: trial.suggest_categorical("a", [1, 2]),
        lambda: trial.set_user_attr("network", "x"),
        lambda: trial.report(0.5, 1),
        lambda: opened.record_heartbeat(trial._trial_id),
        lambda: opened._get_stale_trial_ids(study._study_id),
        lambda: study.get_trials(),
        lambda: study.user_attrs,
        lambda: study.set_user_attr("x", 1),
        lambda: opened.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [0.5]),
    ):
        assert num_lost == 3
        num_lost = 0
        tell()
    num_lost, opened.wait_s = -(10**9), 0.05
    with raises_naming(StorageError, "server closed the connection", "the same command"):
        study.ask()


def test_an_error_that_waiting_does_not_mend_is_raised_at_once(tmp_path: Path):
    opened = open_storage(None, tmp_path, 5, 20)
    with pytest.raises(KeyError):
        opened.get_trial(99)


EXPECTED = "postgresql://USER@HOST/DATABASE or mysql://USER@HOST/DATABASE"


@pytest.mark.parametrize(
    ("url", "facts"),
    [
        ("postgresql://nobody@127.0.0.1:1/none", ("127.0.0.1:1/none", EXPECTED)),
        ("mysql://nobody@127.0.0.1:1/none", ("127.0.0.1:1/none", EXPECTED)),
        ("oracel://x/y", ("oracel://x/y", EXPECTED)),
        ("runs/study.db", ("runs/study.db", EXPECTED)),
        ("mysql://me:secret@host:port/x", ("mysql://me:***@host:port/x", EXPECTED)),
        ("mariadb://me:secret@127.0.0.1:1/none", ("mariadb://me:***@127.0.0.1", EXPECTED)),
    ],
)
def test_a_database_that_cannot_be_used_is_told_at_once_without_its_password(
    tmp_path: Path, url: str, facts: tuple[str, ...]
):
    with raises_naming(StorageError, *facts) as refused:
        open_storage(url, tmp_path, 60, 20)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "driver"), [("postgresql://me@x/y", "psycopg"), ("mysql://me:secret@x/y", "pymysql")]
)
def test_a_driver_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, driver: str
):
    monkeypatch.setitem(sys.modules, driver, None)
    with raises_naming(StorageError, url.replace("secret", "***"), driver, ".[search]"):
        open_storage(url, tmp_path, 60, 20)


def test_a_folder_that_cannot_be_written_is_told_at_once(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with raises_naming(StorageError, tmp_path / "file", "--output"):
        open_storage(None, tmp_path / "file", 60, 20)


@dataclass(frozen=True)
class Kind:
    """A database server of Debian's: how it is made, run and reached."""

    package: str
    user: str
    make: str
    serve: str
    url: str
    stopped_by: signal.Signals


KINDS = {
    "PostgreSQL": Kind(
        "postgresql",
        "postgres",
        "initdb -D {folder}/data -U tester --auth trust -N",
        "postgres -D {folder}/data -k {folder} -p {port} -c listen_addresses=127.0.0.1 -F",
        "postgresql://tester@127.0.0.1:{port}/postgres",
        signal.SIGINT,
    ),
    "MariaDB": Kind(
        "mariadb-server",
        "mysql",
        "mariadb-install-db --no-defaults --datadir={folder}/data --skip-name-resolve "
        "--auth-root-authentication-method=normal",
        "mariadbd --no-defaults --datadir={folder}/data --socket={folder}/socket --port={port} "
        "--pid-file={folder}/pid --bind-address=127.0.0.1 --innodb-flush-log-at-trx-commit=0",
        "mysql://root@127.0.0.1:{port}/test",
        signal.SIGTERM,
    ),
}
PLACES = [*map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"))), "/usr/sbin", os.defpath]


class Server:
    """A database server of this test's own, on loopback."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        self._kind, self._folder = kind, folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = kind.url.format(port=self._port)
        self._as_user: list[str] = []
        if os.getuid() == 0:  # It refuses to run as root.
            user = pwd.getpwnam(kind.user)
            os.chown(folder, user.pw_uid, user.pw_gid)
            ids = ["--reuid", str(user.pw_uid), "--regid", str(user.pw_gid), "--clear-groups"]
            self._as_user = ["setpriv", *ids]
        assert self._begin(kind.make).wait() == 0, self._told()

    def start(self) -> None:
        self._process = self._begin(self._kind.serve)
        assert wait_until(self._answers, 30), self._told()

    def stop(self) -> None:
        self._process.send_signal(self._kind.stopped_by)
        self._process.wait()

    def _answers(self) -> bool:
        try:
            self.number("select 1")
        except OperationalError:
            return False
        return True

    def _begin(self, command: str) -> subprocess.Popen[bytes]:
        program, *flags = command.format(folder=self._folder, port=self._port).split()
        found = shutil.which(program, path=os.pathsep.join(PLACES))
        assert found is not None
        with (self._folder / "log").open("ab") as log:
            return subprocess.Popen(
                [*self._as_user, found, *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
            )

    def _told(self) -> str:
        return (self._folder / "log").read_text()

    def number(self, query: str) -> int:
        engine = create_engine(storage._with_driver(self.url), poolclass=NullPool)
        with engine.connect() as connection:
            return connection.execute(text(query)).scalar_one()


@pytest.fixture(name="server", params=KINDS)
def _server(request: pytest.FixtureRequest) -> Iterator[Server]:
    kind = KINDS[request.param]
    programs = (kind.make.split()[0], kind.serve.split()[0], "setpriv")
    if None in (shutil.which(name, path=os.pathsep.join(PLACES)) for name in programs):
        pytest.skip(f"{request.param} is not installed (Debian: {kind.package})")
    # Not in tmp_path, which another user, as whom it must run, may not look into.
    folder = Path(tempfile.mkdtemp(prefix="search-server-"))
    try:
        server = Server(kind, folder)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


def test_a_server_that_is_started_again_is_waited_for_and_nothing_told_is_lost(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(storage, "SECONDS_BETWEEN_TRIES", 0.2)
    opened = open_storage(server.url, tmp_path, 60, 20)
    study = optuna.create_study(storage=opened)
    trial = study.ask()
    chosen = trial.suggest_categorical("a", [1, 2])
    server.stop()
    restart = threading.Timer(0.5, server.start)
    restart.start()
    trial.set_user_attr(NETWORK, "x" * 300)
    trial.report(0.1 + 0.2, 1)
    opened.record_heartbeat(trial._trial_id)
    study.tell(trial, 1 / 3)
    restart.join()
    assert opened.back_since > 0
    again = open_storage(server.url, tmp_path, 60, 20)
    (told,) = again.get_all_trials(study._study_id)
    assert (told.params, told.user_attrs) == ({"a": chosen}, {NETWORK: "x" * 300})
    assert (told.intermediate_values, told.value) == ({1: 0.1 + 0.2}, 1 / 3)
    assert opened._get_stale_trial_ids(study._study_id) == []
    for one in (opened, again):
        one.scoped_session.remove()
        one.engine.dispose()


@pytest.mark.slow
def test_four_workers_share_a_server_that_goes_away_and_one_of_them_is_killed(
    server: Server, tmp_path: Path
):
    trials = 14
    words = [sys.executable, str(ROOT / "training/search.py"), "--storage", server.url]
    words += ["--epochs", "1", "--flags=--steps 2", "--turns", "2", "--turn-seconds", "0.01"]
    words += ["--seeds", "0", "--name", "shared", "--trials", str(trials), "--heartbeat", "2"]
    words += ["--kernel-sizes", "3", "--operators", "mbconv"]
    logs = [tmp_path / f"worker-{number}.log" for number in range(4)]
    workers: list[subprocess.Popen[bytes]] = []

    def begin(number: int) -> subprocess.Popen[bytes]:
        with logs[number].open("ab") as output:
            return subprocess.Popen(
                [*words, "--output", str(tmp_path / f"worker-{number}")],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )

    try:
        workers += [begin(number) for number in range(len(logs))]

        def has(count: int) -> bool:
            try:
                told = "select count(*) from trials where state = 'COMPLETE'"
                return server.number(told) >= count
            except ProgrammingError:
                return False  # no table yet

        assert wait_until(lambda: has(2), 200), [path.read_text() for path in logs]
        workers[0].send_signal(signal.SIGKILL)
        workers[0].wait()
        server.stop()
        time.sleep(14)
        server.start()
        workers[0] = begin(0)  # the same command again
        for process in workers:
            assert process.wait(timeout=400) == 0, [path.read_text() for path in logs]
    finally:
        for process in workers:
            process.kill()
            process.wait()
    assert any("waiting" in path.read_text() for path in logs[1:])
    assert any("answers again" in path.read_text() for path in logs[1:])
    # The last to end has all of it.
    records = [read_record(tmp_path / f"worker-{number}" / "search.json") for number in range(4)]
    record = max(records, key=lambda r: len(r.whole) + outcomes(r)["pruned"])
    trained = [t for t in record.trials if t.outcome in ("whole", "pruned", "failed")]
    assert trials <= len(trained) <= trials + 3
    assert len({trial.network for trial in trained}) == len(trained)  # none twice
    assert not outcomes(record)["failed"]
    # Nobody's but the killed one's, although the server was away longer than a dead worker is
    # waited for.
    assert outcomes(record)["cut short"] <= 1
