"""A program, images and requests on standard input -> times, by the revision in PYTHONPATH.

`python -P revision_process.py PROGRAM IMAGES.npy THREADS` answers each line, a number of seconds,
with the samples of that turn in ms, as JSON. Of the revision's code it takes open_runtime alone, so
that revisions whose measuring differs can be compared.
"""

import gc
import json
import sys
import time

import numpy as np

from efficientnet.runtimes import open_runtime


def main(program: str, images_path: str, num_threads: int) -> None:
    """Answer until standard input is closed."""
    # Copy on write: some runtimes copy what they may not write to.
    images = np.load(images_path, mmap_mode="c")
    images.reshape(-1)[:: 4096 // images.itemsize].sum()
    infer = open_runtime(program, num_threads).infer
    gc.disable()
    number = 0
    print("ready", flush=True)
    for line in sys.stdin:
        gc.collect()
        samples: list[float] = []
        end = time.perf_counter() + float(line)
        # The first call of a turn finds the caches as another process left them.
        infer(images[number : number + 1])
        while not samples or time.perf_counter() < end:
            number = (number + 1) % len(images)
            before = time.perf_counter_ns()
            infer(images[number : number + 1])
            samples.append((time.perf_counter_ns() - before) / 1e6)
        print(json.dumps(samples), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
