"""torchrun's environment -> this process's rank and device, and sums over all processes."""

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from efficientnet.errors import PipelineError

# A process that decodes a slow shard or writes a large checkpoint is waited for; a dead one is
# found at once by its closed connection.
TIMEOUT = timedelta(minutes=30)
# While rank 0 unpacks a named set or decodes every image once, the others wait for its word.
PREPARATION_TIMEOUT = timedelta(days=2)
MEETING_PORT = "training/port"


# Of rank 0 and those that wait for it; None while a process is alone.
_for_preparation: Any = None


class DistributedError(PipelineError):
    """Processes that cannot train together."""


@dataclass(frozen=True)
class Ranks:
    """One process among those that train together."""

    rank: int
    """0 .. world_size - 1; rank 0 logs, evaluates the totals and writes."""
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def describe(self) -> str:
        """Say on what is trained."""
        is_cpu = self.device.type == "cpu"
        name = "the CPU" if is_cpu else torch.cuda.get_device_name(self.device)
        return name if self.world_size == 1 else f"{self.world_size} processes, each on {name}"


def may_be_restarted() -> bool:
    """Tell whether torchrun starts the processes again when one dies."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def local_world_size() -> int:
    """Count the processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def join_ranks() -> Ranks:
    """Join the processes that torchrun started; alone without torchrun.

    Each process on a machine takes the GPU of its local rank, or all take the CPU where there is no
    GPU.

    Raises:
        DistributedError: more processes on this machine than GPUs, or not started by torchrun.
    """
    has_gpu = torch.cuda.is_available()
    if "RANK" not in os.environ:
        return Ranks(0, 1, torch.device("cuda" if has_gpu else "cpu"))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if "LOCAL_RANK" not in os.environ:
        raise DistributedError(
            "RANK is set but LOCAL_RANK is not: start the processes with torchrun, or unset RANK "
            "to train in one process"
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    if has_gpu and local_rank >= torch.cuda.device_count():
        raise DistributedError(
            f"process {local_rank + 1} on this machine finds {torch.cuda.device_count()} GPUs; "
            "start torchrun with --nproc-per-node=gpu"
        )
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
        store = None
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = meeting_store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), rank)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank if store else -1,
            world_size=world_size if store else -1,
            timeout=TIMEOUT,
        )
        global _for_preparation
        _for_preparation = dist.new_group(backend="gloo", timeout=PREPARATION_TIMEOUT)
    return Ranks(rank, world_size, device)


def meeting_store(host: str, port: int, rank: int) -> TCPStore:
    """Return a store of this start's processes alone, found through torchrun's.

    torchrun keeps one store over its restarts (pytorch/pytorch, issue 135712: a fast process read
    the address that a dead one had left there, and could not connect), and its restart count
    differs between machines, so it cannot tell the starts apart. Rank 0 therefore serves a store of
    its own; a port that a dead rank 0 left behind refuses the connection and is read again.

    Raises:
        DistributedError: rank 0 did not come within `TIMEOUT`.
    """
    of_torchrun = TCPStore(host, port, is_master=False, timeout=TIMEOUT)
    if rank == 0:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        of_torchrun.set(MEETING_PORT, str(store.port))
        return store
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        found = int(of_torchrun.get(MEETING_PORT))
        try:
            with socket.create_connection((host, found), timeout=5):
                pass
        except OSError:
            time.sleep(0.05)
            continue
        return TCPStore(host, found, is_master=False, timeout=TIMEOUT)
    raise DistributedError(f"process {rank} waited {TIMEOUT} for process 0 at {host}; see its log")


def leave_ranks() -> None:
    """Leave the processes that train together."""
    if dist.is_initialized():
        dist.destroy_process_group()


def broadcast_from_rank0(value: Any) -> Any:
    """Return rank 0's value in every process; plain values only."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_for_preparation, device=torch.device("cpu"))
    return values[0]


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Add up numbers over all processes."""
    if not dist.is_initialized():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.tolist()
