import ast
import functools
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from common_fixtures import digits
from facts import raises_naming, require_named
from onnx import helper

from efficientnet.command import parse_flags
from efficientnet.formats.artifact import ArtifactError, Binding, ProgramFile, read_artifact
from efficientnet.formats.checkpoint import load_checkpoint, save_checkpoint
from efficientnet.machine.gpu import Gpu
from efficientnet.network.model import build_model
from efficientnet.network.variants import VARIANTS
from efficientnet.runtimes import open_runtime
from efficientnet.runtimes.protocol import open_program
from efficientnet.runtimes.tensorrt_library import deserialize
from efficientnet.runtimes.tensorrt_runtime import Profile, choose_profile, require_same_machine
from export.builders import tensorrt_export as trt
from export.builders.tensorrt_builder import (
    BuildSettings,
    TensorRTError,
    build_engine,
    fix_batch,
    profiles_for,
)
from export.builders.tensorrt_export import TrtConfig
from export.builders.tensorrt_target import find_target, require_precision, require_supported
from export.inputs.config import rebuild_command

ROOT = Path(__file__).resolve().parent.parent

H100 = Gpu("NVIDIA H100", "9.0")
V100 = Gpu("Tesla V100-SXM2-16GB", "7.0")

# The number formats that TensorRT-RTX's builder says its convolutions read, by the precision.
FORMATS = {"fp32": "Float", "fp16": "Half", "bf16": "BFloat16", "int8": "Int8"}


def rtx_config(checkpoint: Path, output: Path, **changes: Any) -> TrtConfig:
    return TrtConfig(checkpoint=checkpoint, output=output, flavor="rtx", **changes)


@pytest.fixture(scope="module")
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")


