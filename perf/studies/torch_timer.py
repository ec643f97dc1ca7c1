"""A checkpoint and images -> the median call in ms, by torch.utils.benchmark.

`python -m perf.studies.torch_timer CHECKPOINT IMAGES.npy SECONDS THREADS` prints it on the last
line. The model is the eager one of our runtime: channels_last, denormal numbers flushed.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.benchmark import Timer

from efficientnet.formats.checkpoint import load_checkpoint


def main(checkpoint: Path, images: Path, seconds: float, num_threads: int) -> float:
    """Return the median over blocks of calls."""
    torch.set_flush_denormal(True)
    model, _ = load_checkpoint(checkpoint)
    program = model.eval().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    tensor = torch.from_numpy(np.load(images)).contiguous(memory_format=torch.channels_last)
    batches = itertools.cycle(tensor.split(1))
    with torch.inference_mode():
        timer = Timer(
            "model(next(batches))",
            globals={"model": program, "batches": batches},
            num_threads=num_threads,
        )
        return 1000 * timer.blocked_autorange(min_run_time=seconds).median


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])))
