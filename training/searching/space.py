"""A backbone and what may vary -> networks, stage by stage.

Tan and Le 2021 (arXiv 2104.00298 v3), section 3.2: operator, kernel, expansion and layers of each
stage; channels and strides are the backbone's, and there is no skip by pooling. The paper does not
tell its choices of layers: here they are the backbone's number and one less or more, as in MnasNet
(Tan et al. 2019, arXiv 1807.11626, section 4.1).
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, model_validator

from efficientnet.network.variants import Operator, StageSpec, VariantSpec

Choice = str | int


class SearchSpace(BaseModel):
    """All networks that may be sampled."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: VariantSpec
    operators: tuple[Operator, ...]
    kernel_sizes: tuple[int, ...]
    expand_ratios: tuple[int, ...]
    layer_changes: tuple[int, ...]
    """Added to the backbone's layers of a stage. A stage that keeps the size of the map may come to
    none, but for the first: it is left out then, as the paper left out V1's last one."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("operators", "kernel_sizes", "expand_ratios", "layer_changes"):
            choices = getattr(self, name)
            if not choices:
                raise ValueError(f"{name} is empty: there is no network to sample")
            if len(set(choices)) < len(choices):
                raise ValueError(f"{name} are {choices}: one of them is given twice")
        for kernel_size in self.kernel_sizes:
            for expand_ratio in self.expand_ratios:
                StageSpec("fused_mbconv", 1, 8, 1, expand_ratio, kernel_size)  # its limits
        if self.num_choices == 1:
            raise ValueError("it has one network only: give more than one choice")
        return self

    @cached_property
    def parameters(self) -> dict[str, tuple[Choice, ...]]:
        """What is chosen of each stage, from 1 on -> its choices, e.g. stage2.kernel_size."""
        choices: dict[str, tuple[Choice, ...]] = {}
        for number, stage in enumerate(self.backbone.stages, start=1):
            least = 0 if stage.stride == 1 and number > 1 else 1
            layers = {max(least, stage.num_layers + change) for change in self.layer_changes}
            choices[f"stage{number}.operator"] = self.operators
            choices[f"stage{number}.kernel_size"] = self.kernel_sizes
            choices[f"stage{number}.expand_ratio"] = self.expand_ratios
            choices[f"stage{number}.num_layers"] = tuple(sorted(layers))
        return choices

    @property
    def num_choices(self) -> int:
        """Count the combinations; those that differ in a stage that is left out are one network."""
        return math.prod(len(choices) for choices in self.parameters.values())

    @property
    def squeeze_ratio(self) -> float | None:
        """Of MBConv: the backbone's, or the papers' where it has no MBConv."""
        ratios = [s.squeeze_ratio for s in self.backbone.stages if s.operator == "mbconv"]
        return ratios[-1] if ratios else 0.25

    def network(self, chosen: Mapping[str, Any]) -> VariantSpec:
        """Build the table of stages; its name follows from what is in it."""
        stages: list[StageSpec] = []
        for number, stage in enumerate(self.backbone.stages, start=1):
            operator: Operator = chosen[f"stage{number}.operator"]
            num_layers = chosen[f"stage{number}.num_layers"]
            if num_layers:
                own = replace(
                    stage,
                    operator=operator,
                    num_layers=num_layers,
                    expand_ratio=chosen[f"stage{number}.expand_ratio"],
                    kernel_size=chosen[f"stage{number}.kernel_size"],
                    squeeze_ratio=self.squeeze_ratio if operator == "mbconv" else None,
                )
                stages.append(own)
        table = replace(self.backbone, stages=tuple(stages), name="found", published=None)
        digest = hashlib.sha256(json.dumps(asdict(table), sort_keys=True).encode()).hexdigest()
        return replace(table, name=f"found-{digest[:10]}")