@pytest.fixture(scope="module")
def fp16_artifact(rtx: Any, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    output = tmp_path_factory.mktemp("artifacts") / "tensorrt-rtx-fp16"
    return trt.main(rtx_config(tiny_checkpoint, output, batch=(1, 4, 16)))


@pytest.fixture
def no_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU answers here")


def small_graph(operator: str = "Relu") -> onnx.ModelProto:
    shape = ["batch", 3, 8, 8]
    node = helper.make_node(operator, ["images"], ["logits"], name="features.0/strange")
    graph = helper.make_graph(
        [node],
        "small",
        [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, shape)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_the_portable_artifact_is_unchecked_and_says_what_it_is_for(fp16_artifact: Path):
    with raises_naming(ArtifactError, "never compared", "export/parity.py"):
        open_runtime(fp16_artifact)
    manifest = read_artifact(fp16_artifact, allow_unchecked=True)
    assert (manifest.runtime, manifest.precision) == ("tensorrt-rtx", "fp16")
    assert manifest.parity is None and manifest.binding is not None
    assert manifest.binding.library == "tensorrt_rtx"
    assert manifest.binding.compute_capability is None
    assert "8.0 and later" in manifest.binding.device == manifest.build.target_device
    files = {path.name for path in fp16_artifact.iterdir()}
    assert files == {"build.log", "manifest.json", "model.engine"}
    assert convolution_formats(fp16_artifact) == {"Half"}
    # The smallest batch has kernels of its own.
    log = (fp16_artifact / "build.log").read_text()
    assert "Dimensions: [-1,3,32,32]" in log and "Dimensions: [1,3,32,32]" in log


def test_int8_has_an_engine_for_each_batch_size(rtx: Any, tiny_checkpoint: Path, tmp_path: Path):
    output = tmp_path / "int8"
    config = rtx_config(
        tiny_checkpoint,
        output,
        precision="int8",
        batches=(8, 1),
        num_calibration_images=64,
        compute_capability=("8.6", "8.9"),
    )
    assert trt.main(config) == output
    manifest = read_artifact(output, allow_unchecked=True)
    assert [(p.batch_size, p.file) for p in manifest.static_programs] == [
        (1, "model-b1.engine"),
        (8, "model-b8.engine"),
    ]
    assert manifest.input.batch.max == 8
    assert manifest.quantization is not None and (output / "calibration.json").is_file()
    assert manifest.binding is not None and manifest.binding.compute_capability == "8.6 8.9"
    assert "Int8" in convolution_formats(output)


def convolution_formats(artifact: Path) -> set[str]:
    # Of the first input of what the builder's list calls a correlation.
    lines = (artifact / "build.log").read_text().splitlines()
    layers = [line for line in lines if "LayerType: correlation" in line]
    assert layers
    return {line.partition("Datatype: ")[2].partition(",")[0] for line in layers}


def test_a_graph_that_the_parser_refuses_is_told_with_its_node(rtx: Any):
    profiles = profiles_for((1, 1, 4))
    with raises_naming(TensorRTError, "NoSuchOp", "features.0"):
        build_engine(rtx, small_graph("NoSuchOp"), profiles, BuildSettings(), "x")


def test_what_the_builder_refuses_is_told_with_its_reason(rtx: Any, no_gpu: None):
    settings = BuildSettings(compute_capabilities=("CURRENT",))
    with raises_naming(TensorRTError, "CUDA driver"):
        build_engine(rtx, small_graph(), profiles_for((1, 1, 4)), settings, "x")


def test_settings_reach_the_builder(rtx: Any):
    settings = BuildSettings(optimization_level=1, uses_tf32=False)
    built = build_engine(rtx, small_graph(), profiles_for((2, 2, 2)), settings, "x")
    assert len(built.data) > 1000 and built.log[0].startswith("x: 1 layers")


def test_a_fixed_batch_leaves_the_graph_as_it_was():
    graph = small_graph()
    fixed = fix_batch(graph, 4)
    dims = [
        value.type.tensor_type.shape.dim[0] for value in (*fixed.graph.input, *fixed.graph.output)
    ]
    assert [dim.dim_value for dim in dims] == [4, 4]
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_a_foreign_engine_is_refused_with_the_command_that_makes_it(rtx: Any, tmp_path: Path):
    file = tmp_path / "model.engine"
    file.write_bytes(b"not an engine" * 100)
    with raises_naming(ArtifactError, file, "python x"):
        deserialize(rtx, ProgramFile.read(file), binding_for(rebuild="python x"))


def test_an_engine_of_a_library_that_is_not_here_names_it(fp16_artifact: Path):
    try:
        __import__("tensorrt")
    except (ImportError, OSError):
        pass
    else:
        pytest.skip("TensorRT is installed")
    manifest = read_artifact(fp16_artifact, allow_unchecked=True)
    with raises_naming(ArtifactError, "needs tensorrt"):
        open_program(fp16_artifact, manifest.model_copy(update={"runtime": "tensorrt"}))


def binding_for(**changes: Any) -> Binding:
    known = {
        "library": "tensorrt",
        "version": "11.1.0.106",
        "compute_capability": "9.0",
        "device": "NVIDIA H100",
        "rebuild": "python export/trt.py --precision int8",
    }
    return Binding(**known | changes)


@pytest.mark.parametrize(
    ("binding", "version", "gpu", "facts"),
    [
        (binding_for(), "11.4.0.106", H100, ("11.1.0.106", "11.4.0.106")),
        (binding_for(), "11.1.0.106", Gpu("A10", "8.6"), ("9.0", "8.6", "A10")),
        (binding_for(compute_capability="8.6 8.9"), "11.1.0.106", H100, ("8.6 8.9",)),
        (binding_for(), "11.1.0.106", None, ("NVIDIA GPU", "none")),
        (None, "11.1.0.106", H100, ("does not say",)),
    ],
)
def test_an_engine_of_another_machine_is_refused(
    binding: Binding | None, version: str, gpu: Gpu | None, facts: tuple[str, ...]
):
    command = "python export/ort.py" if gpu is None else "python export/trt.py"
    if binding is not None and gpu is not None:
        command += " --precision int8"
    with raises_naming(ArtifactError, command, *facts):
        require_same_machine(Path("artifacts/x"), binding, version, gpu)


def test_an_engine_of_this_machine_is_taken_and_a_gpu_of_another_name_warned_of(
    caplog: pytest.LogCaptureFixture,
):
    for binding, gpu in (
        (binding_for(), H100),
        (binding_for(compute_capability=None, device="any"), H100),
        (binding_for(compute_capability="8.6 9.0", device="two"), H100),
        (binding_for(), Gpu("NVIDIA H200", "9.0")),
    ):
        assert not caplog.text
        require_same_machine(Path("artifacts/x"), binding, "11.1.0.106", gpu)
    require_named(caplog.text, "NVIDIA H100", "NVIDIA H200")


@pytest.mark.parametrize(
    ("version", "gpu", "facts"),
    [
        ("11.4.0.106", V100, ("Tesla V100", "pip install tensorrt-cu12==10.4.0")),
        ("10.5.0", V100, ("10.5.0", "10.4")),
        ("8.6.1", H100, ("8.6.1", "10.1")),
        ("10.4.0", Gpu("GTX 1080", "6.1"), ("GTX 1080", "6.1")),
    ],
)
def test_a_version_without_kernels_for_the_gpu_is_refused(version: str, gpu: Gpu, facts: tuple):
    with raises_naming(TensorRTError, *facts):
        require_supported(version, gpu)
    require_supported("10.4.0", V100)
    require_supported("11.4.0.106", Gpu("T4", "7.5"))


@pytest.mark.parametrize(
    ("precision", "gpu"),
    [("bf16", V100), ("bf16", Gpu("T4", "7.5")), ("fp8", Gpu("A100", "8.0")), ("int8", V100)],
)
def test_a_precision_that_the_gpu_lacks_names_the_gpu(precision: Any, gpu: Gpu):
    with raises_naming(TensorRTError, gpu.name, precision):
        require_precision(precision, (gpu.compute_capability,), gpu)


@pytest.mark.parametrize(
    ("precision", "wanted", "facts"),
    [
        ("bf16", ("7.5", "8.6"), ("7.5", "bf16")),
        ("fp8", None, ("8.0", "fp8")),
        ("fp16", ("5.2",), ("5.2", "7.5 8.0", "portable")),
    ],
)
def test_rtx_refuses_gpus_that_it_cannot_build_for(
    rtx: Any, no_gpu: None, precision: Any, wanted: tuple[str, ...] | None, facts: tuple
):
    with raises_naming(TensorRTError, *facts):
        find_target("tensorrt-rtx", precision, wanted)


def test_tensorrt_without_a_gpu_is_refused_before_any_work(no_gpu: None):
    with raises_naming(TensorRTError, "no NVIDIA GPU"):
        trt.main(TrtConfig(checkpoint=Path("nowhere")))


def test_the_rebuild_command_has_the_same_settings():
    config = TrtConfig(
        checkpoint=Path("runs/a b/checkpoint"),
        precision="int8",
        batches=(1, 8),
        flavor="rtx",
        compute_capability=("8.6", "8.9"),
        size=64,
    )
    checkpoint = Path("runs/a b/checkpoint")
    for settings in (config, replace(config, checkpoint=None)):
        # The newest run may be another one by then.
        for path in (checkpoint, checkpoint.absolute()):
            command = shlex.split(rebuild_command("export/trt.py", settings, path))
            assert command[:2] == ["python", "export/trt.py"]
            assert parse_flags(TrtConfig, None, command[2:]) == config


@pytest.mark.parametrize(("num_images", "chosen"), [(1, 1), (2, 0), (8, 2), (9, 0)])
def test_the_profile_made_for_the_fewest_sizes_is_chosen(num_images: int, chosen: int):
    profiles = [Profile(None, 0, 1, 64), Profile(None, 1, 1, 1), Profile(None, 2, 8, 8)]
    assert choose_profile(num_images, profiles).number == chosen


@pytest.mark.parametrize(
    ("low", "opt", "high", "count"), [(1, 1, 64, 2), (1, 16, 64, 2), (4, 4, 4, 1)]
)
def test_the_smallest_batch_has_a_profile_of_its_own(low: int, opt: int, high: int, count: int):
    whole, *alone = profiles_for((low, opt, high))
    assert (whole.min, whole.opt, whole.max) == (low, opt, high)
    assert [(p.min, p.opt, p.max) for p in alone] == [(low, low, low)] * (count - 1)


# Ctrl-C in a process of its own: pytest's would take it, too.
INTERRUPTED_BUILDS = """
import os, signal, sys, time
import onnx
import tensorrt_rtx as rtx
from efficientnet.runtimes.tensorrt_library import messages_of
from export.builders.tensorrt_builder import BuildSettings, build_engine, profiles_for

signal.signal(signal.SIGINT, signal.default_int_handler)
graph = onnx.load(sys.argv[1])

def build(case):
    try:
        build_engine(rtx, graph, profiles_for((1, 1, 1)), BuildSettings(), "x")
    except KeyboardInterrupt:
        print("interrupted", case)

def interrupt_once(message):
    said.append(message)
    if len(said) == 1:
        os.kill(os.getpid(), signal.SIGINT)

said, messages = [], messages_of(rtx)
its_add, messages.add = messages.add, interrupt_once
build("in the log")
messages.add = its_add

class EndlessBuilder:
    def __init__(self, logger):
        self.builder = its_builder(logger)

    def __getattr__(self, name):
        return getattr(self.builder, name)

    def build_serialized_network(self, network, config):
        os.kill(os.getpid(), signal.SIGINT)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            if not config.progress_monitor.step_complete("endless", 0):
                print("ended by the monitor")
                return
            time.sleep(0.01)

its_builder, rtx.Builder = rtx.Builder, EndlessBuilder
build("in a step")
"""


def test_an_interrupt_ends_a_build_at_its_next_step_and_is_not_lost_in_the_log(
    rtx: Any, tmp_path: Path
):
    onnx.save(small_graph(), tmp_path / "small.onnx")
    command = [sys.executable, "-c", INTERRUPTED_BUILDS, str(tmp_path / "small.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = ["interrupted in the log", "ended by the monitor", "interrupted in a step"]
    assert done.stdout.splitlines() == found


def test_every_name_that_is_used_of_tensorrt_was_looked_up():
    listed = listed_names()
    sources = [
        *(ROOT / "efficientnet/runtimes").glob("tensorrt_*.py"),
        *(ROOT / "export/builders").glob("tensorrt_[bet]*.py"),
    ]
    used = set().union(*(names_used(path.read_text()) for path in sources))
    assert used == {name.rpartition(".")[2] for name in listed}


def test_every_listed_name_is_there(rtx: Any):
    for name in listed_names():
        functools.reduce(getattr, name.split("."), rtx)


def listed_names() -> list[str]:
    lines = (ROOT / "tests/tensorrt_names.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def names_used(source: str) -> set[str]:
    """Find the attributes of what is annotated with Any, and of what comes out of those."""
    nodes = list(ast.walk(ast.parse(source)))
    held = {n.arg for n in nodes if isinstance(n, ast.arg) and is_any(n.annotation)}
    held |= {
        last_name(n.target) for n in nodes if isinstance(n, ast.AnnAssign) and is_any(n.annotation)
    }

    def is_theirs(node: ast.AST) -> bool:
        match node:
            case ast.Name(id=name):
                return name in held
            case ast.Attribute(value=value, attr=name):
                return name in held or is_theirs(value)
            case ast.Call(func=value) | ast.Subscript(value=value):
                return is_theirs(value)
        return False

    used = {n.attr for n in nodes if isinstance(n, ast.Attribute) and is_theirs(n.value)}
    for node in nodes:
        if isinstance(node, ast.ClassDef) and any(map(is_theirs, node.bases)):
            used |= {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    return {name for name in used if not name.startswith("__")}


def is_any(annotation: ast.expr | None) -> bool:
    return isinstance(annotation, ast.Name) and annotation.id == "Any"


def last_name(target: ast.expr) -> str:
    assert isinstance(target, ast.Name | ast.Attribute)
    return target.id if isinstance(target, ast.Name) else target.attr


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("variant", ["b0", "v2-s", "v2-m", "v2-l"])
def test_rtx_parses_and_builds_every_variant(
    rtx: Any, tiny_checkpoint: Path, tmp_path: Path, variant: str, precision: Any
):
    _, record = load_checkpoint(tiny_checkpoint)
    torch.manual_seed(0)
    model = build_model(VARIANTS[variant], num_classes=10).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    # Statistics of its own: without them the maps of v2-l grow beyond float16.
    with torch.no_grad():
        model(torch.randn(8, 3, 64, 64))
    checkpoint = tmp_path / "checkpoint"
    save_checkpoint(
        checkpoint,
        model.state_dict(),
        record.model_copy(update={"variant": variant}),
        train_state=None,
    )
    changes = {"precision": precision, "size": 64, "num_calibration_images": 64}
    output = trt.main(rtx_config(checkpoint, tmp_path / "artifact", **changes))
    manifest = read_artifact(output, allow_unchecked=True)
    assert manifest.variant == variant
    assert FORMATS[precision] in convolution_formats(output)


@pytest.fixture(scope="module")
def gpu_artifact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("tensorrt", reason="TensorRT is not installed")
    output = tmp_path_factory.mktemp("artifacts") / "tensorrt-fp16"
    return trt.main(TrtConfig(checkpoint=tiny_checkpoint, output=output, batch=(1, 4, 16)))


@pytest.mark.gpu
def test_an_fp16_engine_answers_like_the_model(gpu_artifact: Path):
    manifest = read_artifact(gpu_artifact)
    assert manifest.parity is not None and manifest.parity.top1_agreement == 1.0
    assert (gpu_artifact / "layers.json").is_file()


@pytest.mark.gpu
def test_a_second_build_takes_the_timing_cache(gpu_artifact: Path, tiny_checkpoint: Path):
    (cache,) = gpu_artifact.parent.glob(".timing-cache-tensorrt-*")
    cache.write_bytes(b"of another library")
    output = gpu_artifact.parent / "again"
    trt.main(TrtConfig(checkpoint=tiny_checkpoint, output=output, batch=(1, 1, 1)))
    assert cache.stat().st_size > 100


@pytest.mark.gpu
def test_batches_are_filled_up_to_the_next_engine(
    gpu_artifact: Path, tiny_checkpoint: Path, tmp_path: Path
):
    output = tmp_path / "static"
    trt.main(TrtConfig(checkpoint=tiny_checkpoint, output=output, batches=(4, 8)))
    images = digits(8)
    runtime = open_runtime(output)
    expected = runtime.infer(images)
    for num_images in (1, 3, 4, 5, 8):
        found = runtime.infer(images[:num_images])
        assert found.shape == (num_images, 10)
        np.testing.assert_allclose(found, expected[:num_images], atol=0.05)
