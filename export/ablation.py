"""Checkpoint -> what folding batch norm and fusing squeeze-excite bring, runtime by runtime.

    python export/ablation.py
    python export/ablation.py --runtimes onnxruntime openvino --seconds 60 --publish

Three forms of the same network: as it is written; with batch norm folded into the convolutions;
and with squeeze-excite in the form that export_onnx gives it as well. For each: latency, agreement
with the eager model, and how many nodes or kernels the runtime executes. A gain of nothing is
printed as that.

The rows of CUDA and TensorRT have not run so far, for lack of a GPU.
"""

import copy
import importlib
import json
import logging
import re
import statistics
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
import onnx_ir
import onnxscript.optimizer
import onnxscript.rewriter
import torch
from numpy.typing import NDArray
from onnx_ir.passes import common as passes
from onnxscript.rewriter.rules import common as rules
from pydantic import AwareDatetime, BaseModel, ConfigDict
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from efficientnet.artifact import Binding, StaticProgram, read_artifact
from efficientnet.atomic import write_text
from efficientnet.checkpoint import load_checkpoint
from efficientnet.command import parse_flags, run_command
from efficientnet.datasets import data_name
from efficientnet.environment import EnvironmentRecord, current_environment
from efficientnet.errors import PipelineError
from efficientnet.model import EfficientNet, ResidualBlock, SiLU, SqueezeExcite
from efficientnet.publishing import find_section, published_directory, write_section
from efficientnet.runtimes.protocol import RUNTIME_MODULES
from efficientnet.runtimes.tensorrt_runtime import current_gpu, why_no_gpu
from efficientnet.tables import NOTHING, Table, format_ms, format_ratio
from export.agreement import BATCH_SIZE
from export.config import ExportConfig
from export.graph import (
    INPUT_NAME,
    OPSET,
    OUTPUT_NAME,
    count_ops,
    count_weight_bytes,
    export_onnx,
    fold_batch_norm,
    name_by_module,
    use_convolutions_in_squeeze_excite,
)
from export.measuring import Infer, measure, measure_callables
from export.source import Source, load_source
from export.writing import Built, write_checked_artifact

Form = Literal["nothing", "folded", "fused"]
RuntimeName = Literal[
    "onnxruntime", "openvino", "torch", "aoti", "torch-cuda", "aoti-cuda", "tensorrt"
]

FORMS: dict[Form, str] = {
    "nothing": "nothing",
    "folded": "BN folded",
    "fused": "BN folded + SE fused",
}
RUNTIMES: tuple[RuntimeName, ...] = (
    *("onnxruntime", "openvino", "torch", "aoti"),
    *("torch-cuda", "aoti-cuda", "tensorrt"),
)

RESIDUAL, GATE_SIGMOID, GATE_MUL, SILU = "residual add", "gate's Sigmoid", "gate's Mul", "SiLU"
PARTS = (RESIDUAL, GATE_SIGMOID, GATE_MUL, SILU)

# Where a part is when no executed node can be named for it.
NOT_FOUND = "not found"

SECTION = "fusion"

REBUILD = "python export/ablation.py"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AblationConfig:
    """Settings of the ablation. All is computed in fp32: nothing but the graph's form differs."""

    checkpoint: Path | None = None
    """Checkpoint directory; None = the one of the newest complete run."""

    runtimes: tuple[RuntimeName, ...] = RUNTIMES
    """What executes the forms; those that are not here get a row that says why."""

    seconds: float = 10.0
    """Measured time of each form in each runtime, at batch size 1."""

    turns: int = 8
    """Turns that this time is split into."""

    output: Path | None = None
    """Folder that the artifacts stay in; None = none does."""

    data: str | None = None
    """Held-out images, where the training data has moved: a folder or tar shards, as in
    training/run.py; None = what the checkpoint was trained on."""

    num_parity_images: int = 128
    """Held-out images that each form is compared on, at least 64."""

    publish: bool = False
    """Write to reports/published/<date>-<device>/, and the table into the README."""

    readme: Path = Path("README.md")

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"--seconds is {self.seconds:g}, expected more than 0")
        if self.turns < 1:
            raise ValueError(f"--turns is {self.turns}, expected at least 1")
        if not self.runtimes or len(set(self.runtimes)) < len(self.runtimes):
            raise ValueError(
                f"--runtimes is {' '.join(self.runtimes)}, expected at least one, each once"
            )
        _ = self.export_config

    @property
    def export_config(self) -> ExportConfig:
        """What an export is told."""
        return ExportConfig(
            checkpoint=self.checkpoint,
            batch=(1, 1, 1),
            data=self.data,
            num_parity_images=self.num_parity_images,
        )


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Fate(_Frozen):
    """What became of one part of the network in a runtime."""

    part: str
    total: int
    """How often the network has it."""
    executed_by: dict[str, int]
    """Kind of the executed node -> how many of these parts it computes."""


