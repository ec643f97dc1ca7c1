"""Program and image -> what its runtime really executes, from the runtime's own profile or code."""

import importlib
import json
import re
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from export.builders.measuring import Infer
from export.graphs.folding import INPUT_NAME
from export.graphs.fusable_parts import (
    GATE_MUL,
    GATE_SIGMOID,
    NOT_FOUND,
    PARTS,
    RESIDUAL,
    SILU,
    Executed,
    executed_of,
    find_parts,
)


def executed_by_onnxruntime(
    program: Path, image: NDArray[np.float32], totals: dict[str, int]
) -> Executed:
    """Read ONNX Runtime's own profile of a call; what is inside a node, from the optimized graph.

    A convolution takes the residual as its fourth input, and names its activation.
    """
    ort: Any = importlib.import_module("onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = f"{folder}/optimized.onnx"
        options.enable_profiling = True
        options.profile_file_prefix = f"{folder}/profile"
        # It warns that such a file is for this processor only.
        options.log_severity_level = 3
        session = ort.InferenceSession(program, options, providers=["CPUExecutionProvider"])
        session.run(None, {INPUT_NAME: image})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        optimized = onnx.load(f"{folder}/optimized.onnx").graph
    suffix = "_kernel_time"
    kinds = {
        event["name"].removesuffix(suffix): event["args"]["op_name"]
        for event in events
        if event["cat"] == "Node" and event["name"].endswith(suffix)
    }
    own = {
        part: [kinds[node.name] for node in nodes if node.name in kinds]
        for part, nodes in find_parts(optimized).items()
    }
    for node in optimized.node:
        kind = kinds.get(node.name)
        activation = next((a.s.decode() for a in node.attribute if a.name == "activation"), None)
        if kind is None:
            continue
        if kind == "QuickGelu" or activation in ("QuickGelu", "Swish", "Silu"):
            own[SILU].append(kind)
        elif activation == "Sigmoid":
            own[GATE_SIGMOID].append(kind)
        if kind in ("Conv", "FusedConv") and len(node.input) > 3:
            own[RESIDUAL].append(kind)
    return executed_of(kinds.values(), totals, own)


def executed_by_openvino(
    program: Path, image: NDArray[np.float32], graph: onnx.ModelProto
) -> Executed:
    """Read the plugin's runtime model, which tells the layers that each of its nodes does."""
    runtime: Any = importlib.import_module("efficientnet.runtimes.openvino_runtime")
    core = runtime.openvino_core()
    model = core.read_model(program)
    model.reshape(list(image.shape))
    settings = {
        "INFERENCE_PRECISION_HINT": runtime.HINTS["fp32"],
        "PERFORMANCE_HINT": "LATENCY",
        "PERF_COUNT": True,
    }
    compiled = core.compile_model(model, runtime.DEVICE, settings)
    compiled(image)
    kinds: list[str] = []
    done_by: dict[str, str] = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        time, kind = (info[key].astype(str) for key in ("execTimeMcs", "layerType"))
        # What has constant inputs only was computed when the model was compiled.
        if time == "not_executed" or kind in ("Input", "Output", "Const"):
            continue
        kinds.append(kind)
        done_by |= dict.fromkeys(info["originalLayersNames"].astype(str).split(","), kind)
    parts = find_parts(graph.graph)
    totals = {part: len(nodes) for part, nodes in parts.items()}
    found = {
        part: [done_by[node.name] for node in nodes if node.name in done_by]
        for part, nodes in parts.items()
    }
    return executed_of(kinds, totals, found)


class _CountOperators(TorchDispatchMode):
    # The profiler's innermost events are allocations and views inside of operators.
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def executed_by_torch(infer: Infer, image: NDArray[np.float32], totals: dict[str, int]) -> Executed:
    """Count the operators of a call, without views of tensors."""
    with _CountOperators() as counted:
        infer(image)
    operators = {
        RESIDUAL: ("add", "add_"),
        GATE_SIGMOID: ("sigmoid", "sigmoid_"),
        GATE_MUL: ("mul", "mul_"),
        SILU: ("silu", "silu_"),
    }
    found = {part: [n for n in counted.names if n in names] for part, names in operators.items()}
    rest = next((n for n in counted.names if n == "squeeze_excite"), NOT_FOUND)
    return executed_of(counted.names, totals, found, rest)


def executed_by_inductor(package: Path, totals: dict[str, int]) -> Executed:
    """Read the kernels that the code in a compiled package calls, with what is inside of each.

    Fused kernels are named by what is in them, oneDNN's are told by an argument.
    """
    with zipfile.ZipFile(package) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".wrapper.cpp"))
        code = archive.read(name).decode()
    begin = code.index("void AOTInductorModel::run_impl(")
    body = code[begin : code.index("// AOTInductorModel::run_impl", begin)]
    call = r"^ *(?:AOTI_TORCH_ERROR_CODE_CHECK\()?(?:call_)?(cpp_|triton_|aoti_torch_(?:cpu|cuda)_)"
    words = {
        RESIDUAL: ("add",),
        GATE_SIGMOID: ("sigmoid",),
        GATE_MUL: ("mul",),
        SILU: ("silu", "swish"),
    }
    kinds: list[str] = []
    found: dict[str, list[str]] = {part: [] for part in PARTS}
    for found_call in re.finditer(rf"{call}(\w+)\((.*)$", body, re.M):
        prefix, name, arguments = found_call.groups()
        is_library = prefix.startswith("aoti_torch")
        kind = name.strip("_") if is_library else f"{prefix}{re.sub(r'_[0-9]+$', '', name)}"
        inside = re.findall(r'"(\w+)"', arguments) if is_library else kind.split("_")
        kinds.append(kind)
        for part, aliases in words.items():
            found[part] += [kind] if any(word in inside for word in aliases) else []
    rest = next((kind for kind in kinds if "squeeze_excite" in kind), NOT_FOUND)
    return executed_of(kinds, totals, found, rest)


def executed_by_tensorrt(layers: Sequence[dict[str, Any]], graph: onnx.ModelProto) -> Executed:
    """Read the engine inspector's layers, which name the nodes of the graph that each does."""
    parts = find_parts(graph.graph)
    kinds = [str(layer.get("LayerType", "layer")) for layer in layers]
    texts = [f"{layer.get('Name', '')} {layer.get('Metadata', '')}" for layer in layers]
    found: dict[str, list[str]] = {}
    for part, nodes in parts.items():
        patterns = [re.compile(rf"(?<![\w.]){re.escape(node.name)}(?!\w)") for node in nodes]
        done_by = (
            next((k for k, text in zip(kinds, texts, strict=True) if pattern.search(text)), None)
            for pattern in patterns
        )
        found[part] = [kind for kind in done_by if kind is not None]
    totals = {part: len(nodes) for part, nodes in parts.items()}
    return executed_of(kinds, totals, found)
