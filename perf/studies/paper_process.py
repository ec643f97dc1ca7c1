"""A network of the paper and its batch size -> its times, eager, in a process of its own.

`python -m perf.studies.paper_process JOB` takes a PaperJob as JSON and prints PaperTimes as JSON on
the last line. A process of its own: one that runs out of memory takes no other row along.
"""

import gc
import importlib
import resource
import sys
import time
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from efficientnet.images.datasets import SAMPLE_PHOTOS, load_dataset
from efficientnet.images.preprocess import PreprocessSpec
from efficientnet.measuring.clock import measure_turn, warm_up_until_stable
from efficientnet.measuring.inputs import map_inputs, prepare_inputs
from efficientnet.network.model import build_model
from efficientnet.network.variants import get_variant
from perf.studies.paper_tables import TIMM

# Of the memory that is free, what a row may take on a CPU: the rest is the machine's.
MEMORY_SHARE = 0.8

GPU_BYTES_FOR_INPUTS = 2e9


class PaperJob(BaseModel):
    """What a process measures."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: str
    image_size: int
    batch_size: int
    seconds: float
    num_turns: int
    num_threads: int
    num_images: int
    """Different images that the calls rotate through."""


class PaperTimes(BaseModel):
    """What it found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: str
    samples_ms: tuple[tuple[float, ...], ...]
    """Of each turn, every call."""
    elapsed_s: float
    num_warm_up: int
    is_warm_up_stable: bool
    num_parameters: int
    num_images: int


def measure(job: PaperJob) -> PaperTimes:
    """Build the network with random weights, and time calls that wait for their logits."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        _limit_memory()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.float16 if on_gpu else torch.float32
    torch.set_num_threads(job.num_threads)
    # Random weights make denormal numbers, and times would be of those.
    torch.set_flush_denormal(True)
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    model = build(job.network, job.image_size).eval()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    program = model.to(device, dtype, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    spec = PreprocessSpec(
        image_size=job.image_size,
        interpolation="bicubic",
        crop_fraction=None,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    photos = load_dataset(SAMPLE_PHOTOS).val[: job.num_images]
    inputs = prepare_inputs(photos, spec, job.batch_size, seed=0)
    with inputs.file:
        images = torch.from_numpy(map_inputs(inputs.file.fileno(), job.image_size))
    # Two batches at least, that no call sees the images of the call before it.
    image_bytes = 3 * job.image_size**2 * dtype.itemsize
    most = max(2 * job.batch_size, int(GPU_BYTES_FOR_INPUTS / image_bytes))
    used = images[:most].to(device, dtype).contiguous(memory_format=torch.channels_last)
    batches = [batch for batch in used.split(job.batch_size) if len(batch) == job.batch_size]
    number = 0

    def call() -> None:
        nonlocal number
        number += 1
        with torch.inference_mode():
            program(batches[number % len(batches)])
        if on_gpu:
            torch.cuda.synchronize()

    gc.disable()
    clock, turn_s = time.perf_counter_ns, job.seconds / job.num_turns
    warm_up = warm_up_until_stable(call, clock, min(1.0, turn_s), max_s=30 * min(1.0, turn_s))
    turns = [measure_turn(call, clock, turn_s, settle=False) for _ in range(job.num_turns)]
    return PaperTimes(
        precision="fp16" if on_gpu else "fp32",
        samples_ms=tuple(turn.samples_ms for turn in turns),
        elapsed_s=sum(turn.elapsed_s for turn in turns),
        num_warm_up=warm_up.num_calls,
        is_warm_up_stable=warm_up.is_stable,
        num_parameters=num_parameters,
        num_images=min(len(used), inputs.num_images),
    )


def build(network: str, image_size: int) -> nn.Module:
    """Build a variant, or timm's network of this name, for 1,000 classes."""
    if not network.startswith(TIMM):
        return build_model(get_variant(network), 1000)
    timm = importlib.import_module("timm")  # only some rows need it

    name = network.removeprefix(TIMM)
    has_size = "vit" in name or "deit" in name
    return timm.create_model(
        name, num_classes=1000, **({"img_size": image_size} if has_size else {})
    )


def _limit_memory() -> None:
    # A batch that does not fit then is an error of this row, before the system ends whatever it
    # likes.
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return
    (line,) = (x for x in meminfo.read_text().splitlines() if x.startswith("MemAvailable"))
    most = int(MEMORY_SHARE * 1024 * int(line.split()[1]))
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))


if __name__ == "__main__":
    print(measure(PaperJob.model_validate_json(sys.argv[1])).model_dump_json())