class Executed(_Frozen):
    """What a runtime executes for one call."""

    kinds: dict[str, int]
    """Kind of node, kernel or operator -> how many, most first."""
    fates: tuple[Fate, ...]

    @property
    def num_nodes(self) -> int:
        """All of them."""
        return sum(self.kinds.values())


class FormRecord(_Frozen):
    """One form in one runtime."""

    runtime: str
    form: Form
    turn_p50_ms: tuple[float, ...] = ()
    """Median of a call in each turn; empty where it was not measured."""
    turn_ratios: tuple[float, ...] = ()
    """Its time over that of 'nothing' within each turn."""
    max_abs_logit_error: float | None = None
    """Against the eager model, on held-out images."""
    executed: Executed | None = None
    reason: str | None = None
    """Why it was not measured."""

    @property
    def p50_ms(self) -> float | None:
        """Median over the turns."""
        return statistics.median(self.turn_p50_ms) if self.turn_p50_ms else None

    @property
    def verdict(self) -> str:
        """Whether the form gains anything: only where no turn says otherwise."""
        if self.reason is not None:
            return f"not measured: {self.reason}"
        if self.form == "nothing":
            return ""
        if max(self.turn_ratios) < 1:
            return "faster"
        return "slower" if min(self.turn_ratios) > 1 else "no gain"


class AblationRecord(_Frozen):
    """All rows of one run."""

    format_version: Literal[1] = 1
    variant: str
    image_size: int
    """Pixels."""
    checkpoint_sha256: str
    num_parity_images: int
    data: str
    seconds: float
    """Measured for each row."""
    environment: EnvironmentRecord
    started_at: AwareDatetime
    rows: tuple[FormRecord, ...]


class Made(NamedTuple):
    """A form as a runtime's artifact, and what is executed of it."""

    artifact: Path
    executed: Executed


def main(config: AblationConfig) -> AblationRecord:
    """Make and measure all forms; return the record.

    Raises:
        CheckpointError: no whole checkpoint.
        PublishError: the README has no place for the table; nothing is measured then.
        PipelineError: a measurement failed.
    """
    if config.publish:
        find_section(config.readme, SECTION)
    started_at = datetime.now(UTC)
    source = load_source(config.export_config)
    rows: list[FormRecord] = []
    with ExitStack() as stack:
        scratch = config.output or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for number, runtime in enumerate(config.runtimes, start=1):
            log.info("[%d of %d] %s", number, len(config.runtimes), runtime)
            reason = why_not_here(runtime)
            if reason is not None:
                log.info("not measured: %s", reason)
                rows += [FormRecord(runtime=runtime, form=form, reason=reason) for form in FORMS]
            elif runtime in ("torch", "torch-cuda"):
                rows += measure_eager(runtime, source, config)
            else:
                rows += measure_artifacts(runtime, source, config, scratch / runtime)
    record = AblationRecord(
        variant=source.variant,
        image_size=source.image_size,
        checkpoint_sha256=source.record.weights_sha256,
        num_parity_images=config.num_parity_images,
        data=data_name(source.dataset.source),
        seconds=config.seconds,
        environment=current_environment(),
        started_at=started_at,
        rows=tuple(rows),
    )
    log.info("%s", "\n".join([table_of(rows).aligned_text(), *map(fate_line, fused_rows(rows))]))
    if config.publish:
        path = published_directory(started_at, [record.environment]) / f"{SECTION}.json"
        write_section(config.readme, SECTION, to_markdown(record))
        write_text(path, record.model_dump_json(indent=1) + "\n")
        title = "# What folding batch norm and fusing squeeze-excite bring"
        write_text(path.with_suffix(".md"), f"{title}\n\n{to_markdown(record)}")
        log.info("published: %s, and the table in %s", path, config.readme)
    return record


