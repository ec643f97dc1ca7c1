"""A socket of this user alone <-> the command that gives a running service another artifact.

It lies in a folder into which no other user can look, only its user can connect to it, and the
kernel says who has: three locks, each of which would do.
"""

import os
import socket
import stat
import struct
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from efficientnet.errors import PipelineError

# A path, and the sentence that says what is wrong with the artifact there.
MAX_MESSAGE_BYTES = 65_536
# From a command's connection to what it asks for, which it sends at once.
QUESTION_S = 1.0

# Of socket.h, struct ucred: process, user, group.
CREDENTIALS = struct.Struct("3i")


class ControlError(PipelineError):
    """A command that a service does not take, or did not carry out."""


class Answer(BaseModel):
    """What came of a command."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    artifact_sha256: str = ""
    """Of what is served from now on."""
    problem: str = ""
    """Why that is what was served before."""


class Command:
    """What somebody asks for, who waits for the answer.

    Args:
        connection: readable when nobody waits any more.
        artifact: that is to be served.
    """

    def __init__(self, connection: socket.socket, artifact: Path) -> None:
        self.connection = connection
        self.artifact = artifact

    def answer(self, answer: Answer) -> None:
        """Answer, if anybody waits."""
        _send(self.connection, answer)


class Control:
    """Hears commands; on Linux.

    Args:
        path: of the socket, in a folder of its own, which is made.

    Raises:
        ControlError: this is not Linux, or others can look into the folder.
        OSError: nothing can be written there.
    """

    def __init__(self, path: Path) -> None:
        if not hasattr(socket, "SO_PEERCRED"):
            raise ControlError("only on Linux can the artifact of a running service be changed")
        folder = path.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700:
            raise ControlError(
                f"{folder} is of user {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}, "
                f"expected {os.getuid()} and 700: delete it"
            )
        self._path = path
        # Of a service on this port that was killed.
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen()

    def fileno(self) -> int:
        """Return what can be read when somebody has connected."""
        return self._listener.fileno()

    def accept(self) -> Command | None:
        """Return what the next one asks for; None if it is nobody's business, which it is told."""
        connection, _ = self._listener.accept()
        connection.settimeout(QUESTION_S)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        _, user, _ = CREDENTIALS.unpack(credentials)
        if user != os.getuid():
            _send(connection, Answer(problem=f"user {user} asks, expected {os.getuid()}"))
            return None
        try:
            asked = connection.recv(MAX_MESSAGE_BYTES)
        except OSError:
            asked = b""
        if not asked:
            connection.close()
            return None
        return Command(connection, Path(os.fsdecode(asked)))

    def close(self) -> None:
        """Hear no more."""
        self._listener.close()
        self._path.unlink(missing_ok=True)
        self._path.parent.rmdir()


def control_path(port: int) -> Path:
    """Return where the service on a port hears commands; a port has one service."""
    return own_folder() / f"control-{port}" / "socket"


def own_folder() -> Path:
    """Return a folder for what a running service writes.

    In memory where there is such a file system: metrics are memory-mapped files, and a worker that
    writes to one when the disk has become full is killed, again and again.
    """
    shared_memory = Path("/dev/shm")
    if os.access(shared_memory, os.W_OK):
        folder = shared_memory / f"efficientnet-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid == os.getuid():
            return folder
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "efficientnet"


def ask(path: Path, artifact: Path) -> str:
    """Have a service change to an artifact; return the SHA-256 that its answers then name.

    Args:
        path: see control_path.
        artifact: absolute.

    Raises:
        ControlError: no service hears commands there, or it did not change.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            raise ControlError(
                f"no service of user {os.getuid()} listens at {path}; start it with "
                "--allow-change, and name its port here: --port"
            ) from None
        try:
            connection.sendall(os.fsencode(artifact))
            answer = connection.recv(MAX_MESSAGE_BYTES)
        except ConnectionError:
            answer = b""
    if not answer:
        raise ControlError("the service ended before it had changed; its log says why")
    found = Answer.model_validate_json(answer)
    if found.problem:
        raise ControlError(f"the service goes on with what it had: {found.problem}")
    return found.artifact_sha256


def _send(connection: socket.socket, answer: Answer) -> None:
    with connection:
        try:
            connection.sendall(answer.model_dump_json().encode()[:MAX_MESSAGE_BYTES])
        except OSError:
            return
