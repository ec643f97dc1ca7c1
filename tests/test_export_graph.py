from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

from efficientnet.checkpoint import load_checkpoint
from efficientnet.model import build_model
from efficientnet.variants import VARIANTS, NetworkOptions
from export.graph import (
    GraphError,
    check_graph,
    count_ops,
    export_onnx,
    fold_batch_norm,
    fold_padding,
    use_global_average_pool,
)

ALLOWED_OPS = {"Conv", "Sigmoid", "Mul", "GlobalAveragePool", "Add", "Reshape", "Gemm"}


@pytest.fixture(scope="module")
def graph_model(tiny_artifact: Path) -> onnx.ModelProto:
    return onnx.load(tiny_artifact / "model.onnx", load_external_data=False)


def test_only_the_operators_that_belong_to_the_network_are_left(graph_model: onnx.ModelProto):
    assert set(count_ops(graph_model)) == ALLOWED_OPS


def test_every_squeeze_and_the_head_pool_globally(graph_model: onnx.ModelProto):
    # tiny has four MBConv blocks with squeeze-excite, and the pooling before the classifier.
    assert count_ops(graph_model)["GlobalAveragePool"] == 5


def test_the_graph_is_opset_20_in_one_file_with_a_free_batch(graph_model: onnx.ModelProto):
    assert [(o.domain, o.version) for o in graph_model.opset_import] == [("", 20)]
    assert all(t.data_location != onnx.TensorProto.EXTERNAL for t in graph_model.graph.initializer)
    (images,), (logits,) = graph_model.graph.input, graph_model.graph.output
    assert images.type.tensor_type.shape.dim[0].dim_param
    assert logits.type.tensor_type.shape.dim[0].dim_param
    assert [d.dim_value for d in images.type.tensor_type.shape.dim][1:] == [3, 32, 32]


def test_the_graph_tells_nothing_of_the_machine_it_was_made_on(graph_model: onnx.ModelProto):
    text = graph_model.SerializeToString()
    assert b"site-packages" not in text and str(Path(__file__).parent.parent).encode() not in text


def test_folding_batch_norm_changes_nothing_but_rounding(tiny_checkpoint: Path):
    model, _ = load_checkpoint(tiny_checkpoint)
    folded = fold_batch_norm(model)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(folded(images), model(images), atol=1e-5, rtol=1e-5)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())


def test_a_mean_over_other_axes_is_left_alone():
    axes = numpy_helper.from_array(np.array([1]), "axes")
    node = helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=1)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, 4, 4])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 1, 4, 4])],
        [axes],
    )
    assert use_global_average_pool(graph) == 0
    assert graph.node[0].op_type == "ReduceMean"


@pytest.mark.parametrize(
    ("op", "reason"), [("BatchNormalization", "1 BatchNormalization"), ("Relu", "batch axis")]
)
def test_a_graph_with_batch_norm_or_a_fixed_batch_is_refused(op: str, reason: str):
    shape = ["n" if op != "Relu" else 1, 2, 4, 4]
    inputs = ["x", "s", "s", "s", "s"] if op == "BatchNormalization" else ["x"]
    graph = helper.make_graph(
        [helper.make_node(op, inputs, ["y"])],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.ones(2, np.float32), "s")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with pytest.raises(GraphError, match=reason):
        check_graph(model)


@pytest.mark.parametrize("size", [32, 33])
def test_same_padding_becomes_the_convolutions_own_and_the_logits_stay(size: int):
    torch.manual_seed(0)
    options = NetworkOptions(padding="same")
    model = build_model(VARIANTS["tiny"], 10, options=options).eval()
    graph_model = export_onnx(model, size)
    assert set(count_ops(graph_model)) == ALLOWED_OPS
    pads = {tuple(a.ints) for n in graph_model.graph.node for a in n.attribute if a.name == "pads"}
    # An even size is padded at the end only.
    assert ((0, 0, 1, 1) in pads) == (size % 2 == 0)
    images = np.random.default_rng(0).random((3, 3, size, size), dtype=np.float32)
    session = onnxruntime.InferenceSession(graph_model.SerializeToString())
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(session.run(None, {"images": images})[0], expected, atol=1e-6)


@pytest.mark.parametrize(("value", "mode"), [(1.0, "constant"), (0.0, "reflect")])
def test_a_pad_of_something_else_than_zeros_stays(value: float, mode: str):
    graph = helper.make_graph(
        [
            helper.make_node("Pad", ["x", "margins", "value"], ["padded"], mode=mode),
            helper.make_node("Conv", ["padded", "weight"], ["y"], pads=[1, 1, 1, 1]),
        ],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 1, 4, 4])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 1, 5, 5])],
        [
            numpy_helper.from_array(np.array([0, 0, 0, 0, 0, 0, 1, 1]), "margins"),
            numpy_helper.from_array(np.array(value, np.float32), "value"),
            numpy_helper.from_array(np.ones((1, 1, 3, 3), np.float32), "weight"),
        ],
    )
    assert fold_padding(graph) == 0
    assert [node.op_type for node in graph.node] == ["Pad", "Conv"]
