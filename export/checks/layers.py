"""What a program's layers put out, and the eager model's -> where they first differ too much."""

import copy
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import nn

from efficientnet.machine.environment import num_usable_cores
from efficientnet.network import model as networks
from efficientnet.precision import Precision
from efficientnet.reporting.tables import Table
from efficientnet.runtimes.native.engine import Engine
from efficientnet.runtimes.native.program_file import read_program_file, real_values
from efficientnet.runtimes.native_runtime import NAMES_FILE
from export.checks.sensitivity import named_blocks
from export.graphs.folding import (
    INPUT_NAME,
    OUTPUT_NAME,
    ConvSqueezeExcite,
    use_convolutions_in_squeeze_excite,
)

NUM_IMAGES = 4

# Largest error of a layer that is rounding, as LayerError has it. It adds up from block to block,
# and levels out: of a V2-B0 trained on CIFAR-10 at 1.3e-6 in fp32, 1.1e-3 in fp16, 0.013 in bf16,
# 0.21 in int8 and 0.20 in fp8.
BOUNDS: dict[Precision, float] = {"fp32": 1e-4, "fp16": 0.02, "bf16": 0.15, "int8": 0.5, "fp8": 0.5}

POOL = "avgpool"
CLASSIFIER = "classifier"

# Node of the ONNX graph that puts a module's map out; a gate's convolutions have no batch norm.
OPERATORS: dict[type[nn.Module], str] = {
    networks.ReLU6: "Clip",
    networks.MBConv: "Add",
    networks.FusedMBConv: "Add",
    ConvSqueezeExcite: "Mul",
    nn.AdaptiveAvgPool2d: "GlobalAveragePool",
    nn.Conv2d: "Conv",
    nn.Sigmoid: "Sigmoid",
}

NamedActivations = dict[str, NDArray[Any]]

# Names of layers (as export_onnx names nodes) and images [N, 3, H, W] -> what these layers put out;
# those that a program does not have are left out.
Show = Callable[[Sequence[str], NDArray[np.float32]], NamedActivations]


class LayerError(BaseModel):
    """One block or layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """A block's name is its module's in model.py, a layer's that of its node in the ONNX graph."""
    error: float
    """Root of the mean squared difference, relative to that of the eager model's map; null in JSON
    when it is not finite."""


class LayersRecord(BaseModel):
    """A program compared with the eager model block by block, and then within one block."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: str
    """Name of the step whose layers these are."""
    note: str | None
    """Why they are not those of the step that breaks."""
    num_images: int
    bound: float
    """Largest error that is rounding."""
    blocks: tuple[LayerError, ...]
    """In order, the first to the last."""
    block: str
    """The first above the bound; when none is, the one at which the error rises most."""
    layers: tuple[LayerError, ...]
    """Of that block, in order."""
    layer: str
    """Of those, chosen alike."""
    is_above_bound: bool
    """Whether any block is."""


def compare_layers(
    model: networks.EfficientNet,
    show: Show,
    images: NDArray[np.float32],
    precision: Precision,
    step: str,
    note: str | None = None,
) -> LayersRecord:
    """Find the first block that differs too much from the eager model's, and the layer in it."""
    by_block = layers_by_block(model)
    bound = BOUNDS[precision]

    def errors_of(names: Sequence[str]) -> dict[str, float]:
        found = show(names, images)
        expected = show_model(model, list(found), images)
        return {n: relative_error(found[n], expected[n]) for n in names if n in found}

    last_layers = {names[-1]: block for block, names in by_block.items()}
    blocks = {last_layers[n]: error for n, error in errors_of(list(last_layers)).items()}
    block = first_above(blocks, bound)
    layers = errors_of(by_block[block])
    return LayersRecord(
        step=step,
        note=note,
        num_images=len(images),
        bound=bound,
        blocks=_records(blocks),
        block=block,
        layers=_records(layers),
        layer=first_above(layers, bound),
        is_above_bound=blocks[block] > bound,
    )


