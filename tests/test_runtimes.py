import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino
import pytest
from common_fixtures import digits
from facts import raises_naming

from efficientnet.formats.artifact import ArtifactError
from efficientnet.images.preprocess import normalize_pixels
from efficientnet.runtimes import Runtime, open_runtime, openvino_runtime
from efficientnet.runtimes.native.build import LIBRARY
from efficientnet.runtimes.onnxruntime_runtime import OnnxRuntime
from efficientnet.runtimes.protocol import check_images, infer_beside, takes_pixels
from export import native
from export.inputs.config import NativeConfig
from perf.measurements.program_subject import NullRuntime

NEEDS_ENGINE = pytest.mark.skipif(not LIBRARY.is_file(), reason="the native engine is not built")

PROGRAMS = ["torch", "onnxruntime", "openvino", pytest.param("native", marks=NEEDS_ENGINE)]


@pytest.fixture(scope="module")
def programs(
    tiny_checkpoint: Path,
    tiny_artifact: Path,
    openvino_artifact: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    found = {
        "torch": tiny_checkpoint,
        "onnxruntime": tiny_artifact,
        "openvino": openvino_artifact,
    }
    if LIBRARY.is_file():
        output = tmp_path_factory.mktemp("native") / "artifact"
        found["native"] = native.main(NativeConfig(tiny_checkpoint, output, reference=True))
    return found


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest, programs: dict[str, Path]) -> Path:
    return programs[request.param]


@pytest.fixture(params=PROGRAMS)
def runtime(request: pytest.FixtureRequest, programs: dict[str, Path]) -> Runtime:
    return open_runtime(programs[request.param])


def test_the_null_runtime_answers_as_many_images_as_it_is_given(programs: dict[str, Path]):
    null = NullRuntime(open_runtime(programs["onnxruntime"]).info)
    assert null.infer(digits(7)).shape == (7, 10)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_images_become_float32_logits(runtime: Runtime, batch_size: int):
    logits = runtime.infer(digits(batch_size))
    assert logits.shape == (batch_size, 10) and logits.dtype == np.float32


def test_logits_belong_to_the_caller(runtime: Runtime):
    images = digits(4)
    first = runtime.infer(images)
    kept = first.copy()
    runtime.infer(images[::-1].copy())
    np.testing.assert_array_equal(first, kept)


def test_an_image_does_not_depend_on_its_batch(runtime: Runtime):
    images = digits(8)
    alone = np.concatenate([runtime.infer(images[i : i + 1]) for i in range(8)])
    np.testing.assert_allclose(runtime.infer(images), alone, atol=1e-5)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 3, 33, 32), np.float32),
        np.zeros((3, 32, 32), np.float32),
        np.zeros((1, 3, 32, 32), np.float64),
        np.zeros((1, 32, 32, 3), np.float32),
    ],
)
def test_a_wrong_shape_or_type_says_what_is_expected(runtime: Runtime, images: np.ndarray):
    with raises_naming(ValueError, "float32", "[N, 3, 32, 32]"):
        runtime.infer(images)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_pixel_that_is_no_number_is_refused_with_its_image(runtime: Runtime, value: float):
    images = digits(3)
    images[1, 2, 5, 7] = value
    with raises_naming(ValueError, "[1] of 3"):
        runtime.infer(images)


def test_infinities_that_cancel_are_refused_and_numbers_whose_sum_overflows_are_not(
    runtime: Runtime,
):
    images = digits(2)
    images[0, 0, 0, :2] = np.inf, -np.inf
    with raises_naming(ValueError, "[0] of 2"):
        runtime.infer(images)
    check_images(np.full((2, 3, 32, 32), np.finfo(np.float32).max), runtime.info)


def test_arrays_are_read_in_their_order_whatever_their_strides(runtime: Runtime):
    images = digits(4)
    read_only = images.copy()
    read_only.flags.writeable = False
    channels_last = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    for view in (images[::-1], images[:, ::-1], images[..., ::-1], read_only, channels_last):
        expected = runtime.infer(np.array(view, order="C"))
        np.testing.assert_allclose(runtime.infer(view), expected, atol=1e-6)


