"""A runtime's profile of some calls -> the executed nodes, each with its module, kind, operations.

ONNX Runtime tells every call, so a node's time is its fastest; writing the profile takes about 4 us
of it. OpenVINO's plugin tells the mean of all calls since the program was compiled: it is compiled
several times, the first call of each, which prepares weights, is taken out, and the lowest of the
means counts. The native engine tells of each layer of every call, too, and which layers it computed
together.
"""

import importlib
import json
import re
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from efficientnet.formats.artifact import ArtifactManifest
from efficientnet.network.cost import LayerCost
from efficientnet.runtimes.names import RUNTIMES

NUM_WARM_UP_CALLS = 3
CALLS_PER_ROUND = 5

# Runtimes cut times off at whole microseconds; half of one is lost on average.
HALF_MICROSECOND = 0.5

SILU = "SiLU"
ADDITION = "addition"
QUANTIZE = "quantize, dequantize"
REORDER = "reorder, transpose, cast"
POOLING = "pooling"
SQUEEZE_EXCITE = "squeeze-excite"
CLASSIFIER = "classifier"
OTHER = "other"

KINDS_OF_OPERATORS = {"add": ADDITION, "squeeze-excite": SQUEEZE_EXCITE, "linear": CLASSIFIER}

MATRIX_OPERATORS = frozenset(
    ("Convolution", "GroupConvolution", "ConvInteger", "FullyConnected", "Gemm", "FusedGemm")
) | {"QGemm", "MatMul", "FusedMatMul", "QLinearMatMul", "MatMulInteger", "SqueezeExcite"}
QUANTIZE_OPERATORS = frozenset(
    ("FakeQuantize", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
)
REORDER_OPERATORS = frozenset(
    ("Reorder", "ReorderInput", "ReorderOutput", "Transpose", "Reshape", "Flatten", "Squeeze")
) | {"Unsqueeze", "Cast", "Convert"}

# NNCF's name for a node that rounds what another puts out.
ROUNDING = "/fq_"

MODULE = re.compile(r"features(\.(\d+|block|gate|pool))+|classifier\.1|avgpool")

Batches = Iterator[NDArray[np.float32]]


@dataclass(frozen=True)
class Node:
    """What a runtime tells of one node that it executed."""

    name: str
    operator: str
    """As the runtime calls it: Conv, GroupConvolution, ReorderInput."""
    kernel: str
    ms: float
    covered: tuple[str, ...] = ()
    """Names of the original nodes that it does, where the runtime tells."""


@dataclass(frozen=True)
class Profile:
    """The executed nodes in order, and the fastest call while they were timed."""

    nodes: tuple[Node, ...]
    call_ms: float


class LayerTime(BaseModel):
    """One executed node."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """As the runtime calls it."""
    module: str
    """Path of the module in the exported network; of a node that has none in its name, of the node
    before it."""
    kind: str
    kernel: str
    """What executes it: OpenVINO's kernel, ONNX Runtime's operator, the native engine's
    instructions."""
    ms: float
    operations: int
    """Of the convolutions or the classifier in it: two for each multiply-add."""
    gop_per_s: float | None
    """1e9 operations a second; None where there are none."""
    share_of_peak: float | None
    """Of the device, 0..1; None where there are no operations or its peak is not known."""
    limits_ms: dict[str, float] | None = None
    """The least time by what limits it, of the native engine's layers: see native_limits.py."""


def profile_onnxruntime(
    program: Path, manifest: ArtifactManifest, batches: Batches, num_threads: int, num_calls: int
) -> Profile:
    """Run an ONNX program on the CPU provider with ONNX Runtime's profiling."""
    ort: Any = importlib.import_module("onnxruntime")
    providers = importlib.import_module(RUNTIMES["onnxruntime"].module).PROVIDERS
    suffix = "_kernel_time"
    with tempfile.TemporaryDirectory(prefix="layers-") as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.enable_profiling = True
        options.profile_file_prefix = f"{folder}/profile"
        session = ort.InferenceSession(program, options, providers=[providers["cpu"]])

        def call() -> None:
            session.run(None, {manifest.input.name: next(batches)})

        for _ in range(NUM_WARM_UP_CALLS):
            call()
        call_ms = min(time_calls(call, num_calls))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    times: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith(suffix):
            name, arguments = event["name"].removesuffix(suffix), event["args"]
            times[name, arguments["node_index"], arguments["op_name"]].append(event["dur"])
    nodes: list[Node] = []
    for (name, _, operator), all_us in times.items():
        kernel = f"{operator} NCHWc" if name.endswith("_nchwc") else operator
        ms = (min(all_us[NUM_WARM_UP_CALLS:]) + HALF_MICROSECOND) / 1e3
        nodes.append(Node(name, operator, kernel, ms))
    return Profile(tuple(nodes), call_ms)


def profile_openvino(
    program: Path, manifest: ArtifactManifest, batches: Batches, num_threads: int, num_calls: int
) -> Profile:
    """Run an OpenVINO program with the plugin's counters, compiled as the runtime does."""
    runtime: Any = importlib.import_module(RUNTIMES["openvino"].module)
    first = next(batches)
    quantization = manifest.quantization
    precision = quantization.kept_precision if quantization else manifest.precision
    settings = runtime.compile_properties(precision, num_threads) | {"PERF_COUNT": True}
    core = runtime.openvino_core()
    model = core.read_model(program)
    shape = list(first.shape)
    model.reshape(shape if shape[0] in manifest.static_batches else [-1, *shape[1:]])
    rounds: list[list[Node]] = []
    times_ms: list[float] = []
    num_calls_a_round = min(num_calls, CALLS_PER_ROUND)
    for _ in range(-(-num_calls // num_calls_a_round)):
        compiled = core.compile_model(model, runtime.DEVICE, settings)
        request = compiled.create_infer_request()
        request.infer({0: first})
        first_us = [_microseconds(info) for info in request.get_profiling_info()]
        infer = request.infer
        times_ms += time_calls(lambda infer=infer: infer({0: next(batches)}), num_calls_a_round)
        covered = {
            node.get_friendly_name(): node.get_rt_info()["originalLayersNames"].astype(str)
            for node in compiled.get_runtime_model().get_ordered_ops()
        }
        found: list[Node] = []
        for info, before_us in zip(request.get_profiling_info(), first_us, strict=True):
            # Not by its time, nor by its status, which follows from that: on a fast processor what
            # takes less than a microsecond is told as 0. Without a kernel it is part of another.
            if info.exec_type.startswith(("undef", "unknown")):
                continue
            ms = later_mean_us(before_us, _microseconds(info), num_calls_a_round) / 1e3
            names = tuple(filter(None, covered.get(info.node_name, "").split(",")))
            found.append(Node(info.node_name, info.node_type, info.exec_type, ms, names))
        rounds.append(found)
    fastest = [min(same, key=lambda node: node.ms) for same in zip(*rounds, strict=True)]
    return Profile(tuple(fastest), min(times_ms))


def profile_native(
    program: Path, manifest: ArtifactManifest, batches: Batches, num_threads: int, num_calls: int
) -> Profile:
    """Run a native program with the engine's own clock."""
    runtime: Any = importlib.import_module(RUNTIMES["native"].module)
    engine = runtime.open_timed(program, num_threads)
    times_ms: list[float] = []
    seconds: list[list[float]] = []
    for number in range(NUM_WARM_UP_CALLS + num_calls):
        images = next(batches)
        times = time_calls(lambda images=images: engine.infer(images), 1)
        if number >= NUM_WARM_UP_CALLS:
            times_ms += times
            seconds.append(engine.layer_times())
    names = json.loads((program.parent / runtime.NAMES_FILE).read_text(encoding="utf-8"))
    nodes: list[Node] = []
    together: list[str] = []
    for name, *of_layer in zip(names["layers"], *seconds, strict=True):
        together.append(name)
        # A layer that is computed together with a later one has no time of its own.
        if any(of_layer):
            operator = name.rpartition("/")[2]
            ms = 1e3 * min(of_layer)
            nodes.append(Node(name, operator, engine.level, ms, tuple(together)))
            together = []
    return Profile(tuple(nodes), min(times_ms))


PROFILERS = {
    "onnxruntime": profile_onnxruntime,
    "openvino": profile_openvino,
    "native": profile_native,
}


def later_mean_us(first_us: int, mean_us: int, num_later: int) -> float:
    """Take the first call out of a mean over it and `num_later` calls, which was rounded down.

    Right within a microsecond; a mean of 0 tells of less than that.
    """
    total_us = mean_us * (num_later + 1) + num_later / 2
    return max(0.0, total_us - first_us) / num_later + HALF_MICROSECOND


def time_calls(call: Callable[[], object], num_calls: int) -> list[float]:
    """Call and return the milliseconds of each."""
    times_ms: list[float] = []
    for _ in range(num_calls):
        started = time.perf_counter_ns()
        call()
        times_ms.append((time.perf_counter_ns() - started) / 1e6)
    return times_ms


def layer_times(
    nodes: Sequence[Node],
    costs: Sequence[LayerCost],
    output_name: str,
    operations_per_s: float | None,
) -> tuple[LayerTime, ...]:
    """Give each node, in the order in which they run, its module, kind and operations.

    A layer's operations go to the convolutions and matrix products that do it, in equal parts where
    there are several, as in squeeze-excite. Some runtimes name the last node after the output.
    """
    layers = _Layers(costs)
    modules: list[str] = []
    for node in nodes:
        modules.append(_module_of(node, output_name) or (modules[-1] if modules else ""))
    done_by = [
        layers.done_by(node, module) if _is_matrix(node) else ()
        for node, module in zip(nodes, modules, strict=True)
    ]
    num_nodes = Counter(layer.name for done in done_by for layer in done)
    rows: list[LayerTime] = []
    for node, module, done in zip(nodes, modules, done_by, strict=True):
        operations = sum(layer.cost.flops // num_nodes[layer.name] for layer in done)
        rows.append(
            LayerTime(
                name=node.name,
                module=module,
                kind=layers.kind_of(node, module),
                kernel=node.kernel,
                ms=node.ms,
                operations=operations,
                gop_per_s=gop_per_s(operations, node.ms),
                share_of_peak=share_of_peak(operations, node.ms, operations_per_s),
            )
        )
    return tuple(rows)


def gop_per_s(operations: int, ms: float) -> float | None:
    """Return 1e9 operations a second; None without operations."""
    return operations / ms / 1e6 if operations else None


def share_of_peak(operations: int, ms: float, operations_per_s: float | None) -> float | None:
    """Return the share of what a device can do, 0..1; None without operations or a known peak."""
    return operations / ms * 1e3 / operations_per_s if operations and operations_per_s else None


class _Layers:
    # Finds the layer of efficientnet.network.cost that a module belongs to.
    def __init__(self, costs: Sequence[LayerCost]) -> None:
        self._by_name = {layer.name: layer for layer in costs}
        self._gates = tuple(layer for layer in costs if layer.operator == "squeeze-excite")
        # ConvNormAct: the convolution is its module 0, SiLU its module 2.
        self._by_silu = {
            f"{name.removesuffix('.0')}.2": layer
            for name, layer in self._by_name.items()
            if layer.operator.startswith(("conv", "depthwise"))
        }

    def of(self, module: str) -> LayerCost | None:
        for gate in self._gates:
            if module == gate.name or module.startswith(f"{gate.name}."):
                return gate
        return self._by_name.get(module) or self._by_silu.get(module)

    def done_by(self, node: Node, module: str) -> tuple[LayerCost, ...]:
        own = self.of(module)
        found = {own.name: own} if own else {}
        for name in node.covered:
            layer = self.of(_module_in(name))
            # One node may do two convolutions, but none of squeeze-excite does those around it.
            if (
                layer
                and layer.operator.startswith(("conv", "depthwise"))
                and own not in self._gates
            ):
                found[layer.name] = layer
        return tuple(found.values())

    def kind_of(self, node: Node, module: str) -> str:
        layer = self.of(module)
        if node.operator in REORDER_OPERATORS:
            return REORDER
        names = node.covered or (node.name,)
        if node.operator in QUANTIZE_OPERATORS or all(ROUNDING in name for name in names):
            return QUANTIZE
        if _is_matrix(node) and layer:
            return kind_of_layer(layer)
        if module in self._by_silu and module not in self._by_name:
            return SILU
        if layer and layer.operator in ("add", "squeeze-excite"):
            return kind_of_layer(layer)
        return POOLING if module == "avgpool" else OTHER


def kind_of_layer(layer: LayerCost) -> str:
    """Name the kind of a layer: convolution 1x1, convolution 3x3, depthwise, squeeze-excite, ..."""
    kind, _, size = layer.operator.partition(" ")
    if kind == "conv":
        return f"convolution {size}"
    return KINDS_OF_OPERATORS.get(kind, kind)


def _module_of(node: Node, output_name: str) -> str:
    if node.operator not in REORDER_OPERATORS and node.name.startswith(output_name):
        return "classifier.1"
    return next(filter(None, map(_module_in, (node.name, *node.covered))), "")


def _module_in(name: str) -> str:
    found = MODULE.search(name)
    if found:
        return found.group()
    module, slash, _ = name.partition("/")
    return module if slash else ""


def _is_matrix(node: Node) -> bool:
    return node.operator.endswith("Conv") or node.operator in MATRIX_OPERATORS


def _microseconds(info: Any) -> int:
    return round(info.real_time.total_seconds() * 1e6)
