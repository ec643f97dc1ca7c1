"""A lock on a folder, held by one process and freed by its end."""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from efficientnet.errors import PipelineError

LOCK_FILE = ".lock"

log = logging.getLogger(__name__)


class LockedError(PipelineError):
    """Another process works in a folder."""


@contextmanager
def locked_folder(folder: Path) -> Generator[None]:
    """Keep other processes out of a folder, which is made if it is not there.

    The lock is of the kernel's: it is free as soon as the process is gone, however that happened;
    children do not hold it.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    descriptor = _lock(path, folder)
    try:
        yield
    finally:
        # While it is held: another process finds that the file it has locked is not there any more.
        path.unlink(missing_ok=True)
        os.close(descriptor)
        if is_new:
            with suppress(OSError):  # There is something in it.
                folder.rmdir()


def _lock(path: Path, folder: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 1000).decode(errors="replace")
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise LockedError(
                    f"{folder} is in use by {holder or 'another process'}, which holds {path}: "
                    "wait for it, end it, or take another folder (--name)"
                ) from None
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            log.warning("%s: %s; nothing keeps a second process out", path, error.strerror)
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return descriptor
        os.close(descriptor)
