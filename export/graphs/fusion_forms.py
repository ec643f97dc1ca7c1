"""Model -> the three forms that are compared: as it is written, BN folded, and SE fused as well."""

import copy
import importlib
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir
import onnxscript.optimizer
import onnxscript.rewriter
import torch
from numpy.typing import NDArray
from onnx_ir.passes import common as passes
from onnxscript.rewriter.rules import common as rules
from torch import nn

from efficientnet.formats.checkpoint import load_checkpoint
from efficientnet.network.model import EfficientNet
from export.graphs import folding

Form = Literal["nothing", "folded", "fused"]

FORMS: dict[Form, str] = {
    "nothing": "nothing",
    "folded": "BN folded",
    "fused": "BN folded + SE fused",
}


def model_in_form(model: EfficientNet, form: Form, device: str = "cpu") -> nn.Module:
    """Return a copy of the network in evaluation mode, in one of the forms."""
    if form == "nothing":
        return copy.deepcopy(model).eval()
    network = folding.fold_batch_norm(model)
    if form == "fused" and device == "cuda":
        # Triton is there where torch has CUDA.
        kernel = importlib.import_module("efficientnet.network.squeeze_excite_kernel")
        kernel.use_triton_squeeze_excite(network)
    elif form == "fused":
        folding.use_convolutions_in_squeeze_excite(network)
    return network


@cache
def graph_in_form(model: EfficientNet, image_size: int, form: Form) -> onnx.ModelProto:
    """Export one of the forms to ONNX, with a free batch.

    torch's exporter folds batch norm by itself (the rewriter of onnxscript 0.7 does), so that
    'nothing' would have none: of its optimizer only what concerns constants and shapes is done
    here, in both forms that export_onnx does not make. Not to be changed: several runtimes get it.
    """
    if form == "fused":
        return folding.export_onnx(model, image_size)
    program = torch.onnx.export(
        model_in_form(model, form),
        (torch.zeros(2, 3, image_size, image_size),),
        dynamo=True,
        opset_version=folding.OPSET,
        input_names=[folding.INPUT_NAME],
        output_names=[folding.OUTPUT_NAME],
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
    folding.name_by_module(exported.graph)
    for node in exported.graph.node:
        # Source paths of this machine, and stack traces.
        del node.metadata_props[:]
    onnx.checker.check_model(exported, full_check=True)
    return exported


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
