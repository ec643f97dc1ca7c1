"""An address -> Optuna's study, on a file or a database that may go away for a while.

The file is SQLite's and not Optuna's journal: a journal knows no signs of life, by which the trial
of a killed worker is found, and with SQLite a file and a server are one way through Optuna. SQLite
needs a disk of this machine; workers on several machines take PostgreSQL or MySQL.
"""

import functools
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    PendingRollbackError,
    ProgrammingError,
    SQLAlchemyError,
)

from efficientnet.errors import PipelineError

# Seconds without a sign of life after which a worker is dead, over those between two signs.
GRACE = 6
SECONDS_BETWEEN_TRIES = 2.0
# Until all workers have noticed that the database answers again.
RETURN_S = 3 * SECONDS_BETWEEN_TRIES
# Workers that begin at the same moment all want to make the tables; one of them does.
NUM_FIRST_TRIES = 10

# The address of a server -> the driver that is installed with the extra "search". MariaDB is told
# as MySQL: Optuna knows it by that name only.
DRIVERS = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
DRIVERS |= {"mysql": "mysql+pymysql", "mariadb": "mysql+pymysql"}
EXPECTED_URL = "postgresql://USER@HOST/DATABASE or mysql://USER@HOST/DATABASE"

WAITED_FOR = (
    "set_study_user_attr",
    "get_study_user_attrs",
    "get_study_system_attrs",
    "get_study_directions",
    "create_new_study",
    "get_study_id_from_name",
    # These two are what Optuna's cache before the storage calls.
    "_create_new_trial",
    "_set_trial_param",
    "set_trial_state_values",
    "set_trial_intermediate_value",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "get_trial",
    "get_trial_id_from_study_id_trial_number",
    "_get_trials",
    "record_heartbeat",
    "_get_stale_trial_ids",
)

log = logging.getLogger(__name__)


class StorageError(PipelineError):
    """A database that cannot be used."""


class PatientStorage(RDBStorage):
    """A storage whose every call waits for a database that went away, and then goes on."""

    def __init__(self, url: str, wait_s: float, heartbeat: int, **options: Any) -> None:
        super().__init__(url, **options)
        self.wait_s = wait_s
        # Not through the constructor, which warns that they are experimental. Set, they make
        # _get_stale_trial_ids work.
        self.heartbeat_interval, self.grace_period = heartbeat, GRACE * heartbeat
        self.back_since = -math.inf
        """When, of time.monotonic, it answered again after it was away."""

    def get_heartbeat_interval(self) -> None:
        """Keep Optuna from giving signs of life itself: see signs_of_life."""
        return None

    def fail_stale_trials(self, study_id: int) -> None:
        """Give up the trials of workers that are dead: their networks count as not trained."""
        assert self.heartbeat_interval is not None
        if time.monotonic() - self.back_since < self.heartbeat_interval + RETURN_S:
            return  # The living, too, could give no sign of life.
        for trial_id in self._get_stale_trial_ids(study_id):
            with suppress(UpdateFinishedTrialError):  # Another worker was faster.
                self.set_trial_state_values(trial_id, TrialState.FAIL)


def _waiting(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: PatientStorage, *args: Any, **named: Any) -> Any:
        away_since: float | None = None
        while True:
            try:
                answer = method(self, *args, **named)
            except (StorageInternalError, SQLAlchemyError) as error:
                if not _is_away(error):
                    raise
                now = time.monotonic()
                if away_since is None:
                    away_since = now
                    log.warning("the database does not answer (%s): waiting", _reason(error))
                if now - away_since > self.wait_s:
                    raise StorageError(
                        f"the database has not answered for {self.wait_s / 60:.0f} minutes "
                        f"({_reason(error)}); what was told it before is there: start it and give "
                        "the same command again, which goes on"
                    ) from None
                time.sleep(SECONDS_BETWEEN_TRIES)
                continue
            if away_since is not None:
                self.back_since = time.monotonic()
                seconds = self.back_since - away_since
                log.warning("the database answers again, after %.0f s", seconds)
            return answer

    return call


for _name in WAITED_FOR:
    setattr(PatientStorage, _name, _waiting(getattr(RDBStorage, _name)))


def _is_away(error: BaseException) -> bool:
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if isinstance(cause, DBAPIError) and cause.connection_invalidated:
        return True
    # The last: Optuna asks in another way, in the same session, when the first one has failed.
    return isinstance(cause, OperationalError | InterfaceError | PendingRollbackError)


def _reason(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    origin = getattr(cause, "orig", None) or cause or error
    lines = str(origin).strip().splitlines()
    return lines[0] if lines else type(origin).__name__


def open_storage(url: str | None, folder: Path, wait_s: float, heartbeat: int) -> PatientStorage:
    """Open a database, or the file study.db of a folder; tables that are missing are made."""
    options: dict[str, Any] = {"engine_kwargs": {"pool_pre_ping": True}}
    if url is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"the study cannot be kept in {folder}: {error.strerror}; expected a folder that "
                "may be written: choose another one with --output"
            ) from None
        address = f"sqlite:///{folder / 'study.db'}"
        options["engine_kwargs"] = {"connect_args": {"timeout": 60}}
    else:
        address = _with_driver(url)
    expected = "a disk of this machine that may be written: choose another folder with --output"
    if url is not None:
        expected = f"a database that exists, runs and may be written, as {EXPECTED_URL}"
    races = (IntegrityError, ProgrammingError, StorageInternalError)
    for number in range(NUM_FIRST_TRIES):
        try:
            return PatientStorage(address, wait_s, heartbeat, **options)
        except (OperationalError, ImportError, RuntimeError, *races) as error:
            # "already exists": another worker was faster.
            is_race = isinstance(error, races) or "exists" in str(error)
            if is_race and number + 1 < NUM_FIRST_TRIES:
                time.sleep(0.2 * (number + 1))
                continue
            shown = _shown(url or address)
            raise StorageError(
                f"{shown} cannot be used: {_reason(error)}; expected {expected}"
            ) from None
    raise AssertionError


def _with_driver(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    address = f"{DRIVERS.get(scheme, scheme)}{separator}{rest}"
    try:
        make_url(address).get_dialect().import_dbapi()
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise StorageError(
            f"--storage is {_shown(url)}, expected {EXPECTED_URL}: {str(error).splitlines()[0]}"
        ) from None
    except ImportError as error:
        raise StorageError(
            f"--storage is {_shown(url)}, whose driver is not installed ({error}): "
            'pip install ".[search]", which brings psycopg for PostgreSQL and PyMySQL for MySQL'
        ) from None
    return address


def _shown(url: str) -> str:
    # A password is nobody's business in a log.
    return re.sub("(://[^:/@]*):.*@", r"\1:***@", url)


@contextmanager
def signs_of_life(storage: PatientStorage, trial_id: int) -> Generator[None]:
    """Tell the others, from a thread, that this process works on a trial."""
    storage.record_heartbeat(trial_id)
    is_over = threading.Event()
    interval = storage.heartbeat_interval
    assert interval is not None

    def tell() -> None:
        while not is_over.wait(interval):
            try:
                storage.record_heartbeat(trial_id)
            except StorageError:
                return  # The work itself finds out, and says it.

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
