"""Model -> checked ONNX graph: batch norm and padding folded, GlobalAveragePool, any batch."""

import ast
import copy
from collections import Counter
from typing import Literal

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from efficientnet.errors import PipelineError
from efficientnet.network.model import ConvNormAct, EfficientNet, SqueezeExcite
from efficientnet.runtimes.onnxruntime_sessions import BATCH_AXIS

FloatPrecision = Literal["fp32", "fp16", "bf16"]

TORCH_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Opset 24's Swish would be expanded again by ONNX Runtime, and its Sigmoid-Mul fusion lost.
OPSET = 20

# Convolutions take bfloat16 from opset 22 on.
OPSETS: dict[FloatPrecision, int] = {"fp32": OPSET, "fp16": OPSET, "bf16": 22}

# Where torch's exporter tells the path of the module that a node comes from.
SCOPES_KEY = "pkg.torch.onnx.name_scopes"

INPUT_NAME = "images"
# The images in the graph's own float format, where that is not float32.
CAST_INPUT_NAME = "network/Cast"
OUTPUT_NAME = "logits"

# A number that stands for nothing else in a network: no padding, size of kernel or channels.
EXAMPLE_BATCH = 97


class GraphError(PipelineError):
    """An exported graph that does not have the form it must have."""


def fold_batch_norm(model: EfficientNet) -> EfficientNet:
    """Return a copy in evaluation mode whose convolutions hold their batch norms.

    The folded weights are computed in float64, so that rounding them to float32 is the only error.
    `torch.export` leaves batch norm in the graph, hence it is done here (pytorch/pytorch#141116).
    """
    folded = copy.deepcopy(model).eval()
    for module in folded.modules():
        if isinstance(module, ConvNormAct):
            conv, norm = module[0], module[1]
            assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
            module[0] = fuse_conv_bn_eval(conv.double(), norm.double()).float()
            module[1] = nn.Identity()
    left = [name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)]
    if left:
        raise GraphError(f"batch norm is left after folding: {', '.join(left)}")
    return folded


class ConvSqueezeExcite(nn.Module):
    """SqueezeExcite as pooling and 1x1 convolutions, the form that the runtimes know how to fuse.

    ONNX Runtime stays in its blocked layout through it; at a matrix product it would leave it.
    """

    def __init__(self, layer: SqueezeExcite) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Sequential(layer.fc1, nn.SiLU(), layer.fc2, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        return x * self.gate(self.pool(x))


def use_convolutions_in_squeeze_excite(model: EfficientNet) -> None:
    """Replace each SqueezeExcite of a model by a ConvSqueezeExcite, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, SqueezeExcite):
                setattr(module, name, ConvSqueezeExcite(child))


class InPrecision(nn.Module):
    """Compute in another float format, from float32 images to float32 logits."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network.to(dtype)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to logits [N, num_classes], both float32."""
        return self.network(x.to(self.dtype)).float()


def export_onnx(
    model: EfficientNet, image_size: int, precision: FloatPrecision = "fp32"
) -> onnx.ModelProto:
    """Export a model to one self-contained ONNX graph.

    Input `images` float32 [batch, 3, image_size, image_size], output `logits` float32
    [batch, num_classes]; the batch is free. Nodes and their outputs have the names of the modules
    in model.py: `features.2.0.block.0.0/Conv`.
    """
    example = torch.zeros(EXAMPLE_BATCH, 3, image_size, image_size)
    network: nn.Module = fold_batch_norm(model)
    use_convolutions_in_squeeze_excite(network)
    if precision != "fp32":
        network = InPrecision(network, TORCH_TYPES[precision]).eval()
    program = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        opset_version=OPSETS[precision],
        input_names=[INPUT_NAME],
        output_names=[OUTPUT_NAME],
        external_data=False,
        verbose=False,
    )
    assert program is not None
    graph_model = program.model_proto
    free_batch(graph_model.graph)
    use_global_average_pool(graph_model.graph)
    fold_padding(graph_model.graph)
    name_by_module(graph_model.graph)
    _strip_metadata(graph_model)
    graph_model.producer_version = torch.__version__
    check_graph(graph_model)
    return graph_model


def free_batch(graph: onnx.GraphProto) -> None:
    """Let a graph that was exported for EXAMPLE_BATCH images take any number, in place.

    torch.export can leave the batch free itself, but reasons about it at every operation: lite0
    took it 11.5 s instead of 4.7, v2-s 10.5 instead of 6.5.
    """
    for value in (*graph.input, *graph.output, *graph.value_info):
        dims = value.type.tensor_type.shape.dim
        if dims and dims[0].dim_value == EXAMPLE_BATCH:
            dims[0].dim_param = BATCH_AXIS
    shapes = {node.input[1] for node in graph.node if node.op_type == "Reshape"}
    for tensor in graph.initializer:
        if tensor.data_type != onnx.TensorProto.INT64:
            continue
        values = numpy_helper.to_array(tensor)
        if tensor.name in shapes and values.flat[0] == EXAMPLE_BATCH:
            freed = np.concatenate([np.array([-1]), values[1:]])
            tensor.CopyFrom(numpy_helper.from_array(freed, tensor.name))
        elif EXAMPLE_BATCH in values:
            raise GraphError(f"the constant '{tensor.name}' holds the batch: {values.tolist()}")


