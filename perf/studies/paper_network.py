"""A network of the paper, its image and batch size -> the call that is timed, in its own process.

A row that runs out of memory takes no other row along.
"""

import importlib
import itertools
import resource
from pathlib import Path

import torch
from torch import nn

from efficientnet.images.datasets import SAMPLE_PHOTOS, load_dataset
from efficientnet.images.preprocess_spec import PreprocessSpec
from efficientnet.measuring.clock import TimedCall
from efficientnet.measuring.inputs import map_inputs, prepare_inputs
from efficientnet.network.model import build_model
from efficientnet.network.variants import get_variant
from perf.studies.paper_tables import TIMM

# Of the memory that is free, what a row may take on a CPU: the rest is the machine's.
MEMORY_SHARE = 0.8

GPU_BYTES_FOR_INPUTS = 2e9


def open_row(network: str, image_size: int, batch_size: int, num_threads: int) -> TimedCall:
    """Build the network with random weights; a call waits for its logits."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        _limit_memory()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.float16 if on_gpu else torch.float32
    torch.set_num_threads(num_threads)
    # Random weights make denormal numbers, and times would be of those.
    torch.set_flush_denormal(True)
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    model = build(network, image_size).eval()
    program = model.to(device, dtype, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    spec = PreprocessSpec(
        image_size=image_size,
        interpolation="bicubic",
        crop_fraction=None,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    inputs = prepare_inputs(load_dataset(SAMPLE_PHOTOS).val, spec, batch_size, seed=0)
    with inputs.file:
        images = torch.from_numpy(map_inputs(inputs.file.fileno(), image_size))
    # Two batches at least, that no call sees the images of the call before it.
    most = max(2 * batch_size, int(GPU_BYTES_FOR_INPUTS / (3 * image_size**2 * dtype.itemsize)))
    used = images[: min(most, len(images)) // batch_size * batch_size]
    used = used.to(device, dtype).contiguous(memory_format=torch.channels_last)
    batches = itertools.cycle(used.split(batch_size))

    def call() -> None:
        with torch.inference_mode():
            program(next(batches))
        if on_gpu:
            torch.cuda.synchronize()

    return TimedCall(call)


def build(network: str, image_size: int) -> nn.Module:
    """Build a variant, or timm's network of this name, for 1,000 classes."""
    if not network.startswith(TIMM):
        return build_model(get_variant(network), 1000)
    timm = importlib.import_module("timm")  # only some rows need it
    name = network.removeprefix(TIMM)
    options = {"img_size": image_size} if "vit" in name or "deit" in name else {}
    return timm.create_model(name, num_classes=1000, **options)


def _limit_memory() -> None:
    # A batch that does not fit then is an error of this row, before the system ends whatever it
    # likes.
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return
    (line,) = (x for x in meminfo.read_text().splitlines() if x.startswith("MemAvailable"))
    most = int(MEMORY_SHARE * 1024 * int(line.split()[1]))
    resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))
