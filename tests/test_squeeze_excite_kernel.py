"""The Triton kernel against the module it stands for; its numbers come from Triton's interpreter.

Run as a program, with TRITON_INTERPRET=1, the file prints what the tests read.
"""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import triton
from facts import raises_naming
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget

from efficientnet.network.model import SqueezeExcite, build_model
from efficientnet.network.squeeze_excite_kernel import (
    BLOCK_CHANNELS,
    BLOCK_POSITIONS,
    MAX_PARTS,
    TritonSqueezeExcite,
    block_constants,
    compile_to_ptx,
    plan_launch,
    squeeze_excite,
    squeeze_excite_kernel,
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
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
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


def launch_in_groups(shape: tuple[int, ...], images_per_group: int) -> tuple[float, int, int]:
    """Return the error, what is left in the counters, and how many values were not written."""
    layer, x = example(shape)
    num_images, channels, squeezed, height, width = shape
    plan = plan_launch(channels, squeezed, height * width, 4)
    out = torch.full_like(x, torch.nan, memory_format=torch.channels_last)
    counters = torch.zeros(num_images, dtype=torch.int32)
    partials = torch.full((num_images, plan.num_parts, squeezed), torch.nan)
    for _ in range(2):
        squeeze_excite_kernel[(2 * num_images * plan.num_parts,)](
            x,
            *weights(layer),
            counters,
            num_images,
            height * width,
            plan.num_slices,
            images_per_group,
            out,
            partials,
            **block_constants(channels, squeezed),
        )
    left, missing = int(counters.abs().sum()), int(out.isnan().sum())
    return largest_error(layer, x, out), left, missing


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
    groups = {str(size): launch_in_groups((3, 24, 4, 12, 11), size) for size in (1, 2, 100)}
    layer, x = example((2, 72, 6, 5, 5))
    checks = torch.library.opcheck(
        squeeze_excite,
        (x, *weights(layer)),
        test_utils=("test_schema", "test_autograd_registration"),
    )
    return {"errors": errors, "groups": groups, "checks": checks}


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


@pytest.mark.parametrize("images_per_group", ["1", "2", "100"])
def test_each_division_into_groups_writes_all_and_leaves_the_counters_at_zero(
    interpreted: dict, images_per_group: str
):
    error, left, missing = interpreted["groups"][images_per_group]
    assert error < TOLERANCES[torch.float32]
    assert left == missing == 0


def test_the_operator_is_registered_soundly(interpreted: dict):
    assert set(interpreted["checks"].values()) == {"SUCCESS"}


def test_the_count_tells_in_any_order_that_all_are_in():
    for num_parts in (1, 2, 5, MAX_PARTS):
        take_off = -(num_parts + (num_parts - 1) * 2**16)
        for last_at in range(num_parts):
            count = num_parts
            for leaver in range(num_parts):
                assert count < 0 or count >= num_parts
                count += take_off if leaver == last_at else 2**16
                assert -(2**31) <= count < 2**31
            assert count == 0


@pytest.mark.parametrize("name", ["tiny", "b0", "b7", "v2-s", "v2-xl"])
def test_every_part_of_every_variant_has_positions(name: str):
    with torch.device("meta"):
        model = build_model(get_variant(name), 10)
    for layer in model.modules():
        if not isinstance(layer, SqueezeExcite):
            continue
        channels, squeezed = layer.fc1.in_channels, layer.fc1.out_channels
        for size in range(1, 301):
            plan = plan_launch(channels, squeezed, size * size, 2)
            per_slice = -(-size * size // plan.num_slices)
            assert (plan.num_slices - 1) * per_slice < size * size
            assert plan.num_parts == -(-channels // BLOCK_CHANNELS) * plan.num_slices <= MAX_PARTS
            assert plan.num_slices == 1 or per_slice >= BLOCK_POSITIONS
            assert plan.images_per_group >= 1


@pytest.mark.parametrize("compute_capability", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_compiles_without_a_gpu(dtype: torch.dtype, compute_capability: int):
    ptx, kernel = compile_to_ptx(144, 6, dtype, compute_capability)
    assert f".visible .entry {kernel.entry}(" in ptx
    assert f".target sm_{compute_capability}" in ptx
    assert f".reqntid {32 * kernel.num_warps}" in ptx
    # Those that are named, and Triton's two scratch pointers.
    assert ptx.count(f".param .u64 .ptr .global .align 1 {kernel.entry}_param") == 10
    assert ptx.count(f".param .u32 {kernel.entry}_param") == 4
    assert len(kernel.parameters) == 12
    for last in (12, 13):
        assert ptx.count(f"{kernel.entry}_param_{last}") == 1  # never loaded


@pytest.mark.parametrize("compute_capability", [80, 90])
def test_the_kernel_orders_its_memory_accesses(compute_capability: int):
    ptx, _ = compile_to_ptx(144, 6, torch.float16, compute_capability)
    assert ptx.count("atom.global.gpu.release.add.u32") == 1
    assert ptx.count("ld.global.gpu.acquire.b32") == 2  # once, and in the loop
    before_release = ptx[: ptx.index("atom.global.gpu.release")]
    assert before_release.rindex("bar.sync") > before_release.rindex("st.global")
    assert "ld.global.nc" not in ptx


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


def test_compilers_see_one_launch_for_any_batch_size_and_what_it_writes(
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
    assert len(launches) == 1
    assert set(launches[0].kwargs["tensors_to_clone"]) == {"counters", "out", "partials"}
    assert not isinstance(launches[0].kwargs["grid"][0][0], int)


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
def test_a_compiled_model_runs_the_kernel():
    model, images, expected = model_on_cuda()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(images), expected, atol=LOGIT_TOLERANCE, rtol=0)


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
