from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from facts import raises_naming
from networks import random_network
from onnx import helper, numpy_helper
from torch import Tensor, nn

from efficientnet.network.model import build_model
from efficientnet.network.variants import VARIANTS, NetworkOptions, Padding
from export.graphs.folding import (
    EXAMPLE_BATCH,
    GraphError,
    check_graph,
    count_ops,
    export_onnx,
    fold_batch_norm,
    fold_padding,
    free_batch,
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


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(images)


# One of each kind of network; the others differ from them in widths.
KINDS = ("tiny", "b0", "lite0", "v2-b0", "v2-s")


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=[] if v in KINDS else pytest.mark.slow) for v in VARIANTS],
)
def test_folding_batch_norm_changes_each_of_the_family_by_rounding_alone(variant: str):
    torch.manual_seed(0)
    spec = VARIANTS[variant]
    # A third layer of a stage would be the second again.
    stages = tuple(replace(stage, num_layers=min(stage.num_layers, 2)) for stage in spec.stages)
    images = torch.randn(8, 3, 32, 32)
    # With SAME padding there are convolutions of both kinds.
    model = random_network(replace(spec, stages=stages), 10, images, "same")
    folded = fold_batch_norm(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    expected = logits_of(model.double(), images.double())
    error = (logits_of(folded.double(), images.double()) - expected).abs().max()
    assert 0.1 < expected.std() < 10
    # Float32 weights: 1.2e-4 seen, with ReLU6, and 1 where a shift is lost.
    assert error < 1e-3 * expected.std()


@pytest.mark.parametrize("padding", get_args(Padding))
def test_folding_loses_nothing_of_a_trained_network(padding: Padding):
    # Some steps move everything that a fresh network starts with, in its own way.
    torch.manual_seed(0)
    model = build_model(VARIANTS["tiny"], 10, options=NetworkOptions(padding=padding)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    expected = logits_of(model.eval(), images)
    error = (logits_of(fold_batch_norm(model), images) - expected).abs().max()
    assert error < 1e-4 * expected.std()


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
    ("op", "constant", "freed"),
    [("Reshape", [EXAMPLE_BATCH, 12], [-1, 12]), ("Expand", [EXAMPLE_BATCH, 3, 4], None)],
)
def test_the_batch_is_freed_where_a_reshape_names_it_and_refused_elsewhere(
    op: str, constant: list[int], freed: list[int] | None
):
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "shape"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [EXAMPLE_BATCH, 3, 4])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [EXAMPLE_BATCH, None])],
        [numpy_helper.from_array(np.array(constant), "shape")],
    )
    if freed is None:
        with raises_naming(GraphError, "shape", EXAMPLE_BATCH):
            free_batch(graph)
        return
    free_batch(graph)
    assert numpy_helper.to_array(graph.initializer[0]).tolist() == freed
    dims = [v.type.tensor_type.shape.dim[0] for v in (*graph.input, *graph.output)]
    assert all(dim.dim_param and not dim.dim_value for dim in dims)


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
    with raises_naming(GraphError, reason):
        check_graph(model)


@pytest.mark.parametrize("size", [32, 33])
def test_same_padding_becomes_the_convolutions_own_and_the_logits_stay(size: int):
    torch.manual_seed(0)
    images = torch.randn(8, 3, size, size)
    model = random_network(VARIANTS["tiny"], 10, images, "same")
    graph_model = export_onnx(model, size)
    assert set(count_ops(graph_model)) == ALLOWED_OPS
    pads = {tuple(a.ints) for n in graph_model.graph.node for a in n.attribute if a.name == "pads"}
    # An even size is padded at the end only.
    assert ((0, 0, 1, 1) in pads) == (size % 2 == 0)
    session = onnxruntime.InferenceSession(graph_model.SerializeToString())
    expected = logits_of(model, images).numpy()
    found = session.run(None, {"images": images.numpy()})[0]
    np.testing.assert_allclose(found, expected, atol=1e-5 * expected.std())


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
