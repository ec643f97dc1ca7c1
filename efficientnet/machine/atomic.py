"""Files and directories that appear whole or not at all, and their SHA-256."""

import ctypes
import errno
import glob
import hashlib
import os
import shutil
import socket
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a file holding `text`; a reader sees the old file or the new one."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by a file holding `data`; a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def point_link(link: Path, target: Path) -> None:
    """Make `link` a symbolic link to `target`, in the place of an older one in a single step.

    Args:
        link: the link; its folder must exist.
        target: relative to the link's folder, or absolute.
    """
    fresh = link.with_name(f".{link.name}.{uuid.uuid4().hex[:8]}")
    try:
        fresh.symlink_to(target)
        fresh.replace(link)
    finally:
        fresh.unlink(missing_ok=True)


def dangling_link_hint(path: Path) -> str:
    """Return what to say of a link that leads nowhere, after another message; else nothing."""
    if not path.is_symlink() or path.exists():
        return ""
    return (
        f"; it is a link to {path.readlink()}, which is not there: 'cp -r' copies a link, "
        "'cp -rL' what it leads to"
    )


def append_line(path: Path, line: str) -> None:
    """Append one line with a single write, so that commands running at once do not mix theirs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write(line.encode() + b"\n")


@contextmanager
def replaced_directory(path: Path) -> Generator[Path]:
    """Give a directory to fill that takes the place of `path` when the block ends without an error.

    The new directory stands beside `path` under a hidden name until then; after an error it is
    removed and what stood at `path` is untouched. What a killed process has left is removed by the
    next one on the same machine.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(path)
    token = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    fresh = path.with_name(f".{path.name}.new-{token}")
    aside = path.with_name(f".{path.name}.old-{token}")
    fresh.mkdir()
    try:
        yield fresh
        _sync(fresh)
        if not (path.is_dir() and not path.is_symlink() and _swap(fresh, path)):
            _move_in_place(fresh, path, aside)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _swap(fresh: Path, path: Path) -> bool:
    # Both names are exchanged in one step, so that `path` is there at every moment. Only Linux has
    # that, and not on every file system.
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    at_working_directory, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of the kernel
    old, new = os.fsencode(path), os.fsencode(fresh)
    return renameat2(at_working_directory, new, at_working_directory, old, exchange) == 0


def _move_in_place(fresh: Path, path: Path, aside: Path) -> None:
    # In two steps: the older one is moved aside first, and put back if the second move fails.
    # Another process may do the same meanwhile.
    while True:
        with suppress(FileNotFoundError):
            path.rename(aside)
        try:
            fresh.rename(path)
            return
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                shutil.rmtree(aside, ignore_errors=True)
                continue
            if aside.exists():
                aside.rename(path)
            raise


def _remove_left_behind(path: Path) -> None:
    prefix = f".{path.name}.new-{socket.gethostname()}-"
    for left in path.parent.glob(f"{glob.escape(prefix)}*"):
        pid = left.name.removeprefix(prefix).partition("-")[0]
        if pid.isdigit() and not _is_running(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(directory: Path) -> None:
    for path in [*(entry for entry in directory.iterdir() if entry.is_file()), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