def name_by_module(graph: onnx.GraphProto) -> None:
    """Name nodes, and what they put out, by the module that they come from.

    A runtime's profile, a ranking of blocks and a comparison layer by layer then all speak of the
    same things. The exporter tells the module in a node's metadata.
    """
    outputs = {value.name for value in graph.output}
    renamed: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for node in graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == SCOPES_KEY), "[]")
        path = ast.literal_eval(scopes)
        module = path[-2] if len(path) > 1 else ""
        name = f"{module.removeprefix('network').removeprefix('.') or 'network'}/{node.op_type}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
        for index, output in enumerate(node.output):
            if output not in outputs:
                renamed[output] = node.name if index == 0 else f"{node.name}:{index}"
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = renamed.get(name, name)
    for value in graph.value_info:
        value.name = renamed.get(value.name, value.name)


def is_within(name: str, block: str) -> bool:
    """Whether a node's name is that of a block's own node, or of one of the modules in it."""
    return name.partition("/")[0] == block or name.startswith(f"{block}.")


def use_global_average_pool(graph: onnx.GraphProto) -> int:
    """Write each mean over height and width as GlobalAveragePool; return how many there were.

    torch exports adaptive pooling to 1 x 1 as ReduceMean, at which ONNX Runtime leaves its blocked
    NCHWc layout and reorders the whole feature map; GlobalAveragePool stays inside.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    num_rewritten = 0
    for index, node in enumerate(graph.node):
        if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in constants:
            continue
        axes = numpy_helper.to_array(constants[node.input[1]]).tolist()
        keeps_dims = all(a.i == 1 for a in node.attribute if a.name == "keepdims")
        if {axis % 4 for axis in axes} == {2, 3} and keeps_dims:
            pool = helper.make_node(
                "GlobalAveragePool", [node.input[0]], list(node.output), name=node.name
            )
            pool.metadata_props.extend(node.metadata_props)
            graph.node[index].CopyFrom(pool)
            num_rewritten += 1
    remove_unused_constants(graph)
    return num_rewritten


def fold_padding(graph: onnx.GraphProto) -> int:
    """Let convolutions pad by themselves where a Pad of zeros comes before; return how many did.

    That is what SAME padding is exported as: torch's convolutions cannot pad one side only, ONNX's
    can, and a Pad of its own would copy the map.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    pads = {n.output[0]: n for n in graph.node if n.op_type == "Pad" and _pads_zeros(n, constants)}
    num_users = Counter(name for node in graph.node for name in node.input)
    folded: list[onnx.NodeProto] = []
    for node in graph.node:
        pad = pads.get(node.input[0]) if node.op_type == "Conv" else None
        if pad is None or num_users[pad.output[0]] > 1:
            continue
        # All axes' starts, then all ends; batch and channels are not padded.
        margins = numpy_helper.to_array(constants[pad.input[1]]).tolist()
        own = next((list(a.ints) for a in node.attribute if a.name == "pads"), [0, 0, 0, 0])
        total = [a + b for a, b in zip(own, margins[2:4] + margins[6:8], strict=True)]
        kept = [a for a in node.attribute if a.name not in ("pads", "auto_pad")]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("pads", total)])
        node.input[0] = pad.input[0]
        folded.append(pad)
    for pad in folded:
        graph.node.remove(pad)
    remove_unused_constants(graph)
    return len(folded)


def _pads_zeros(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    if any(a.name == "mode" and a.s != b"constant" for a in node.attribute):
        return False
    if len(node.input) > 3 and node.input[3]:
        return False
    if len(node.input) > 2 and node.input[2]:
        value = constants.get(node.input[2])
        if value is None or numpy_helper.to_array(value).item() != 0:
            return False
    margins = constants.get(node.input[1])
    return margins is not None and len(numpy_helper.to_array(margins)) == 8


def check_graph(model: onnx.ModelProto) -> None:
    """Prove that the graph is valid, free of batch norm, pooled as it should be, of any batch."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GraphError(f"the exported graph is not valid ONNX: {error}") from error
    ops = count_ops(model)
    for op in ("BatchNormalization", "ReduceMean", "Pad"):
        if ops[op]:
            raise GraphError(f"the exported graph still has {ops[op]} {op} nodes, expected none")
    for value in (*model.graph.input, *model.graph.output):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise GraphError(f"the batch axis of '{value.name}' is fixed, expected a free one")
    if any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer):
        raise GraphError("the exported graph keeps weights in a second file, expected one file")


def count_ops(model: onnx.ModelProto) -> Counter[str]:
    """Count the graph's nodes by operator."""
    return Counter(node.op_type for node in model.graph.node)


def count_weight_bytes(model: onnx.ModelProto) -> int:
    """Add up the bytes of the graph's constants."""
    return sum(numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer)


def weight_bytes_of(model: EfficientNet, dtype: torch.dtype) -> int:
    """Count the bytes of a model's weights in a format, batch norm folded."""
    return sum(p.numel() for p in fold_batch_norm(model).parameters()) * dtype.itemsize


def _strip_metadata(model: onnx.ModelProto) -> None:
    # The exporter records source paths of this machine and stack traces; they help nobody later.
    graph = model.graph
    for item in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    del graph.metadata_props[:]
    del model.metadata_props[:]


def remove_unused_constants(graph: onnx.GraphProto) -> None:
    """Drop the constants that no node reads, in place."""
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
