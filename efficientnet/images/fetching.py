"""Addresses of tar shards, or commands that write them -> files in a cache, each fetched once.

The cache is $EFFICIENTNET_CACHE (default ~/.cache/efficientnet); any number of processes share it.
"""

import errno
import fcntl
import hashlib
import http.client
import io
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from efficientnet.images.brace_expansion import expand_braces
from efficientnet.images.tar_index import DatasetError, walk_tar
from efficientnet.machine.atomic import write_bytes

CLASSES_FILE = "classes.json"
CACHE_VARIABLE = "EFFICIENTNET_CACHE"

HTTP_TIMEOUT_S = 60.0
NUM_TRIES = 3
RETRY_WAIT_S = 0.5
CHUNK_BYTES = 1024 * 1024

_TAR_WORD = re.compile(r"""[^\s'"|;&<>()=]+\.tar(?![^\s'"|;&<>()])""")


def is_remote(source: str) -> bool:
    """Tell whether `source` stands for remote shards."""
    return source.startswith(("http://", "https://", "pipe:"))


def remote_path(address: str) -> str:
    """Return folders and name of a shard, without host, login and query; "" if none is named.

    Args:
        address: an http(s) URL; or `pipe:COMMAND`, of which the last word that ends in .tar counts.
    """
    if address.startswith("pipe:"):
        words = _TAR_WORD.findall(address.removeprefix("pipe:"))
        return words[-1] if words else ""
    return urllib.parse.urlsplit(address).path


def fetch_shards(source: str) -> list[tuple[PurePosixPath, Path]]:
    """Fetch the shards that are not in the cache; return where each was and where it is now.

    Where it was is its remote_path, without a leading slash; they keep their order.

    Args:
        source: http(s) URLs with braces, or `pipe:COMMAND` with braces.

    Raises:
        DatasetError: a shard cannot be fetched, is no whole tar, or has no name of its own.
    """
    addresses = expand_braces(source)
    names = [_file_name(address) for address in addresses]
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise DatasetError(
            f"{count} shards of {source} are called {name}; expected different file names, "
            "by which they are kept: rename them"
        )
    cache = Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/efficientnet").expanduser().resolve()
    digest = hashlib.sha256("\n".join(addresses).encode()).hexdigest()
    folder = cache / "shards" / digest[:12]
    pairs = list(zip(addresses, names, strict=True))
    for address, name in tqdm(pairs, "fetching shards", disable=None, leave=False):
        _fetch_once(address, folder / name)
    if not source.startswith("pipe:"):
        _fetch_classes(addresses[0], folder / CLASSES_FILE)
    return [
        (PurePosixPath(remote_path(address).lstrip("/")), folder / name) for address, name in pairs
    ]


@contextmanager
def file_lock(path: Path) -> Generator[None]:
    """Wait until no other process or thread holds `path`, an empty file that stays, and hold it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also by a crash
        yield


def _file_name(address: str) -> str:
    name = remote_path(address).rpartition("/")[2]
    if name in ("", ".", ".."):
        is_pipe = address.startswith("pipe:")
        of_pipe, of_url = "a word that ends in .tar, to know the shard by", "the address of a file"
        raise DatasetError(f"{address} names no shard; expected {of_pipe if is_pipe else of_url}")
    return name


def _fetch_once(address: str, path: Path) -> None:
    if path.exists():
        return
    with file_lock(path.with_name(f".{path.name}.lock")):
        if path.exists():  # another process was first
            return
        part = path.with_name(f".{path.name}.part")
        try:
            with part.open("w+b") as file:
                if address.startswith("pipe:"):
                    _run_pipe(address.removeprefix("pipe:"), file)
                else:
                    _download(address, file)
                file.flush()
                os.fsync(file.fileno())
                for _ in walk_tar(file, address):
                    pass
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _fetch_classes(address: str, path: Path) -> None:
    if path.exists():
        return
    content = io.BytesIO()
    try:
        _download(urllib.parse.urljoin(address, CLASSES_FILE), content)
    except _FetchError as error:
        # S3 answers 403 for a file that is not there to those who may not list the bucket.
        if error.status not in (403, 404, 410):
            raise
        content = io.BytesIO(b"null")
    write_bytes(path, content.getvalue())


class _FetchError(DatasetError):
    def __init__(self, url: str, reason: str, status: int | None) -> None:
        super().__init__(
            f"cannot fetch {url}: {reason}; expected the whole file: correct the address, try "
            "again later, or bring the shards into a folder and give that; where a login is "
            "needed, give 'pipe:COMMAND' with a command that has it"
        )
        self.status = status


def _download(url: str, file: IO[bytes]) -> None:
    for last in [False] * (NUM_TRIES - 1) + [True]:
        file.seek(0)
        file.truncate()
        try:
            _copy_response(url, file)
            return
        except urllib.error.HTTPError as error:
            error.close()
            problem = _FetchError(url, f"HTTP {error.code} {error.reason}", error.code)
            if last or (error.code < 500 and error.code not in (408, 429)):
                raise problem from None
        except (http.client.HTTPException, OSError) as error:
            # The disk's trouble, not the network's.
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            if last:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
                raise _FetchError(url, f"{reason}, {NUM_TRIES} times", None) from None
        time.sleep(RETRY_WAIT_S)


def _copy_response(url: str, file: IO[bytes]) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "efficientnet"})
    with urllib.request.urlopen(request, timeout=HTTP_TIMEOUT_S) as response:
        shutil.copyfileobj(response, file, CHUNK_BYTES)
        expected = response.headers.get("Content-Length")
    if expected is not None and file.tell() != int(expected):
        raise http.client.HTTPException(f"got {file.tell()} of {expected} bytes")


def _run_pipe(command: str, file: IO[bytes]) -> None:
    # With pipefail, `curl ... | gunzip` fails when curl does.
    bash = shutil.which("bash")
    arguments = [bash, "-o", "pipefail", "-c", command] if bash else ["/bin/sh", "-c", command]
    done = subprocess.run(
        arguments, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.PIPE, check=False
    )
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise DatasetError(
            f"the command '{command}' failed with exit code {done.returncode} "
            f"({lines[-1].strip() if lines else 'it printed no error'}); expected a shard on its "
            "stdout: try it in a terminal, and put right what it says"
        )
