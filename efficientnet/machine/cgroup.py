"""The control groups of this process -> the processor time and memory that they let it have.

A container's limits are such; so are those of systemd. Each group bounds those within it.
"""

from collections.abc import Generator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def cpu_quota(root: Path = ROOT, own_groups: Path = OWN_GROUPS) -> float | None:
    """Return how many processors' time the groups give at most; None = no limit."""
    found: list[float] = []
    for text in _values("", "cpu.max", root, own_groups):
        quota, _, period = text.partition(" ")
        if quota != "max":
            found.append(int(quota) / int(period))
    quotas = _values("cpu", "cpu.cfs_quota_us", root, own_groups)
    periods = _values("cpu", "cpu.cfs_period_us", root, own_groups)
    for quota, period in zip(quotas, periods, strict=True):
        if int(quota) > 0:
            found.append(int(quota) / int(period))
    return min(found, default=None)


def memory_limit_bytes(root: Path = ROOT, own_groups: Path = OWN_GROUPS) -> int | None:
    """Return the bytes that the groups give at most; None = no limit."""
    # The old version says "no limit" by a number larger than any memory.
    found = [
        *_values("", "memory.max", root, own_groups),
        *_values("memory", "memory.limit_in_bytes", root, own_groups),
    ]
    return min((int(text) for text in found if text != "max"), default=None)


def _values(controller: str, file: str, root: Path, own_groups: Path) -> Generator[str]:
    # Of this process's group and of all around it. `controller` is "" in version 2, which has one
    # tree for all of them. Seen from inside of a container its own group may be the root, and the
    # path that is told one of the host's, which is not there.
    for line in own_groups.read_text().splitlines() if own_groups.is_file() else ():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            tree = root / controller
            group = tree / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(tree) and (folder / file).is_file():
                    yield (folder / file).read_text().strip()
