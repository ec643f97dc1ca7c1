"""The native engine against docs/native.md's numerics in numpy, bit by bit, on every level here."""

from pathlib import Path

import native_reference
import numpy as np
import pytest
from native_programs import random_chain

from efficientnet.runtimes.native.build import LIBRARY
from efficientnet.runtimes.native.engine import Engine, levels
from efficientnet.runtimes.native.program_file import (
    DType,
    ProgramView,
    from_bf16,
)

pytestmark = pytest.mark.skipif(not LIBRARY.is_file(), reason="the native engine is not built")

LEVELS = levels() if LIBRARY.is_file() else ()

# Maps in bfloat16 differ by single roundings to 2^-8, which the layers after them carry on.
BF16_ERROR = 0.03


def images_for(program: ProgramView, rng: np.random.Generator, count: int = 1) -> np.ndarray:
    height, width = (int(program.tensors[0][side]) for side in ("height", "width"))
    # Some of it outside of what pixels can be.
    return rng.normal(0, 1.5, (count, 3, height, width)).astype(np.float32)


def pixels_for(program: ProgramView, rng: np.random.Generator, count: int = 1) -> np.ndarray:
    height, width = (int(program.tensors[0][side]) for side in ("height", "width"))
    return rng.integers(0, 256, (count, height, width, 3)).astype(np.uint8)


def read(engine: Engine, program: ProgramView, index: int) -> np.ndarray:
    tensor = program.tensors[index]
    shape = tuple(int(tensor[side]) for side in ("height", "width", "channels"))
    return engine.read_tensor(index, shape, int(tensor["dtype"]))


def is_close(found: np.ndarray, expected: np.ndarray) -> bool:
    # In units of the largest value: sums of bfloat16 are in any order.
    scale = max(float(np.abs(expected).max()), 1e-3)
    return float(np.abs(found - expected).max()) <= BF16_ERROR * scale


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("is_wild", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_every_map_of_8_bits_is_the_one_that_numpy_computes(
    tmp_path: Path, level: str, is_wild: bool, seed: int
):
    rng = np.random.default_rng(seed)
    program = random_chain(rng, DType.U8, is_wild).write(tmp_path / "p.native")
    # A map that was converted from bfloat16 is not the same in every bit, nor is what follows.
    is_exact = not (program.tensors["dtype"] == DType.BF16).any()
    apart = Engine(tmp_path / "p.native", 1 + seed % 3, 1, level, keeps_tensors=True)
    joined = Engine(tmp_path / "p.native", 1 + seed % 3, 5, level)
    for images in (images_for(program, rng, 4), pixels_for(program, rng, 3)):
        expected = [native_reference.run(program, image) for image in images]
        maps, logits = expected[0]
        np.testing.assert_array_equal(apart.infer(images[:1])[0], logits) if is_exact else None
        for index, value in enumerate(maps):
            if is_exact:
                np.testing.assert_array_equal(read(apart, program, index), value, str(index))
        found = joined.infer(images)
        if is_exact:
            np.testing.assert_array_equal(found, [logits for _, logits in expected])
        elif not is_wild:
            for row, (_, logits) in zip(found, expected, strict=True):
                assert is_close(row, logits)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("seed", range(12))
def test_every_map_of_bfloat16_is_close_to_what_numpy_computes(
    tmp_path: Path, level: str, seed: int
):
    rng = np.random.default_rng(seed)
    program = random_chain(rng, DType.BF16).write(tmp_path / "p.native")
    apart = Engine(tmp_path / "p.native", 1 + seed % 3, 1, level, keeps_tensors=True)
    joined = Engine(tmp_path / "p.native", 1 + seed % 3, 2, level)
    (image,) = images_for(program, rng)
    maps, logits = native_reference.run(program, image)
    assert is_close(apart.infer(image[None])[0], logits)
    for index, value in enumerate(maps):
        if program.tensors[index]["dtype"] == DType.BF16:
            assert is_close(from_bf16(read(apart, program, index)), value), index
    for row in joined.infer(np.stack([image, image])):
        assert is_close(row, logits)
