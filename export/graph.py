"""Model -> checked ONNX graph: batch norm folded, pooling as GlobalAveragePool, any batch."""

import copy
from collections import Counter

import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from efficientnet.errors import PipelineError
from efficientnet.model import ConvNormAct, EfficientNet

# Opset 24's Swish would be expanded again by ONNX Runtime, and its Sigmoid-Mul fusion lost.
OPSET = 20
INPUT_NAME = "images"
OUTPUT_NAME = "logits"


class GraphError(PipelineError):
    """An exported graph that does not have the form it must have."""


def fold_batch_norm(model: EfficientNet) -> EfficientNet:
    """Return a copy in evaluation mode whose convolutions hold their batch norms.

    The folded weights are computed in float64, so that rounding them to float32 is the only error.
    `torch.export` leaves batch norm in the graph, hence it is done here (pytorch/pytorch#141116).

    Raises:
        GraphError: a batch norm is left.
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


def export_onnx(model: EfficientNet, image_size: int) -> onnx.ModelProto:
    """Export a model to one self-contained ONNX graph.

    Input `images` float32 [batch, 3, image_size, image_size], output `logits` float32
    [batch, num_classes]; the batch is free.

    Raises:
        GraphError: the graph is not valid, keeps a batch norm, or has a fixed batch.
    """
    # Two images: torch.export takes a batch of one for a constant.
    example = torch.zeros(2, 3, image_size, image_size)
    program = torch.onnx.export(
        fold_batch_norm(model),
        (example,),
        dynamo=True,
        opset_version=OPSET,
        input_names=[INPUT_NAME],
        output_names=[OUTPUT_NAME],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        verbose=False,
    )
    assert program is not None
    graph_model = program.model_proto
    _strip_metadata(graph_model)
    use_global_average_pool(graph_model.graph)
    graph_model.producer_version = torch.__version__
    check_graph(graph_model)
    return graph_model


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
            graph.node[index].CopyFrom(pool)
            num_rewritten += 1
    _remove_unused_constants(graph)
    return num_rewritten


def check_graph(model: onnx.ModelProto) -> None:
    """Prove that the graph is valid, free of batch norm, pooled as it should be, of any batch.

    Raises:
        GraphError: it is not.
    """
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GraphError(f"the exported graph is not valid ONNX: {error}") from error
    ops = count_ops(model)
    for op in ("BatchNormalization", "ReduceMean"):
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


def _strip_metadata(model: onnx.ModelProto) -> None:
    # The exporter records source paths of this machine and stack traces; they help nobody later.
    graph = model.graph
    for item in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    del graph.metadata_props[:]
    del model.metadata_props[:]


def _remove_unused_constants(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
