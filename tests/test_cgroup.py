from pathlib import Path

import pytest

from efficientnet.machine import environment
from efficientnet.machine.cgroup import cpu_quota, memory_limit_bytes
from efficientnet.machine.environment import num_usable_cores

# What /proc/self/cgroup says -> files under /sys/fs/cgroup, and processors and bytes.
MACHINES = {
    "no groups": ("", {}, None, None),
    "version 2, no limit": ("0::/\n", {"cpu.max": "max 100000", "memory.max": "max"}, None, None),
    "version 2, a container": (
        "0::/\n",
        {"cpu.max": "150000 100000", "memory.max": "1000"},
        1.5,
        1000,
    ),
    "version 2, a group in a group": (
        "0::/a/b\n",
        {"a/b/cpu.max": "max 100000", "a/cpu.max": "400000 100000", "a/memory.max": "7"},
        4.0,
        7,
    ),
    "version 1, no limit": (
        "4:cpu,cpuacct:/\n",
        {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
        None,
        None,
    ),
    "version 1, a container that is told its path on the host": (
        "4:cpu,cpuacct:/docker/0123\n2:memory:/docker/0123\n",
        {
            "cpu/cpu.cfs_quota_us": "200000",
            "cpu/cpu.cfs_period_us": "100000",
            "memory/memory.limit_in_bytes": "5000",
        },
        2.0,
        5000,
    ),
    "version 2 beside version 1": (
        "1:cpu:/x\n0::/x\n",
        {"cpu/x/cpu.cfs_quota_us": "300000", "cpu/x/cpu.cfs_period_us": "100000"},
        3.0,
        None,
    ),
}


@pytest.mark.parametrize(("groups", "files", "cpus", "memory"), MACHINES.values(), ids=MACHINES)
def test_limits_are_read_from_the_groups(
    groups: str, files: dict[str, str], cpus: float | None, memory: int | None, tmp_path: Path
):
    own_groups = tmp_path / "cgroup"
    own_groups.write_text(groups)
    for name, text in files.items():
        file = tmp_path / "root" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    assert cpu_quota(tmp_path / "root", own_groups) == cpus
    assert memory_limit_bytes(tmp_path / "root", own_groups) == memory


@pytest.mark.parametrize(
    ("quota", "expected"), [(None, 64), (2.0, 2), (2.9, 2), (0.5, 1), (100.0, 64)]
)
def test_threads_are_as_many_as_the_quota_lets_run_at_once(
    quota: float | None, expected: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(environment, "cpu_quota", lambda: quota)
    assert num_usable_cores() == expected
