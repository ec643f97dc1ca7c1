"""The GPU that this process would use, or why there is none."""

from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """The GPU that CUDA gives this process first."""

    name: str
    compute_capability: str


def current_gpu() -> Gpu | None:
    """Ask the driver for the GPU; None where no driver answers, or none that torch can use.

    TensorRT makes objects without a driver, too, that fail when they are used: so this comes first.
    """
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return Gpu(torch.cuda.get_device_name(), f"{major}.{minor}")


def numbers(version: str) -> tuple[int, int]:
    """Return the first two numbers of a compute capability or a version, to compare by."""
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def no_room(batch_size: int, reason: object) -> str:
    """Say that the GPU's memory is too small for batches, with the first line of a reason."""
    first = str(reason).partition("\n")[0]
    return (
        f"the GPU has no room for batches of {batch_size} images ({first}); end what else uses it, "
        "or export with a smaller maximum: --batch 1 1 N"
    )


def why_no_gpu() -> str:
    """Say what is missing where current_gpu finds none."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"no driver that CUDA {torch.version.cuda} works with answers"
