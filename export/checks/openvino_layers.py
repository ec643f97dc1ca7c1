"""An OpenVINO program and images -> what its layers put out, as the runtime computes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from efficientnet.precision import Precision
from efficientnet.runtimes.openvino_runtime import DEVICE, HINTS, openvino_core


def show_openvino(
    program: Path,
    float_precision: Precision,
    names: Sequence[str],
    images: NDArray[np.float32],
) -> dict[str, NDArray[Any]]:
    """Show the layers named; see export.checks.layers.Show.

    Activations that NNCF quantizes are shown quantized, so that the layer still computes in 8 bits.

    Args:
        program: model.xml.
        float_precision: what is computed in where it is not int8.
        names: as export_onnx names nodes; the plugin joined some of them, which are left out.
        images: [N, 3, H, W].
    """
    core = openvino_core()
    model = core.read_model(program)
    nodes = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
    taps = {
        name: next(nodes[tap] for tap in (f"{name}/fq_output_0", name) if tap in nodes)
        for name in names
        if name in nodes
    }
    new_model: Any = ov.Model
    model = new_model([node.output(0) for node in taps.values()], model.get_parameters(), "layers")
    model.reshape(list(images.shape))
    compiled = core.compile_model(
        model, DEVICE, {"INFERENCE_PRECISION_HINT": HINTS[float_precision]}
    )
    values: Any = compiled(images)
    return {name: np.array(values[index]) for index, name in enumerate(taps)}