def first_above(errors: dict[str, float], bound: float) -> str:
    """Return the first name whose error is above the bound, or that at which it rises most."""
    for name, error in errors.items():
        if error > bound:
            return name
    before = [0.0, *errors.values()]
    rises = {name: error - before[i] for i, (name, error) in enumerate(errors.items())}
    return max(rises, key=lambda name: rises[name])


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Return the root of the mean squared difference over that of what is expected; inf for NaN."""
    wide, reference = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    scale = max(float(np.square(reference).mean()), np.finfo(np.float32).tiny)
    error = float(np.sqrt(np.square(wide - reference).mean() / scale))
    return error if np.isfinite(error) else float("inf")


def tables_of(record: LayersRecord) -> str:
    """Write the blocks, then the layers of the one that is named, and the verdict."""
    above = f"the first above {record.bound:g}"
    if not record.is_above_bound:
        above = f"nothing is above {record.bound:g}, and the error rises most there"
    parts = [
        f"layers of {record.step} against the eager model on the {record.num_images} images with "
        "the largest logit errors",
        *([record.note] if record.note else []),
        _table("block", record.blocks, record.block).aligned_text(),
        _table(f"layer of {record.block}", record.layers, record.layer).aligned_text(),
        f"block {record.block}, layer {record.layer}: {above}",
    ]
    return "\n".join(parts)


def layers_by_block(model: networks.EfficientNet) -> dict[str, list[str]]:
    """Name the layers of each block in order, as in the ONNX graph; the last gives its output."""
    names: dict[str, list[str]] = {}
    for name, block in named_blocks(model):
        names[name] = []
        for path, module in block.named_modules(prefix=name):
            if isinstance(module, networks.ConvNormAct):
                names[name].append(f"{path}.0/Conv")
                names[name] += _activation_layers(module, path)
            elif isinstance(module, networks.SqueezeExcite):
                names[name] += [*_gate_layers(path), f"{path}/Mul"]
        if isinstance(block, networks.ResidualBlock) and block.has_residual:
            names[name].append(f"{name}/Add")
    return names | {POOL: [f"{POOL}/GlobalAveragePool"], CLASSIFIER: [OUTPUT_NAME]}


def show_model(
    model: networks.EfficientNet, names: Sequence[str], images: NDArray[np.float32]
) -> NamedActivations:
    """Show layers of a torch model under the names of the ONNX graph, batch norm folded or not."""
    network, wanted, found = copy.deepcopy(model), set(names), NamedActivations()
    use_convolutions_in_squeeze_excite(network)

    def keep(name: str, value: Any) -> None:
        # The next layer may work in place.
        if name in wanted:
            found[name] = value.numpy().copy()

    def watch(module: nn.Module, name: str) -> None:
        module.register_forward_hook(lambda _, __, output: keep(name, output))

    for path, module in network.named_modules():
        if isinstance(module, networks.ConvNormAct):
            watch(module[1], f"{path}.0/Conv")
        elif isinstance(module, (networks.SiLU, nn.SiLU)):
            module.register_forward_pre_hook(
                lambda _, inputs, path=path: keep(f"{path}/Sigmoid", inputs[0].sigmoid())
            )
            watch(module, f"{path}/Mul")
        elif type(module) in OPERATORS:
            watch(module, f"{path}/{OPERATORS[type(module)]}")
    watch(network, OUTPUT_NAME)
    with torch.inference_mode():
        network(torch.from_numpy(images))
    return found


def show_native(
    program: Path, names: Sequence[str], images: NDArray[np.float32]
) -> NamedActivations:
    """Show layers of a native program; activations that the engine does not write are left out."""
    tensors = read_program_file(program).tensors
    known = json.loads((program.parent / NAMES_FILE).read_text(encoding="utf-8"))["tensors"]
    # Where a map is there in both types, the first was computed and the second converted.
    wanted = {name: known.index(name) for name in names if name in known}
    engine = Engine(program, keeps_tensors=True)
    found: dict[str, list[NDArray[np.float32]]] = {name: [] for name in wanted}
    logits: list[NDArray[np.float32]] = []
    for image in images:
        logits.append(engine.infer(image[None]))
        for name, index in wanted.items():
            values = real_values(engine.read_tensor(index, tensors[index]), tensors[index])
            found[name].append(values.transpose(2, 0, 1))
    shown = {name: np.stack(activations) for name, activations in found.items()}
    return shown | ({OUTPUT_NAME: np.concatenate(logits)} if OUTPUT_NAME in names else {})


def show_onnx(
    graph: onnx.ModelProto, is_optimized: bool, names: Sequence[str], images: NDArray[np.float32]
) -> NamedActivations:
    """Show layers of an ONNX graph, run by ONNX Runtime's CPU provider.

    Activations in 8 bits are shown quantized, so that the layer still computes in 8 bits.
    """
    there = {output for node in graph.graph.node for output in node.output}
    taps = {
        name: next(tap for tap in (f"{name}/DequantizeLinear", name) if tap in there)
        for name in names
        if name in there
    }
    probe = onnx.ModelProto()
    probe.CopyFrom(graph)
    probe.graph.output.extend(
        onnx.ValueInfoProto(name=tap) for tap in taps.values() if tap != OUTPUT_NAME
    )
    session = open_session(probe, is_optimized)
    values = session.run(list(taps.values()), {INPUT_NAME: images})
    return {name: np.asarray(v) for name, v in zip(taps, values, strict=True)}


def show_openvino(
    program: Path, float_precision: Precision, names: Sequence[str], images: NDArray[np.float32]
) -> NamedActivations:
    """Show layers of an OpenVINO program; those that the plugin joined to others are left out.

    Activations that NNCF quantizes are shown quantized, so that the layer still computes in 8 bits;
    `float_precision` is what is computed in where it is not int8.
    """
    # Imported only for its artifacts, so that OpenVINO is not needed by the others.
    runtime: Any = importlib.import_module("efficientnet.runtimes.openvino_runtime")
    core = runtime.openvino_core()
    model = core.read_model(program)
    nodes = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
    taps = {
        name: next(nodes[tap] for tap in (f"{name}/fq_output_0", name) if tap in nodes)
        for name in names
        if name in nodes
    }
    outputs = [node.output(0) for node in taps.values()]
    model = runtime.ov.Model(outputs, model.get_parameters(), "layers")
    model.reshape(list(images.shape))
    hint = {"INFERENCE_PRECISION_HINT": runtime.HINTS[float_precision]}
    values = core.compile_model(model, runtime.DEVICE, hint)(images)
    return {name: np.array(values[index]) for index, name in enumerate(taps)}


def open_session(graph: onnx.ModelProto, is_optimized: bool) -> ort.InferenceSession:
    """Open a graph on ONNX Runtime's CPU provider, with all its graph optimisations or none."""
    levels = ort.GraphOptimizationLevel
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_usable_cores()
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if is_optimized else levels.ORT_DISABLE_ALL
    )
    return ort.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _activation_layers(module: networks.ConvNormAct, path: str) -> list[str]:
    # The last one gives the activation's output.
    if len(module) == 2:
        return []
    operators = ("Clip",) if isinstance(module[2], networks.ReLU6) else ("Sigmoid", "Mul")
    return [f"{path}.2/{operator}" for operator in operators]


def _gate_layers(path: str) -> list[str]:
    layers = ("pool/GlobalAveragePool", "gate.0/Conv", "gate.1/Sigmoid", "gate.1/Mul")
    return [f"{path}.{layer}" for layer in (*layers, "gate.2/Conv", "gate.3/Sigmoid")]


def _records(errors: dict[str, float]) -> tuple[LayerError, ...]:
    return tuple(LayerError(name=name, error=error) for name, error in errors.items())


def _table(title: str, errors: Sequence[LayerError], marked: str) -> Table:
    rows = [(e.name, f"{e.error:.1e}", "<--" if e.name == marked else "") for e in errors]
    return Table((title, "error", ""), tuple(rows), frozenset({title, ""}))