@NEEDS_ENGINE
def test_pixels_get_the_answers_of_the_floats_that_they_become(programs: dict[str, Path]):
    native = open_runtime(programs["native"])
    assert takes_pixels(native) and not takes_pixels(open_runtime(programs["onnxruntime"]))
    size = native.info.preprocess.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8)
    for is_fast in (False, True):
        floats = np.stack([normalize_pixels(p, is_fast, native.info.preprocess) for p in pixels])
        for infer in (native.infer, infer_beside(native)):
            np.testing.assert_array_equal(infer(pixels), infer(floats))
    with raises_naming(ValueError, "uint8", f"[3, {size - 1}, {size}, 3]"):
        native.infer(pixels[:, 1:])


def test_the_artifact_answers_like_the_checkpoint(tiny_checkpoint: Path, tiny_artifact: Path):
    images = digits(32)
    expected = open_runtime(tiny_checkpoint).infer(images)
    np.testing.assert_allclose(open_runtime(tiny_artifact).infer(images), expected, atol=1e-4)
    assert np.ptp(expected) > 0.1


@pytest.mark.parametrize("are_files_kept", [True, False])
def test_what_was_opened_answers_whatever_becomes_of_its_files(
    program: Path, are_files_kept: bool, tmp_path: Path
):
    images, expected = digits(5), open_runtime(program)
    copy = Path(shutil.copytree(program, tmp_path / "copy"))
    opened = open_runtime(copy)
    if are_files_kept:
        for file in copy.iterdir():  # in place, so that a mapped file would show it
            with file.open("r+b") as stream:
                stream.write(bytes(file.stat().st_size))
    else:
        shutil.rmtree(copy)
    for size in (1, 3, 2, 5):
        np.testing.assert_allclose(
            opened.infer(images[:size]), expected.infer(images[:size]), atol=1e-5
        )


def test_openvino_keeps_the_kernels_of_few_batch_sizes(
    programs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    compiled: list[dict[str, object]] = []

    class Core(openvino.Core):
        def compile_model(self, model, device_name=None, config=None):  # type: ignore
            compiled.append(config)
            return super().compile_model(model, device_name, config)

    core = Core()
    monkeypatch.setattr(openvino_runtime, "openvino_core", lambda: core)
    opened = open_runtime(programs["openvino"])
    assert len(compiled) == 1 and "CPU_RUNTIME_CACHE_CAPACITY" not in compiled[0]
    for size in (3, 5):
        opened.infer(digits(size))
    assert len(compiled) == 2 and compiled[1]["CPU_RUNTIME_CACHE_CAPACITY"] == 500


def test_a_signal_is_handled_after_programs_were_closed_in_any_order(programs: dict[str, Path]):
    # OpenVINO's cores left the thread with an unmapped stack for signals: a segmentation fault.
    program = (
        "import gc, os, signal; from efficientnet.runtimes import open_runtime; "
        f"first, second = (open_runtime({str(programs['openvino'])!r}) for _ in range(2)); "
        "del first; gc.collect(); del second; gc.collect(); "
        "signal.signal(signal.SIGTERM, lambda *_: print('handled')); "
        "os.kill(os.getpid(), signal.SIGTERM)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout == "handled\n", done.stderr


def test_threads_of_onnxruntime_wait_in_a_loop_unless_they_may_not(tiny_artifact: Path):
    images = digits(3)
    spinning, sleeping = (open_runtime(tiny_artifact, 2, may_spin=spins) for spins in (True, False))
    assert isinstance(spinning, OnnxRuntime) and isinstance(sleeping, OnnxRuntime)
    options = sleeping._session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    with pytest.raises(RuntimeError):  # there is no such entry
        spinning._session.get_session_options().get_session_config_entry(
            "session.intra_op.allow_spinning"
        )
    assert np.array_equal(spinning.infer(images), sleeping.infer(images))


def test_a_folder_that_is_neither_is_an_artifact_error(tmp_path: Path):
    with raises_naming(ArtifactError, tmp_path, "manifest.json", "checkpoint.json"):
        open_runtime(tmp_path)


def test_an_artifact_is_opened_without_torch_and_what_decodes_pictures(tiny_artifact: Path):
    program = (
        "import sys; from efficientnet.runtimes import open_runtime; "
        f"open_runtime({str(tiny_artifact)!r}); "
        "sys.exit(bool({'torch', 'cv2', 'PIL'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
