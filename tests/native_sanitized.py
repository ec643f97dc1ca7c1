"""Run by a test, with the native engine compiled by sanitizers: they end the process."""

import sys
import tempfile
from pathlib import Path

import numpy as np
from native_programs import random_chain

from efficientnet.formats.artifact import ArtifactError
from efficientnet.runtimes.native.engine import Engine, levels
from efficientnet.runtimes.native.program_file import DType

NUM_PROGRAMS = 25
NUM_DAMAGES = 400


def main(library: Path, folder: Path) -> None:
    """Run programs of odd shapes on every level, and open damaged ones."""
    path = folder / "p.native"
    for seed in range(NUM_PROGRAMS):
        rng = np.random.default_rng(100 + seed)
        dtype = DType(seed % 2)
        random_chain(rng, dtype, is_wild=seed % 4 == 0, has_converts=seed % 3 == 0).write(path)
        for level in levels(library):
            for num_threads, keeps_tensors in ((1, True), (3, False)):
                engine = Engine(path, num_threads, 4, level, keeps_tensors, library=library)
                images = rng.normal(0, 1.5, (4, 3, *engine.image_shape)).astype(np.float32)
                for count in (1, 4):
                    engine.infer(images[:count])
                engine.infer(rng.integers(0, 256, (1, *engine.image_shape, 3)).astype(np.uint8))
                engine.close()
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(NUM_DAMAGES):
        damaged = bytearray(content)
        # Header and tables, where numbers say how large other things are.
        damaged[rng.integers(0, min(len(content), 4096))] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            engine = Engine(path, level="portable", library=library)
            engine.infer(np.zeros((1, 3, *engine.image_shape), np.float32))
        except ArtifactError:
            pass


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1]), Path(temporary))