def why_not_here(runtime: RuntimeName) -> str | None:
    """Say what a runtime lacks on this machine; None when it runs here."""
    device = "cuda" if runtime.endswith("-cuda") else "cpu"
    try:
        importlib.import_module(RUNTIME_MODULES[runtime.removesuffix("-cuda")])
        if runtime.startswith("aoti"):
            aoti = importlib.import_module("export.aoti")
            aoti.find_target(aoti.AotiConfig(device=device))
            aoti.require_compiler()
        elif runtime == "tensorrt":
            importlib.import_module("export.trt_target").find_target("tensorrt", "fp32", None)
        elif device == "cuda" and current_gpu() is None:
            return f"no NVIDIA GPU answers here ({why_no_gpu()})"
    # A library without its driver fails with an OSError.
    except (ImportError, OSError, PipelineError) as error:
        return re.split(r"[:;,] ", str(error))[0]
    return None


def measure_eager(runtime: RuntimeName, source: Source, config: AblationConfig) -> list[FormRecord]:
    """Measure the eager models."""
    device = "cuda" if runtime == "torch-cuda" else "cpu"
    openers = {form: partial(open_eager, source.checkpoint, form, device) for form in FORMS}
    turns = measure_callables(openers, source.parity_images, config.seconds, config.turns)
    rows: list[FormRecord] = []
    for form in FORMS:
        model = EagerModel(model_in_form(source.model, form, device), device)
        images = source.parity_images
        batches = [images[i : i + BATCH_SIZE] for i in range(0, len(images), BATCH_SIZE)]
        logits = np.concatenate([model(batch) for batch in batches])
        error = float(np.abs(logits.astype(np.float64) - source.parity_logits).max())
        executed = executed_by_torch(model, images[:1], count_parts(source.model))
        rows.append(_row(runtime, form, turns[form], turns["nothing"], error, executed))
    return rows


def measure_artifacts(
    runtime: RuntimeName, source: Source, config: AblationConfig, folder: Path
) -> list[FormRecord]:
    """Measure the artifacts of a runtime."""
    made = {form: MAKERS[runtime](source, config, form, folder / form) for form in FORMS}
    manifests = {form: read_artifact(made[form].artifact) for form in FORMS}
    paths = [made[form].artifact for form in FORMS]
    records = measure(paths, config.seconds, config.turns, 1, config.data)
    turns = {form: records[manifests[form].program_sha256].turn_p50_ms for form in FORMS}
    rows: list[FormRecord] = []
    for form in FORMS:
        parity, executed = manifests[form].parity, made[form].executed
        assert parity is not None
        error = parity.max_abs_logit_error
        rows.append(_row(runtime, form, turns[form], turns["nothing"], error, executed))
    return rows


def _row(
    runtime: str,
    form: Form,
    turns: Sequence[float],
    turns_of_nothing: Sequence[float],
    error: float,
    executed: Executed,
) -> FormRecord:
    return FormRecord(
        runtime=runtime,
        form=form,
        turn_p50_ms=tuple(turns),
        turn_ratios=tuple(a / b for a, b in zip(turns, turns_of_nothing, strict=True)),
        max_abs_logit_error=error,
        executed=executed,
    )


def model_in_form(model: EfficientNet, form: Form, device: str = "cpu") -> nn.Module:
    """Return a copy of the network in evaluation mode, in one of the forms."""
    if form == "nothing":
        return copy.deepcopy(model).eval()
    network = fold_batch_norm(model)
    if form == "fused" and device == "cuda":
        # Triton is there where torch has CUDA.
        kernel = importlib.import_module("efficientnet.squeeze_excite_kernel")
        kernel.use_triton_squeeze_excite(network)
    elif form == "fused":
        use_convolutions_in_squeeze_excite(network)
    return network


@cache
def graph_in_form(model: EfficientNet, image_size: int, form: Form) -> onnx.ModelProto:
    """Export one of the forms to ONNX, with a free batch.

    torch's exporter folds batch norm by itself (the rewriter of onnxscript 0.7 does), so that
    'nothing' would have none: of its optimizer only what concerns constants and shapes is done
    here, in both forms that export_onnx does not make. Not to be changed: several runtimes get it.
    """
    if form == "fused":
        return export_onnx(model, image_size)
    program = torch.onnx.export(
        model_in_form(model, form),
        (torch.zeros(2, 3, image_size, image_size),),
        dynamo=True,
        opset_version=OPSET,
        input_names=[INPUT_NAME],
        output_names=[OUTPUT_NAME],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        optimize=False,
        verbose=False,
    )
    assert program is not None
    graph: Any = program.model
    onnxscript.optimizer.fold_constants_ir(graph)
    shape_rules: list[Any] = [
        *(rules.collapse_slice_rule, rules.collapse_slice2_rule),
        *(rules.unsqueeze_unsqueeze_rule, rules.materialize_reshape_shape_rule),
    ]
    onnxscript.rewriter.rewrite(graph, shape_rules)
    onnxscript.optimizer.fold_constants_ir(graph)
    onnx_ir.passes.Sequential(
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    )(graph)
    exported = program.model_proto
    name_by_module(exported.graph)
    for node in exported.graph.node:
        # Source paths of this machine, and stack traces.
        del node.metadata_props[:]
    onnx.checker.check_model(exported, full_check=True)
    return exported


