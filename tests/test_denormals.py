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

from efficientnet.formats.artifact import ProgramFile, read_manifest
from efficientnet.formats.checkpoint import load_checkpoint
from efficientnet.machine.denormals import count_denormals, keep_denormals
from efficientnet.runtimes import Runtime, open_runtime
from efficientnet.runtimes.aoti_runtime import AotiRuntime, load_package
from efficientnet.runtimes.native.build import find_compiler
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

PACKAGE = "model.pt2"


@pytest.fixture(autouse=True)
def _ordinary_arithmetic():
    torch.set_flush_denormal(False)
    yield
    torch.set_flush_denormal(False)


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
    assert sum(map(count_denormals, activations)) > 100

    opened = open_runtime(tiny_checkpoint)
    activations = activations_of(opened._model)  # type: ignore[attr-defined]
    opened.infer(images)
    assert activations and sum(map(count_denormals, activations)) == 0


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
        [numpy_helper.from_array(np.array([TINY_FACTOR]), "factor")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    if kind == "aoti":
        program = load_package(ProgramFile.read(folder / PACKAGE), is_captured=False)
        return AotiRuntime({}, program, read_manifest(tiny_artifact))
    info = open_runtime(tiny_artifact).info
    if kind == "onnxruntime":
        program = ProgramFile(folder / "model.onnx", model.SerializeToString())
        return OnnxRuntime(program, info, (4,), 2)
    onnx.save(model, folder / "model.onnx")
    ov.save_model(ov.Core().read_model(folder / "model.onnx"), folder / "model.xml", False)
    program, weights = (ProgramFile.read(folder / f"model.{end}") for end in ("xml", "bin"))
    return OpenVinoRuntime(program, weights, info, (1,), (), "fp32", 2)


def multiply_in_two_threads(
    kind: str, artifact: Path, folder: Path, num_images: int, is_flushed: bool
) -> None:
    if not is_flushed:
        keep_denormals()
    multiplying = open_multiplying(kind, artifact, folder)
    images = np.full((num_images, 3, 32, 32), TINY_NUMBER)
    found: list[NDArray[np.float32]] = []

    def call() -> None:
        found.append(multiplying.infer(images))

    call()
    other = threading.Thread(target=call)
    other.start()
    other.join()
    assert [count_denormals(logits) for logits in found] == [0 if is_flushed else images.size] * 2
    # The caller's own arithmetic is as it was.
    assert count_denormals(np.array([TINY_NUMBER]) * TINY_FACTOR) == 1


def multiplies(
    kind: str, artifact: Path, folder: Path, num_images: int, is_flushed: bool = True
) -> bool:
    """Tell whether multiply_in_two_threads finds what it expects.

    In a process of its own: OpenVINO gives a program the idle threads of one that was closed, with
    the arithmetic that they were started with, and other tests' programs do not flush.
    """
    process = fork(multiply_in_two_threads, kind, artifact, folder, num_images, is_flushed)
    process.join()
    return process.exitcode == 0


@pytest.mark.parametrize("num_images", [1, 4, 64])
@pytest.mark.parametrize("kind", ["onnxruntime", "openvino"])
def test_runtimes_flush_in_every_thread_that_calls_them(
    kind: str, num_images: int, tiny_artifact: Path, tmp_path: Path
):
    assert multiplies(kind, tiny_artifact, tmp_path, num_images)


@pytest.mark.parametrize("kind", ["onnxruntime", "openvino"])
def test_denormals_are_kept_where_their_cost_is_measured(
    kind: str, tiny_artifact: Path, tmp_path: Path
):
    assert multiplies(kind, tiny_artifact, tmp_path, 4, is_flushed=False)


class Multiplying(torch.nn.Module):
    """Multiplies by a tiny factor, in the place of a network."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return [N, 3 * 32 * 32]."""
        return torch.flatten(images * float(TINY_FACTOR), 1)


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_compiled_programs_flush_in_every_thread_and_would_not_by_themselves(
    tiny_artifact: Path, tmp_path: Path
):
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(
        Multiplying(), (torch.zeros(4, 3, 32, 32),), dynamic_shapes=(batch,)
    )
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / PACKAGE))
    for is_flushed in (True, False):
        assert multiplies("aoti", tiny_artifact, tmp_path, 64, is_flushed)


def test_training_on_the_cpu_flushes():
    config = digits_recipe("tiny")
    new_state(config, config.network_options(None), 10, torch.device("cpu"))
    product = torch.full((4,), float(TINY_NUMBER)) * float(TINY_FACTOR)
    assert count_denormals(product.numpy()) == 0
