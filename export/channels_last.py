"""An ONNX graph with maps of 8 bits -> squeeze-excite that reads them with channels last."""

import numpy as np
import onnx
from onnx import helper, numpy_helper

TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
HEIGHT_AND_WIDTH = "squeeze_excite/axes"

# Nodes of squeeze-excite, by the end of their names.
POOL, SQUEEZE, EXCITE, GATE = (
    ".pool/GlobalAveragePool",
    ".gate.0/Conv",
    ".gate.2/Conv",
    ".gate.3/Sigmoid",
)


def pool_channels_last(graph: onnx.GraphProto) -> int:
    """Rewrite squeeze-excite where it pools a map of 8 bits, in place; return how many there were.

    ONNX Runtime's 8-bit convolutions have channels last. GlobalAveragePool has them first, and so
    have the float32 1x1 convolutions behind it, so the whole map is transposed for them: 62
    Transpose nodes in V2-S. A mean over the middle axes of a transposed map, and matrix products
    of [N, C], leave none: each Transpose that is written here meets the one that ONNX Runtime puts
    before it, and both go.
    """
    makers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    blocks = [
        node.name.removesuffix(POOL)
        for node in graph.node
        if node.name.endswith(POOL) and makers[node.input[0]].op_type == "DequantizeLinear"
    ]
    layers = {f"{b}{layer}": layer for b in blocks for layer in (POOL, SQUEEZE, EXCITE, GATE)}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        layer, name, output = layers.get(node.name), node.name, node.output[0]
        if layer == POOL:
            nodes += [
                _transpose(node.input[0], f"{name}/last", TO_LAST),
                _node("ReduceMean", [f"{name}/last", HEIGHT_AND_WIDTH], output, name, keepdims=0),
            ]
        elif layer in (SQUEEZE, EXCITE):
            weight = constants[node.input[1]]
            values = numpy_helper.to_array(weight)
            weight.CopyFrom(numpy_helper.from_array(values.reshape(values.shape[:2]), weight.name))
            nodes.append(_node("Gemm", list(node.input), output, name, transB=1))
        elif layer == GATE:
            flat, last = f"{output}/flat", f"{output}/last"
            nodes += [
                _node("Sigmoid", list(node.input), flat, name),
                _node("Unsqueeze", [flat, HEIGHT_AND_WIDTH], last, last),
                _transpose(last, output, TO_FIRST),
            ]
        else:
            nodes.append(node)
    # They tell of [N, C, 1, 1].
    within = tuple(f"{block}{part}" for block in blocks for part in (POOL, ".gate."))
    stale = [value for value in graph.value_info if value.name.startswith(within)]
    for value in stale:
        graph.value_info.remove(value)
    if blocks:
        axes = np.array([1, 2], np.int64)
        graph.initializer.append(numpy_helper.from_array(axes, HEIGHT_AND_WIDTH))
    del graph.node[:]
    graph.node.extend(nodes)
    return len(blocks)


def _node(
    operator: str, inputs: list[str], output: str, name: str, **attributes: int
) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, [output], name, **attributes)


def _transpose(source: str, output: str, order: tuple[int, ...]) -> onnx.NodeProto:
    return helper.make_node("Transpose", [source], [output], f"{output}/Transpose", perm=order)
