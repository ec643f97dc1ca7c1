import platform
import threading
from pathlib import Path

import numpy as np
import onnx
import openvino as ov
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from processes import fork

from efficientnet.formats.artifact import ProgramFile
from efficientnet.formats.checkpoint import load_checkpoint
from efficientnet.runtimes import Runtime, open_runtime
from efficientnet.runtimes.onnxruntime_runtime import OnnxRuntime
from efficientnet.runtimes.openvino_runtime import OpenVinoRuntime
from training.learning.state import new_state
from training.recipe.recipes import digits_recipe

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="where denormals cost, and the switch is known",
)

TINY_NUMBER = np.float32(1e-30)
TINY_FACTOR = np.float32(1e-10)


@pytest.fixture(autouse=True)
def _ordinary_arithmetic():
    torch.set_flush_denormal(False)
    yield
    torch.set_flush_denormal(False)


def num_denormals(array: NDArray[np.float32]) -> int:
    # By their bits: where denormals are taken for zero, a comparison takes them for it, too.
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32) & 0x7FFFFFFF
    return int(((bits > 0) & (bits < 0x00800000)).sum())


def activations_of(model: torch.nn.Module) -> list[NDArray[np.float32]]:
    """Return a list that gets what each convolution of a model gives."""
    activations: list[NDArray[np.float32]] = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda _m, _i, found: activations.append(found.numpy().copy())
            )
    return activations


def images_that_make_denormals() -> NDArray[np.float32]:
    # In the first convolution, whose shift comes after it.
    return 1e-38 * np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)


def test_the_eager_runtime_flushes_what_the_bare_network_makes(tiny_checkpoint: Path):
    # In a process of its own: torch's threads keep the arithmetic that they were started with, and
    # other tests started them without.
    process = fork(infer_what_makes_denormals, tiny_checkpoint)
    process.join()
    assert process.exitcode == 0


@torch.inference_mode()
def infer_what_makes_denormals(tiny_checkpoint: Path) -> None:
    images = images_that_make_denormals()
    torch.set_num_threads(1)  # the bare network starts no thread that would not flush
    model, _ = load_checkpoint(tiny_checkpoint)
    activations = activations_of(model)
    model(torch.from_numpy(images))
    assert sum(map(num_denormals, activations)) > 100

    opened = open_runtime(tiny_checkpoint)
    activations = activations_of(opened._model)  # type: ignore[attr-defined]
    opened.infer(images)
    assert activations and sum(map(num_denormals, activations)) == 0


def open_multiplying(kind: str, tiny_artifact: Path, folder: Path) -> Runtime:
    """Open a program that multiplies by a tiny factor, in the place of a network."""
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["images", "factor"], ["small"]),
            helper.make_node("Flatten", ["small"], ["logits"]),
        ],
        "multiplying",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3 * 32 * 32])],
        [numpy_helper.from_array(TINY_FACTOR[None], "factor")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    info = open_runtime(tiny_artifact).info
    if kind == "onnxruntime":
        program = ProgramFile(folder / "model.onnx", model.SerializeToString())
        return OnnxRuntime(program, info, (4,), 2)
    onnx.save(model, folder / "model.onnx")
    ov.save_model(ov.Core().read_model(folder / "model.onnx"), folder / "model.xml", False)
    program, weights = (ProgramFile.read(folder / f"model.{end}") for end in ("xml", "bin"))
    return OpenVinoRuntime(program, weights, info, (1,), (), "fp32", 2)


def multiply_in_two_threads(kind: str, artifact: Path, folder: Path, num_images: int) -> None:
    multiplying = open_multiplying(kind, artifact, folder)
    images = np.full((num_images, 3, 32, 32), TINY_NUMBER)
    found: list[NDArray[np.float32]] = []

    def call() -> None:
        found.append(multiplying.infer(images))

    call()
    other = threading.Thread(target=call)
    other.start()
    other.join()
    assert len(found) == 2 and not any(map(num_denormals, found))
    # The caller's own arithmetic is as it was.
    assert num_denormals(np.array([TINY_NUMBER]) * TINY_FACTOR) == 1


@pytest.mark.parametrize("num_images", [1, 4, 64])
@pytest.mark.parametrize("kind", ["onnxruntime", "openvino"])
def test_runtimes_flush_in_every_thread_that_calls_them(
    kind: str, num_images: int, tiny_artifact: Path, tmp_path: Path
):
    # In a process of its own: OpenVINO gives a program the idle threads of one that was closed,
    # with the arithmetic that they were started with, and other tests' programs do not flush.
    process = fork(multiply_in_two_threads, kind, tiny_artifact, tmp_path, num_images)
    process.join()
    assert process.exitcode == 0


def test_training_on_the_cpu_flushes():
    config = digits_recipe("tiny")
    new_state(config, config.network_options(None), 10, torch.device("cpu"))
    product = torch.full((4,), float(TINY_NUMBER)) * float(TINY_FACTOR)
    assert num_denormals(product.numpy()) == 0
