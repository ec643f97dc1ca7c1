"""The Triton kernel against the module it stands for; its numbers come from Triton's interpreter.

Run as a program, with TRITON_INTERPRET=1, the file prints what the tests read.
"""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from facts import raises_naming
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from efficientnet.network.model import SqueezeExcite, build_model
from efficientnet.network.squeeze_excite_kernel import (
    BLOCK_CHANNELS,
    BLOCK_PARTS,
    BLOCK_POSITIONS,
    DTYPES,
    MAX_PARTS,
    NUM_WARPS,
    TritonSqueezeExcite,
    block_constants,
    plan_launch,
    scale_kernel,
    squeeze_excite,
    squeeze_kernel,
    use_triton_squeeze_excite,
)
from efficientnet.network.variants import get_variant

# Images, channels, squeezed, height, width.
SHAPES = {
    "one part": (1, 64, 4, 4, 4),
    "channels no power of two": (2, 144, 6, 7, 9),
    "several slices, the last one short": (2, 72, 20, 15, 13),
    "squeezed more than a block": (1, 160, 80, 5, 5),
    "more parts than are read at once": (1, 72, 4, 46, 46),
    "one pixel": (3, 24, 4, 1, 1),
}
# Rounding does not depend on the shape.
CASES = [(name, torch.float32) for name in SHAPES]
CASES += [("channels no power of two", dtype) for dtype in (torch.float16, torch.bfloat16)]
# Of v2-s, b7 and v2-xl; too large for the interpreter.
LARGE_SHAPES = [(64, 960, 40, 24, 24), (1, 64, 16, 300, 300), (3, 3840, 160, 16, 16)]
# Relative for values above 1. float32: sums in another order; float16: one rounding at the end;
# bfloat16: the interpreter cuts values off where a GPU rounds.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 5.5e-4, torch.bfloat16: 8e-3}

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def example(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[SqueezeExcite, Tensor]:
    """Return a layer and a map whose channels have means and gates of their own."""
    num_images, channels, squeezed, height, width = shape
    torch.manual_seed(0)
    layer = SqueezeExcite(channels, squeezed)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    x = torch.randn(num_images, channels, height, width) + torch.randn(num_images, channels, 1, 1)
    x = x.to(device, dtype, memory_format=torch.channels_last)
    return layer.requires_grad_(False).to(device, dtype), x


def largest_error(layer: SqueezeExcite, x: Tensor, found: Tensor) -> float:
    """Return the error against the module in float32, on the same rounded values."""
    expected = deepcopy(layer).float()(x.float().clone())
    return ((found.float() - expected).abs() / expected.abs().clamp(min=1.0)).max().item()


def weights(layer: SqueezeExcite) -> tuple[Tensor, ...]:
    assert layer.fc1.bias is not None and layer.fc2.bias is not None
    first, second = layer.fc1.weight.flatten(1), layer.fc2.weight.flatten(1)
    return first, layer.fc1.bias, second, layer.fc2.bias


def measure() -> dict[str, object]:
    """Run the kernel in the interpreter."""
    errors = {}
    for name, dtype in CASES:
        layer, x = example(SHAPES[name], dtype)
        before = x.clone()
        found = squeeze_excite(x, *weights(layer))
        assert torch.equal(x, before) and found.dtype == dtype
        assert found.is_contiguous(memory_format=torch.channels_last)
        errors[f"{name}, {dtype}"] = largest_error(layer, x, found)
    layer, x = example(SHAPES["channels no power of two"])
    copied = squeeze_excite(x.contiguous(), *weights(layer))
    errors["contiguous"] = largest_error(layer, x, copied)
    layer, x = example((2, 72, 6, 5, 5))
    checks = torch.library.opcheck(
        squeeze_excite,
        (x, *weights(layer)),
        test_utils=("test_schema", "test_autograd_registration"),
    )
    return {"errors": errors, "checks": checks}


@pytest.fixture(scope="module")
def interpreted() -> dict:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_the_kernel_computes_what_the_module_does(interpreted: dict, name: str, dtype: torch.dtype):
    assert interpreted["errors"][f"{name}, {dtype}"] < TOLERANCES[dtype]


def test_another_memory_format_is_accepted(interpreted: dict):
    assert interpreted["errors"]["contiguous"] < TOLERANCES[torch.float32]


def test_the_operator_is_registered_soundly(interpreted: dict):
    assert set(interpreted["checks"].values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["tiny", "b0", "b7", "v2-s", "v2-xl"])
def test_every_part_of_every_variant_has_positions(name: str):
    with torch.device("meta"):
        model = build_model(get_variant(name), 10)
    for layer in model.modules():
        if not isinstance(layer, SqueezeExcite):
            continue
        channels, squeezed = layer.fc1.in_channels, layer.fc1.out_channels
        for size in range(1, 301):
            plan = plan_launch(channels, squeezed, size * size)
            per_slice = -(-size * size // plan.num_slices)
            assert (plan.num_slices - 1) * per_slice < size * size
            assert plan.num_parts == -(-channels // BLOCK_CHANNELS) * plan.num_slices <= MAX_PARTS
            assert plan.num_slices == 1 or per_slice >= BLOCK_POSITIONS


@pytest.mark.parametrize("compute_capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kernel", [squeeze_kernel, scale_kernel])
def test_the_kernels_compile_without_a_gpu(kernel: Any, dtype: str, compute_capability: int):
    constants = block_constants(144, 6) | {"BLOCK_PARTS": BLOCK_PARTS}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = {"partials": "*fp32", "num_positions": "i32", "num_slices": "i32"}
    types |= dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(
        ASTSource(kernel, {n: types.get(n, f"*{dtype}") for n in kernel.arg_names}, constants),
        target=GPUTarget("cuda", compute_capability, 32),
        options={"num_warps": NUM_WARPS},
    )
    assert f".target sm_{compute_capability}" in compiled.asm["ptx"]


def test_models_keep_their_state_and_lose_every_squeeze_excite():
    model = build_model(get_variant("tiny"), 10).eval()
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    num_layers = sum(isinstance(module, SqueezeExcite) for module in model.modules())
    use_triton_squeeze_excite(model)
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == before
    assert not any(isinstance(module, SqueezeExcite) for module in model.modules())
    replaced = [module for module in model.modules() if isinstance(module, TritonSqueezeExcite)]
    assert len(replaced) == num_layers > 0


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_an_exported_model_holds_the_operator(device: str):
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device(device):
            model = build_model(get_variant("tiny"), 10).eval().requires_grad_(False)
            images = torch.empty(2, 3, 32, 32).to(memory_format=torch.channels_last)
        use_triton_squeeze_excite(model)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    nodes = [
        node
        for node in program.graph.nodes
        if node.target is torch.ops.efficientnet.squeeze_excite.default
    ]
    assert len(nodes) == sum(isinstance(module, TritonSqueezeExcite) for module in model.modules())
    assert not isinstance(nodes[0].meta["val"].shape[0], int)


class DriverOfH100:
    """What Triton's compiler asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class InTuple(nn.Module):
    """Return outputs in the form that ahead-of-time tracing wants."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.module(x),)


def test_compilers_see_two_launches_for_any_batch_size_and_what_they_write(
    monkeypatch: pytest.MonkeyPatch,
):
    batch = torch.export.Dim("batch", min=1, max=64)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        images = torch.empty(2, 144, 7, 9).to(memory_format=torch.channels_last)
        program = torch.export.export(nn.Identity(), (images,), dynamic_shapes=({0: batch},))
    x = next(iter(program.graph.nodes)).meta["val"]
    with x.fake_mode, torch.device("cuda"):
        layer = TritonSqueezeExcite(SqueezeExcite(144, 6)).requires_grad_(False)
    monkeypatch.setattr(triton.runtime.driver, "_active", DriverOfH100())
    graph, _ = aot_export_module(InTuple(layer), (x,), trace_joint=False)
    launches = [node for node in graph.graph.nodes if "triton_kernel" in str(node.target)]
    written = [set(node.kwargs["tensors_to_clone"]) for node in launches]
    assert written == [{"partials"}, {"out"}]
    assert not any(isinstance(node.kwargs["grid"][0][1], int) for node in launches)


def test_a_tensor_on_the_cpu_is_refused():
    layer, x = example((1, 64, 4, 4, 4))
    with raises_naming(ValueError, "cpu", "CUDA"):
        squeeze_excite(x, *weights(layer))


def test_what_the_kernel_cannot_read_is_refused():
    layer, x = example((2, 64, 4, 4, 4), device="meta")
    assert squeeze_excite(x, *weights(layer)).shape == x.shape
    with raises_naming(ValueError, "[64, 4, 4]", "[N, C, H, W]"):
        squeeze_excite(x[0], *weights(layer))
    with raises_naming(ValueError, "torch.float64"):
        squeeze_excite(x.double(), *weights(layer))
    with raises_naming(ValueError, "w1", "[4, 64]", "torch.float32", "torch.float16"):
        squeeze_excite(x.half(), *weights(layer))
    first, bias, second, last = weights(layer)
    with raises_naming(ValueError, "w2", "[4, 64]", "[64, 4]"):
        squeeze_excite(x, first, bias, second.t(), last)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES.values(), *LARGE_SHAPES])
def test_a_gpu_computes_what_the_module_does(shape: tuple[int, ...], dtype: torch.dtype):
    layer, x = example(shape, dtype, "cuda")
    for _ in range(20):
        assert largest_error(layer, x, squeeze_excite(x, *weights(layer))) < TOLERANCES[dtype]


@pytest.mark.gpu
@needs_cuda
def test_the_operator_passes_every_check_of_torch():
    layer, x = example((2, 72, 6, 5, 5), device="cuda")
    torch.library.opcheck(squeeze_excite, (x, *weights(layer)))


@pytest.mark.gpu
@needs_cuda
def test_two_streams_do_not_disturb_each_other():
    layer, x = example(LARGE_SHAPES[0], torch.float16, "cuda")
    expected = squeeze_excite(x, *weights(layer))
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(squeeze_excite(x, *weights(layer)))
    torch.cuda.synchronize()
    # The sums do not depend on the order in which programs finish.
    assert all(torch.equal(result, expected) for result in found)


@pytest.mark.gpu
@needs_cuda
def test_a_captured_graph_can_be_replayed():
    layer, x = example((8, 960, 40, 24, 24), torch.float16, "cuda")
    squeeze_excite(x, *weights(layer))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = squeeze_excite(x, *weights(layer))
    for _ in range(10):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert largest_error(layer, x, out) < TOLERANCES[torch.float16]


def model_on_cuda() -> tuple[nn.Module, Tensor, Tensor]:
    """Return a float16 model with the kernel, images, and the logits without it."""
    torch.manual_seed(0)
    model = build_model(get_variant("tiny"), 10).eval().requires_grad_(False)
    model = model.to("cuda", torch.float16, memory_format=torch.channels_last)
    images = torch.randn(4, 3, 32, 32, device="cuda", dtype=torch.float16)
    images = images.to(memory_format=torch.channels_last)
    expected = model(images)
    use_triton_squeeze_excite(model)
    return model, images, expected


# Float16 convolutions of different libraries, through all layers.
LOGIT_TOLERANCE = 2e-2


@pytest.mark.gpu
@needs_cuda
def test_an_aot_compiled_model_runs_the_kernel_for_any_batch_size(tmp_path: Path):
    model, images, expected = model_on_cuda()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2")
    )
    loaded = torch._inductor.aoti_load_package(package)
    for batch_size in (1, 3, 4):
        found = loaded(images[:batch_size])
        torch.testing.assert_close(found, expected[:batch_size], atol=LOGIT_TOLERANCE, rtol=0)


if __name__ == "__main__":
    print(json.dumps(measure()))
