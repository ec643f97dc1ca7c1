"""A native program and images -> what its layers put out, as the engine computes them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efficientnet.runtimes.native.engine import Engine
from efficientnet.runtimes.native.program_file import read_program_file, real_values
from efficientnet.runtimes.native_runtime import NAMES_FILE
from export.graphs.folding import OUTPUT_NAME


def show_native(
    program: Path, names: Sequence[str], images: NDArray[np.float32]
) -> dict[str, NDArray[Any]]:
    """Show the layers named; see export.checks.layers.Show.

    Args:
        program: model.native.
        names: as export_onnx names nodes; activations that the engine does not write are left out.
        images: [N, 3, H, W].
    """
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
            tensor = tensors[index]
            values = real_values(engine.read_tensor(index, tensor), tensor)
            found[name].append(values.transpose(2, 0, 1))
    shown = {name: np.stack(activations) for name, activations in found.items()}
    return shown | ({OUTPUT_NAME: np.concatenate(logits)} if OUTPUT_NAME in names else {})
