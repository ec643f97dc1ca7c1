"""`python serving/run.py ...` -> a fork of a process that has imported what it would."""

import logging
import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NoReturn

from processes import fork

from efficientnet.command import parse_flags, run_command
from serving import run, supervisor
from serving.settings import read_settings

RUN = "serving/run.py"


def start_service(command: list[str], **how: Any) -> Any:
    """Start a service as a fork, and every other command as `subprocess.Popen` does."""
    is_service = command[1].endswith(RUN)
    return (ServiceProcess if is_service else subprocess.Popen)(command, **how)


class ServiceProcess:
    """A service that `subprocess.Popen` would start, without the seconds that its imports take.

    Told to end, it waits for new connections only where CLASSIFIER_DRAIN_S says how long.

    Args:
        command: python serving/run.py, and its flags.
        cwd: as the service has it.
        env: likewise.
        stdout: of the service, and its stderr.
        start_new_session: as in subprocess.
        how: what is the same for every service.
    """

    def __init__(
        self,
        command: list[str],
        *,
        stdout: IO[bytes],
        cwd: str | Path = ".",
        env: Mapping[str, str] | None = None,
        start_new_session: bool = False,
        **how: Any,
    ) -> None:
        assert how.keys() <= {"stdin", "stderr"}, how
        environment = dict(os.environ if env is None else env)
        log = Path(f"/proc/{os.getpid()}/fd/{stdout.fileno()}").resolve()
        arguments = (command[2:], Path(cwd).resolve(), environment, log, start_new_session)
        self._process = fork(_become, *arguments, preloaded="preloaded_service")
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """How it ended, as subprocess tells it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return how it ended, or None."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(RUN, timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM, if it has not ended."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL, if it has not ended."""
        self.send_signal(signal.SIGKILL)


class _Replaced(BaseException):
    """What comes in the place of os.execve, which would import all anew."""


def _become(
    flags: list[str], cwd: Path, environment: dict[str, str], log: Path, is_session: bool
) -> NoReturn:
    for number in range(3):
        path, mode = (log, os.O_WRONLY | os.O_APPEND) if number else (os.devnull, os.O_RDONLY)
        os.dup2(os.open(path, mode), number)
    if is_session:
        os.setsid()
    os.chdir(cwd)
    command: list[str] = []

    def replace_process(_: str, words: list[str], variables: dict[str, str]) -> NoReturn:
        command.extend(words)
        _set_environment(variables)
        raise _Replaced

    os.execve = replace_process
    _set_environment(environment)
    logging.root.handlers.clear()  # of what is loaded already
    try:
        run_command(lambda: parse_flags(run.ServeConfig, None, flags), run.main)
    except _Replaced:
        logging.root.handlers.clear()
    assert command[1:3] == ["-m", "serving.supervisor"]
    if "CLASSIFIER_DRAIN_S" not in environment:
        supervisor.read_settings = lambda variables: replace(read_settings(variables), drain_s=0)
    run_command(
        lambda: parse_flags(supervisor.SupervisorConfig, None, command[3:]), supervisor.main
    )


def _set_environment(variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)