def find_parts(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """Find residual adds, gates and SiLUs by what is connected to what; of a SiLU its product.

    In a graph that a runtime has optimized, those that are still nodes of their own are found.
    """
    constants = {tensor.name for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    parts: dict[str, list[onnx.NodeProto]] = {part: [] for part in PARTS}
    in_silu: set[str] = set()
    for node in graph.node:
        if len(node.input) != 2 or constants.intersection(node.input):
            continue
        if node.op_type == "Add":
            parts[RESIDUAL].append(node)
        elif node.op_type == "Mul":
            sigmoid = next((s for n in node.input if (s := _is_sigmoid(makers.get(n)))), None)
            if sigmoid is not None and sigmoid.input[0] in node.input:
                parts[SILU].append(node)
                in_silu.add(sigmoid.name)
            else:
                parts[GATE_MUL].append(node)
    sigmoids = (node for node in graph.node if node.op_type == "Sigmoid")
    parts[GATE_SIGMOID] = [node for node in sigmoids if node.name not in in_silu]
    return parts


def _is_sigmoid(node: onnx.NodeProto | None) -> onnx.NodeProto | None:
    return node if node is not None and node.op_type == "Sigmoid" else None


def count_parts(model: EfficientNet) -> dict[str, int]:
    """Count the parts of a network as it is written."""
    modules = list(model.modules())
    num_gates = sum(isinstance(m, SqueezeExcite) for m in modules)
    return {
        RESIDUAL: sum(isinstance(m, ResidualBlock) and m.has_residual for m in modules),
        GATE_SIGMOID: num_gates,
        GATE_MUL: num_gates,
        # Each gate has one inside that is a function and no module.
        SILU: sum(isinstance(m, SiLU) for m in modules) + num_gates,
    }


def executed_of(
    kinds: Iterable[str], totals: dict[str, int], found: Mapping[str, Sequence[str]], rest: str
) -> Executed:
    """Put together what is executed; parts that nothing was found for are done by `rest`."""
    fates: list[Fate] = []
    for part in PARTS:
        counts = Counter(found.get(part, ()))
        counts += Counter({rest: totals[part] - counts.total()})
        fates.append(Fate(part=part, total=totals[part], executed_by=dict(counts.most_common())))
    return Executed(kinds=dict(Counter(kinds).most_common()), fates=tuple(fates))


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
    return executed_of(kinds.values(), totals, own, NOT_FOUND)


def executed_by_openvino(
    program: Path, image: NDArray[np.float32], graph: onnx.ModelProto
) -> Executed:
    """Read the plugin's runtime model, which tells the layers that each of its nodes does."""
    ov: Any = importlib.import_module("openvino")
    runtime: Any = importlib.import_module("efficientnet.runtimes.openvino_runtime")
    core = ov.Core()
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
    return executed_of(kinds, totals, found, NOT_FOUND)


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


class EagerModel:
    """Runs a torch model on a device, channels_last, from host memory to host memory."""

    def __init__(self, model: nn.Module, device: str) -> None:
        # As for the other runtimes, fp32 means float32.
        torch.backends.cudnn.allow_tf32 = False
        self._model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore
        self._device = device

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Map images [N, 3, H, W] to logits [N, num_classes]."""
        batch = torch.from_numpy(images).to(self._device)
        return self._model(batch.contiguous(memory_format=torch.channels_last)).cpu().numpy()


def open_eager(checkpoint: Path, form: Form, device: str) -> EagerModel:
    """Open a checkpoint in one of the forms."""
    return EagerModel(model_in_form(load_checkpoint(checkpoint)[0], form, device), device)


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
    return executed_of(kinds, totals, found, NOT_FOUND)


def make_onnxruntime(source: Source, config: AblationConfig, form: Form, output: Path) -> Made:
    """Write a form as ONNX Runtime's artifact."""
    graph = graph_in_form(source.model, source.image_size, form)

    def build(directory: Path, _: tuple[str, ...]) -> Built:
        onnx.save(graph, directory / "model.onnx")
        return Built("model.onnx", count_weight_bytes(graph), log=(ops_line(graph),), opset=OPSET)

    artifact = _write(source, config, output, "onnxruntime", build)
    image, totals = source.parity_images[:1], count_parts(source.model)
    return Made(artifact, executed_by_onnxruntime(artifact / "model.onnx", image, totals))


def make_openvino(source: Source, config: AblationConfig, form: Form, output: Path) -> Made:
    """Write a form as OpenVINO's artifact, read by OpenVINO as it is."""
    graph = graph_in_form(source.model, source.image_size, form)
    ov: Any = importlib.import_module("openvino")

    def build(directory: Path, _: tuple[str, ...]) -> Built:
        model = ov.Core().read_model(graph.SerializeToString())
        ov.save_model(model, directory / "model.xml", compress_to_fp16=False)
        return Built(
            "model.xml",
            count_weight_bytes(graph),
            other_files=("model.bin",),
            static_batches=(1,),
            log=(ops_line(graph),),
            opset=OPSET,
        )

    artifact = _write(source, config, output, "openvino", build)
    image = source.parity_images[:1]
    return Made(artifact, executed_by_openvino(artifact / "model.xml", image, graph))


def make_aoti(
    source: Source, config: AblationConfig, form: Form, output: Path, device: Literal["cpu", "cuda"]
) -> Made:
    """Compile a form with the compiler settings of export/aoti.py."""
    aoti: Any = importlib.import_module("export.aoti")
    builder: Any = importlib.import_module("export.aoti_build")
    target = aoti.find_target(aoti.AotiConfig(device=device))
    settings = builder.CompileSettings(device, torch.float32, False)
    network = model_in_form(source.model, form, device)
    program = builder.Program(network, torch.float32).eval().to(device)

    def build(directory: Path, _: tuple[str, ...]) -> Built:
        log.info("compile %s", FORMS[form])
        # It tells everyone without a GPU that the CUDA toolkit is not used.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        image = torch.zeros(1, 3, source.image_size, source.image_size, device=device)
        with builder.fresh_cache(dir=str(directory)), torch.no_grad():
            torch._inductor.aoti_compile_and_package(
                torch.export.export(program, (image,)),
                package_path=str(directory / "model.pt2"),
                inductor_configs=settings.inductor,
            )
        return Built(
            "model.pt2",
            builder.weight_bytes_of(source.model, torch.float32),
            static_programs=(StaticProgram(batch_size=1, file="model.pt2"),),
            target_device=target.name if device == "cuda" else "cpu",
            binding=Binding(
                library="torch",
                version=torch.__version__,
                compute_capability=target.compute_capability,
                device=target.name,
                rebuild=REBUILD,
            ),
        )

    artifact = _write(source, config, output, "aoti", build)
    return Made(artifact, executed_by_inductor(artifact / "model.pt2", count_parts(source.model)))


def make_tensorrt(source: Source, config: AblationConfig, form: Form, output: Path) -> Made:
    """Build an engine of a form, for batches of one."""
    builder: Any = importlib.import_module("export.trt_build")
    runtime: Any = importlib.import_module("efficientnet.runtimes.tensorrt_runtime")
    target = importlib.import_module("export.trt_target").find_target("tensorrt", "fp32", None)
    graph = builder.fix_batch(graph_in_form(source.model, source.image_size, form), 1)
    binding = Binding(
        library=runtime.PACKAGES["tensorrt"],
        version=target.trt.__version__,
        compute_capability=" ".join(target.compute_capabilities),
        device=target.device,
        rebuild=REBUILD,
    )

    def build(directory: Path, _: tuple[str, ...]) -> Built:
        settings = builder.BuildSettings(uses_tf32=False)
        engine = builder.build_engine(target.trt, graph, (), settings, FORMS[form])
        (directory / "model.engine").write_bytes(engine.data)
        return Built(
            "model.engine",
            count_weight_bytes(graph),
            static_programs=(StaticProgram(batch_size=1, file="model.engine"),),
            log=engine.log,
            opset=OPSET,
            target_device=target.device,
            binding=binding,
        )

    artifact = _write(source, config, output, "tensorrt", build)
    engine = runtime.deserialize(target.trt, artifact / "model.engine", binding)
    layers = builder.read_layers(builder.layers_of(target.trt, engine))["layers"]
    return Made(artifact, executed_by_tensorrt(layers, graph))


MAKERS: dict[RuntimeName, Callable[[Source, AblationConfig, Form, Path], Made]] = {
    "onnxruntime": make_onnxruntime,
    "openvino": make_openvino,
    "aoti": partial(make_aoti, device="cpu"),
    "aoti-cuda": partial(make_aoti, device="cuda"),
    "tensorrt": make_tensorrt,
}


def _write(
    source: Source,
    config: AblationConfig,
    output: Path,
    runtime: str,
    build: Callable[[Path, tuple[str, ...]], Built],
) -> Path:
    own = config.export_config
    return write_checked_artifact(source, own, output, runtime, build, is_judged=False)


def ops_line(graph: onnx.ModelProto) -> str:
    """Write the graph's nodes by operator."""
    return "graph: " + ", ".join(f"{op} {n}" for op, n in count_ops(graph).most_common())


def table_of(rows: Sequence[FormRecord]) -> Table:
    """Lay out the forms of each runtime; a runtime that is not here gets one line."""
    columns = ("runtime", "form", "p50 ms", "ratio", "range", "logit error", "executed", "gain")
    lines: list[tuple[str, ...]] = []
    for row in rows:
        if row.reason is not None:
            if row.form == "nothing":
                lines.append((row.runtime, "all", *[NOTHING] * 5, row.verdict))
            continue
        assert row.max_abs_logit_error is not None and row.executed is not None
        low, high = min(row.turn_ratios), max(row.turn_ratios)
        is_base = row.form == "nothing"
        lines.append(
            (
                row.runtime,
                FORMS[row.form],
                format_ms(row.p50_ms),
                format_ratio(statistics.median(row.turn_ratios)),
                NOTHING if is_base else f"{format_ratio(low)} to {format_ratio(high)}",
                f"{row.max_abs_logit_error:.1e}",
                str(row.executed.num_nodes),
                row.verdict or NOTHING,
            )
        )
    return Table(columns, tuple(lines), frozenset({"runtime", "form", "gain"}))


def fused_rows(rows: Iterable[FormRecord]) -> list[FormRecord]:
    """Choose the rows of the form that is exported."""
    return [row for row in rows if row.form == "fused" and row.executed is not None]


def fate_line(row: FormRecord) -> str:
    """Tell in one line which executed nodes do the residual adds, the gates and the SiLUs."""
    assert row.executed is not None
    fates = [
        f"{fate.part} ({fate.total}): "
        + (", ".join(f"{n} in {kind}" for kind, n in fate.executed_by.items()) or NOTHING)
        for fate in row.executed.fates
    ]
    return f"{row.runtime}: {'; '.join(fates)}"


def to_markdown(record: AblationRecord) -> str:
    """Write the table, what became of the parts, and how it was measured."""
    versions = record.environment.libraries
    names = ("torch", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt-cu13")
    libraries = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
    devices = [gpu.partition(",")[0] for gpu in record.environment.gpus]
    cores = f"{record.environment.num_cores} cores of {record.environment.cpu}"
    fates = "\n".join(f"- {fate_line(row)}" for row in fused_rows(record.rows))
    return (
        f"{table_of(record.rows).markdown()}\n\n"
        "What became of the parts of the network in the last form, by the kind of node, kernel or "
        f"operator that computes them:\n\n{fates}\n\n"
        f"{record.variant} at {record.image_size} px, batch 1, fp32, "
        f"{', '.join([*devices, cores])}, {libraries}, {record.started_at:%Y-%m-%d} UTC. "
        "Each form in a process of its own, taking turns within its runtime; ms: median of the "
        f"turns' medians, {record.seconds:g} s each; ratio: median of the ratios to 'nothing' "
        "within a turn, and their range, which is 'no gain' where 1 is in it; logit error: the "
        f"largest against the eager model, on {record.num_parity_images} held-out images; "
        "executed: nodes in ONNX Runtime's profile of the optimized session, in OpenVINO's runtime "
        "model, kernels that AOTInductor's code calls, layers of TensorRT's engine, operators that "
        "are not views in eager torch.\n"
    )


if __name__ == "__main__":
    run_command(lambda: parse_flags(AblationConfig, __doc__), main)
