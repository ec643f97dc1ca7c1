"""The native engine against docs/native.md's numerics in numpy, bit by bit, on every level here."""

import mmap
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import native_reference
import numpy as np
import pytest
from facts import raises_naming
from native_programs import Chain, random_chain

from efficientnet.formats.artifact import ArtifactError
from efficientnet.runtimes.native.build import LIBRARY
from efficientnet.runtimes.native.engine import PORTABLE, Engine, levels
from efficientnet.runtimes.native.program_file import (
    Activation,
    DType,
    ProgramView,
    from_bf16,
)

pytestmark = pytest.mark.skipif(not LIBRARY.is_file(), reason="the native engine is not built")

LEVELS = levels() if LIBRARY.is_file() else ()

# Maps in bfloat16 differ by single roundings to 2^-8, which the layers after them carry on.
BF16_ERROR = 0.03


@dataclass(frozen=True)
class Case:
    """A random program, with what numpy makes of images and of pixels."""

    content: bytes
    program: ProgramView
    images: np.ndarray
    pixels: np.ndarray
    expected: list[tuple[list[np.ndarray], np.ndarray]]
    expected_of_pixels: tuple[list[np.ndarray], np.ndarray]


@cache
def case(dtype: DType, seed: int, is_wild: bool = False, has_converts: bool = False) -> Case:
    """Compute it once for all levels."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.native"
        program = random_chain(rng, dtype, is_wild, has_converts).write(path)
        content = path.read_bytes()
    images, (pixels,) = images_for(program, rng, 3), pixels_for(program, rng)
    return Case(
        content,
        program,
        images,
        pixels,
        [native_reference.run(program, image) for image in images],
        native_reference.run(program, pixels),
    )


def images_for(program: ProgramView, rng: np.random.Generator, count: int = 1) -> np.ndarray:
    height, width = (int(program.tensors[0][side]) for side in ("height", "width"))
    # Some of it outside of what pixels can be.
    return rng.normal(0, 1.5, (count, 3, height, width)).astype(np.float32)


def pixels_for(program: ProgramView, rng: np.random.Generator, count: int = 1) -> np.ndarray:
    height, width = (int(program.tensors[0][side]) for side in ("height", "width"))
    return rng.integers(0, 256, (count, height, width, 3)).astype(np.uint8)


def read(engine: Engine, program: ProgramView, index: int) -> np.ndarray:
    return engine.read_tensor(index, program.tensors[index])


def is_close(found: np.ndarray, expected: np.ndarray, least_scale: float = 1e-3) -> bool:
    # In units of the largest value: sums of bfloat16 are in any order.
    scale = max(float(np.abs(expected).max()), least_scale)
    return float(np.abs(found - expected).max()) <= BF16_ERROR * scale


def write(path: Path, dtype: DType, seed: int, **options: bool) -> ProgramView:
    return random_chain(np.random.default_rng(seed), dtype, **options).write(path)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("is_wild", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_every_map_of_8_bits_is_the_one_that_numpy_computes(
    tmp_path: Path, level: str, is_wild: bool, seed: int
):
    one, path, num_threads = case(DType.U8, seed, is_wild), tmp_path / "p.native", 1 + seed % 3
    path.write_bytes(one.content)
    apart = Engine(path, num_threads, 1, level, keeps_tensors=True)
    for image, (activations, logits) in (
        (one.images[0], one.expected[0]),
        (one.pixels, one.expected_of_pixels),
    ):
        np.testing.assert_array_equal(apart.infer(image[None])[0], logits)
        for index, value in enumerate(activations):
            np.testing.assert_array_equal(read(apart, one.program, index), value, str(index))
    joined = Engine(path, num_threads, 3, level)
    for count in (1, 3):
        expected = [logits for _, logits in one.expected[:count]]
        for is_alone in (True, False):
            found = joined.infer(one.images[:count], is_alone)
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [DType.BF16, DType.U8])
@pytest.mark.parametrize("seed", range(6))
def test_activations_of_bfloat16_are_close_to_what_numpy_computes(
    tmp_path: Path, level: str, dtype: DType, seed: int
):
    one, path = case(dtype, seed, has_converts=dtype is DType.U8), tmp_path / "p.native"
    path.write_bytes(one.content)
    num_threads, (activations, logits) = 1 + seed % 3, one.expected[0]
    apart = Engine(path, num_threads, 1, level, keeps_tensors=True)
    assert is_close(apart.infer(one.images[:1])[0], logits)
    for index, value in enumerate(activations):
        found = read(apart, one.program, index)
        if one.program.tensors[index]["dtype"] == DType.BF16:
            assert is_close(from_bf16(found), value), index
        else:
            # Of a converted map a value may be in the next step, and what follows differs by some.
            assert is_close(found.astype(np.float32), value.astype(np.float32), 100), index
    joined = Engine(path, num_threads, 2, level)
    for row in joined.infer(one.images[[0, 0]]):
        assert is_close(row, logits)


@pytest.mark.parametrize("level", LEVELS)
def test_a_map_of_8_bits_survives_bfloat16_and_back(tmp_path: Path, level: str):
    chain = Chain(np.random.default_rng(0), (9, 11), DType.U8)
    chain.convolution(37, 3, activation=Activation.SILU)
    before, scale = chain.current, chain.scales[chain.current]
    chain.convert()
    chain.convert(scale)
    program = chain.write(tmp_path / "p.native")
    engine = Engine(tmp_path / "p.native", level=level, keeps_tensors=True)
    engine.infer(images_for(program, np.random.default_rng(1)))
    np.testing.assert_array_equal(
        read(engine, program, chain.current), read(engine, program, before)
    )


def test_values_that_are_no_numbers_read_as_zero(tmp_path: Path):
    program = write(tmp_path / "p.native", DType.U8, seed=0)
    images = images_for(program, np.random.default_rng(0))
    images[0, 1, 0] = [np.nan, np.inf, -np.inf, *images[0, 1, 0, 3:]]
    _, expected = native_reference.run(program, images[0])
    np.testing.assert_array_equal(Engine(tmp_path / "p.native").infer(images)[0], expected)


@pytest.mark.parametrize("level", LEVELS)
def test_denormals_are_zero_while_the_engine_computes_and_not_afterwards(
    tmp_path: Path, level: str
):
    chain = Chain(np.random.default_rng(0), (8, 8), DType.BF16)
    chain.convolution(5, 3)
    program = chain.write(tmp_path / "p.native")
    engine = Engine(tmp_path / "p.native", 2, level=level, keeps_tensors=True)
    # Times 50 they would be 5e-39, which bfloat16 holds.
    engine.infer(np.full((1, 3, 8, 8), 1e-40, np.float32))
    assert not read(engine, program, 0).any()
    assert (np.array([1e-30], np.float32) * np.float32(1e-10)).view(np.uint32) > 0


def test_a_file_in_pages_of_its_own_goes_while_its_weights_are_packed(tmp_path: Path):
    path, rng = tmp_path / "p.native", np.random.default_rng(0)
    chain = Chain(rng, (4, 4), DType.U8)
    for _ in range(4):
        chain.convolution(1500, 1)
    # Weights at the front of the file that its last layer reads as well.
    layers = chain.program.layers
    layers[4]["weights"], layers[4]["bias"] = layers[2]["weights"], layers[2]["bias"]
    program = chain.write(path)
    content, images = path.read_bytes(), images_for(program, rng)

    def pages_of(content: bytes) -> mmap.mmap:
        pages = mmap.mmap(-1, len(content), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.write(content)
        return pages

    expected, pages = Engine(path).infer(images), pages_of(content)
    np.testing.assert_array_equal(Engine(pages).infer(images), expected)
    left = np.frombuffer(pages, np.uint8)
    if LEVELS[0] == PORTABLE:  # It packs nothing, and so reads the file's weights each time.
        np.testing.assert_array_equal(left, np.frombuffer(content, np.uint8))
    else:  # Of 6.8 MB, all but what follows the last multiple of 2 MB.
        assert np.count_nonzero(left) < 1 << 21


DAMAGES = {
    "magic": (0, b"X", "EFFNATIV"),
    "version": (8, b"\x02", r"version 2\b.*\b1\b"),
    "tensors": (12, b"\xff\xff\xff\xff", "impossible numbers"),
    "layers offset": (32, b"\xff\xff\xff\xff\xff\xff\xff\xff", "past the end"),
    "blob offset": (40, b"\x41", "not aligned"),
    "height of an image": (64, b"\xff\xff\xff\x7f", "2147483647"),
    "type of a map": (64 + 12, b"\x07", "tensor 0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_by_what_is_wrong(tmp_path: Path, damage: str):
    path = tmp_path / "p.native"
    write(path, DType.U8, seed=0)
    offset, content, message = DAMAGES[damage]
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=message):
        Engine(path)


FIELDS = {
    "kind": (9, "kind 9"),
    "input": (99, "tensor 99"),
    "kernel": (4, "kernel"),
    "stride": (3, "stride"),
    "pad_top": (2, "pad"),
    "activation": (3, "activation"),
    "fraction_bits": (8, "fraction_bits"),
    "weights": (2**40, "weights"),
    "table": (3, "table"),
    "bias": (-64, "bias"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_layer_that_does_not_fit_is_refused_before_it_is_used(tmp_path: Path, field: str):
    chain = Chain(np.random.default_rng(0), (8, 8), DType.U8)
    chain.convolution(5, 3, activation=Activation.SILU)
    value, message = FIELDS[field]
    chain.program.layers[1][field] = value
    chain.write(tmp_path / "p.native")
    with pytest.raises(ArtifactError, match=message):
        Engine(tmp_path / "p.native")


def test_a_file_that_was_cut_off_is_refused_wherever_it_was(tmp_path: Path):
    path = tmp_path / "p.native"
    write(path, DType.U8, seed=3)
    data = path.read_bytes()
    for length in [0, 1, 63, 64, 100, *range(200, len(data), max(1, len(data) // 30))]:
        path.write_bytes(data[:length])
        with pytest.raises(ArtifactError, match=r"damaged|cannot read"):
            Engine(path)
    path.write_bytes(data + b"more")
    with pytest.raises(ArtifactError, match="follow"):
        Engine(path)
    with raises_naming(ArtifactError, tmp_path / "not there"):
        Engine(tmp_path / "not there")


def test_what_an_engine_is_asked_for_must_be_there(tmp_path: Path):
    path = tmp_path / "p.native"
    program = write(path, DType.U8, seed=0)
    with raises_naming(ArtifactError, "sse"):
        Engine(path, level="sse")
    engine = Engine(path, max_batch_size=2)
    with raises_naming(ValueError, 3, "1 to 2"):
        engine.infer(images_for(program, np.random.default_rng(0), 3))
    with raises_naming(ValueError, "float32", 99):
        engine.infer(np.zeros((1, 3, 99, 99), np.float32))
    with raises_naming(ValueError, "flag"):
        read(engine, program, 0)


def test_a_library_that_was_not_built_says_what_to_run(tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"apt-get install g\+\+"):
        levels(tmp_path / "_engine.so")
    (tmp_path / "broken.so").write_bytes(b"no library")
    with raises_naming(ArtifactError, tmp_path / "broken.so"):
        levels(tmp_path / "broken.so")


def test_two_programs_answer_several_threads_as_one_thread_alone(tmp_path: Path):
    rng = np.random.default_rng(0)
    engines: list[tuple[Engine, np.ndarray, np.ndarray]] = []
    for seed in (1, 2):
        path = tmp_path / f"{seed}.native"
        images = images_for(write(path, DType.U8, seed), rng, 2)
        engine = Engine(path, num_threads=2, max_batch_size=2)
        engines.append((engine, images, engine.infer(images)))
    wrong: list[int] = []

    def call(number: int) -> None:
        engine, images, expected = engines[number % 2]
        for _ in range(20):
            if not np.array_equal(engine.infer(images), expected):
                wrong.append(number)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FORK = """
