"""An artifact -> a folder of links to its open files: the same, whatever the disk then holds."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from efficientnet.formats.artifact import MANIFEST_FILE, read_artifact
from serving.settings import artifact_sha256

# Of the process that looks.
OPEN_FILES = Path("/proc/self/fd")


@dataclass(frozen=True, eq=False)
class PinnedArtifact:
    """An artifact that is held open, for this process and those that are forked from it."""

    path: Path
    sha256: str
    close: Callable[[], None]


def pin(artifact: Path) -> PinnedArtifact:
    """Hold an artifact open, which another may take the place of, or which may be deleted.

    Files that are written over are other files here, too. Where there is no /proc it is the
    directory itself, and what takes its place is refused.

    Raises:
        ArtifactError: see read_artifact.
    """
    manifest = read_artifact(artifact)
    with ExitStack() as stack:
        path = artifact
        if OPEN_FILES.is_dir():
            prefix = "efficientnet-served-"
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix)))
            for name in (MANIFEST_FILE, manifest.program_file, *manifest.other_files):
                file = stack.enter_context((artifact / name).open("rb"))
                (path / name).symlink_to(OPEN_FILES / str(file.fileno()))
        return PinnedArtifact(path, artifact_sha256(path), stack.pop_all().close)
