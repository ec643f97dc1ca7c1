"""Graph or model -> its residual adds, gates and SiLUs; what became of them in a runtime."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import onnx
from pydantic import BaseModel, ConfigDict

from efficientnet.network.model import EfficientNet, ResidualBlock, SiLU, SqueezeExcite

RESIDUAL, GATE_SIGMOID, GATE_MUL, SILU = "residual add", "gate's Sigmoid", "gate's Mul", "SiLU"
PARTS = (RESIDUAL, GATE_SIGMOID, GATE_MUL, SILU)

# Where a part is when no executed node can be named for it.
NOT_FOUND = "not found"


class FusedPart(BaseModel):
    """What became of one part of the network in a runtime."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    part: str
    total: int
    """How often the network has it."""
    executed_by: dict[str, int]
    """Kind of the executed node -> how many of these parts it computes."""


class Executed(BaseModel):
    """What a runtime executes for one call."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kinds: dict[str, int]
    """Kind of node, kernel or operator -> how many, most first."""
    fates: tuple[FusedPart, ...]

    @property
    def num_nodes(self) -> int:
        """All of them."""
        return sum(self.kinds.values())


def find_parts(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """Find residual adds, gates and SiLUs by what is connected to what; of a SiLU its product.

    In a graph that a runtime has optimized, those that are still nodes of their own are found.
    """
    constants = {tensor.name for tensor in graph.initializer}
    sigmoids = {node.output[0]: node for node in graph.node if node.op_type == "Sigmoid"}
    parts: dict[str, list[onnx.NodeProto]] = {part: [] for part in PARTS}
    in_silu: set[str] = set()
    for node in graph.node:
        if len(node.input) != 2 or constants.intersection(node.input):
            continue
        if node.op_type == "Add":
            parts[RESIDUAL].append(node)
        elif node.op_type == "Mul":
            sigmoid = next((sigmoids[name] for name in node.input if name in sigmoids), None)
            if sigmoid is not None and sigmoid.input[0] in node.input:
                parts[SILU].append(node)
                in_silu.add(sigmoid.name)
            else:
                parts[GATE_MUL].append(node)
    parts[GATE_SIGMOID] = [node for node in sigmoids.values() if node.name not in in_silu]
    return parts


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
    kinds: Iterable[str],
    totals: dict[str, int],
    found: Mapping[str, Sequence[str]],
    rest: str = NOT_FOUND,
) -> Executed:
    """Sum up what is executed; parts that nothing was found for are done by `rest`."""
    fused: list[FusedPart] = []
    for part in PARTS:
        counts = Counter(found.get(part, ()))
        counts += Counter({rest: totals[part] - counts.total()})
        fused.append(
            FusedPart(part=part, total=totals[part], executed_by=dict(counts.most_common()))
        )
    return Executed(kinds=dict(Counter(kinds).most_common()), fates=tuple(fused))