import os, sys
import numpy as np
from efficientnet.formats.artifact import ArtifactError
from efficientnet.runtimes.native.engine import Engine

path = sys.argv[1]
engine = Engine(path, 2)
images = np.zeros((1, 3, *engine.image_shape), np.float32)
expected = engine.infer(images)
child = os.fork()
if child == 0:
    try:
        engine.infer(images)
    except ArtifactError as error:
        assert "fork" in str(error)
        engine.close()
        again = Engine(path, 2).infer(images)
        os._exit(0 if np.array_equal(again, expected) else 3)
    os._exit(2)
_, status = os.waitpid(child, 0)
assert np.array_equal(engine.infer(images), expected)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_forked_process_is_told_to_open_the_program_itself(tmp_path: Path):
    write(tmp_path / "p.native", DType.U8, seed=0)
    command = [sys.executable, "-c", FORK, str(tmp_path / "p.native")]
    assert subprocess.run(command, check=False, timeout=60).returncode == 0


def test_the_times_of_layers_are_those_of_a_call(tmp_path: Path):
    program = write(tmp_path / "p.native", DType.U8, seed=0)
    engine = Engine(tmp_path / "p.native", keeps_times=True)
    engine.infer(images_for(program, np.random.default_rng(0)))
    times = engine.layer_times()
    assert len(times) == len(program.layers) and min(times) >= 0 and sum(times) > 0
