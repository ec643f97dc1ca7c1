"""What can be set in a search: types, units and limits."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from efficientnet.command import require_least, require_positive
from efficientnet.errors import first_problem
from efficientnet.network.scaling import V1_MIN_KEPT_CHANNELS
from efficientnet.network.variant_file import read_variant_file
from efficientnet.network.variants import Operator, VariantSpec, get_variant, scale_variant
from efficientnet.runtimes.names import RUNTIMES
from training.searching.space import SearchSpace
from training.studies.config import StudyFlags

MAX_TRIALS = 1000

# What a target may be exported by -> its command in export/, and the precision without one named.
TARGETS = {
    "ort": ("ort.py", "fp32"),
    "ov": ("ov.py", "fp32"),
    "native": ("native.py", "int8"),
    "trt": ("trt.py", "fp16"),
    "torch-trt": ("torch_trt.py", "fp16"),
    "aoti": ("aoti.py", "fp32"),
}


@dataclass(frozen=True)
class SearchConfig(StudyFlags):
    """What to search, by what, and where it goes."""

    kind = "search"

    backbone: str = "tiny"
    """A variant, or a file of stages (.json), whose strides and channels all networks have. It is
    also the reference that times and sizes are relative to."""

    width: float = 1.0
    """Multiplies the backbone's channels."""

    operators: tuple[Operator, ...] = ("mbconv", "fused_mbconv")

    kernel_sizes: tuple[int, ...] = (3, 5)

    expand_ratios: tuple[int, ...] = (1, 4, 6)

    layer_changes: tuple[int, ...] = (-1, 0, 1)
    """Added to the backbone's layers of each stage."""

    image_size: int = 32
    """Pixels, in training and evaluation."""

    epochs: int = 6
    """Of each network."""

    batch_size: int | None = None
    """None = the recipe's."""

    recipe: str | None = None
    """As in training/run.py; None = digits without --data, else small."""

    minival: float = 0.2
    """Part of the training images that the networks are judged by, 0..0.5 (the paper: 0.02)."""

    flags: str = ""
    """More of training/run.py for all networks, as --flags="--precision bf16"."""

    w: float = -0.07
    """Exponent of the time of a training step, relative to the reference's; 0 = no matter."""

    v: float = -0.05
    """Exponent of the number of parameters, relative to the reference's."""

    u: float = -0.07
    """Exponent of the latency of the exported network, relative to that of the exported reference;
    with --target-artifact."""

    target_artifact: str | None = None
    """Also export each network and measure it: ort, ov, native, trt, torch-trt or aoti, with a
    precision where it is not the usual one, as ov-int8."""

    pareto: bool = False
    """Search for the front of accuracy, step time, size (and latency), each for itself, in the
    place of one reward. Nothing is pruned."""

    sampler: Literal["tpe", "random"] = "tpe"
    """tpe: Optuna's tree-structured Parzen estimator, after 20 random networks. random: as the
    paper's random search."""

    prune: bool = True
    """End the training of a network that is behind the median of the others after an epoch."""

    trials: int = 200
    """Networks in all, those of other workers and of before included; up to 1,000."""

    hours: float | None = None
    """Begin no network after so long; None = no limit."""

    seed: int = 0
    """Of the choices, and of all trainings."""

    turns: int = 5
    """Of the network and the reference each, in which their steps are timed."""

    turn_seconds: float = 0.2

    rivals: tuple[str, ...] = ("b0", "v2-b0")
    """Variants that are trained, in the end, like the found network and the backbone."""

    seeds: int = 3
    """Trainings of each of these, judged by the images that had no part in the search; 0 = none."""

    storage: str | None = None
    """postgresql://USER@HOST/DATABASE or mysql://..., that several machines share; None = a file in
    the folder of the results."""

    heartbeat: int = 20
    """Seconds between signs of life. A worker without any for six times as long is taken for dead,
    and its network for not trained."""

    wait_minutes: float = 30.0
    """How long a database that went away is waited for."""

    def __post_init__(self) -> None:
        if not 0 <= self.trials <= MAX_TRIALS:
            raise ValueError(f"--trials is {self.trials}, expected 0 to {MAX_TRIALS:,}")
        require_least(self, epochs=1, turns=1, heartbeat=1, seeds=0)
        require_positive(self, "width", "turn_seconds", "wait_minutes")
        if self.hours is not None:
            require_positive(self, "hours")
        for name in ("w", "v", "u"):
            if not math.isfinite(getattr(self, name)) or abs(getattr(self, name)) > 10:
                raise ValueError(f"--{name} is {getattr(self, name)}, expected -10 to 10")
        if not 0 < self.minival <= 0.5:
            raise ValueError(f"--minival is {self.minival}, expected more than 0 and at most 0.5")
        for name in self.rivals:
            get_variant(name)
        if self.record is None:
            self.space()
        if self.target_artifact is not None:
            target_of(self.target_artifact)
        super().__post_init__()

    def reward(
        self, top1: float, step_ratio: float, size_ratio: float, latency_ratio: float | None = None
    ) -> float:
        """Return A * S^w * P^v (* L^u): Tan and Le 2021, section 3.2."""
        latency = 1.0 if latency_ratio is None else latency_ratio**self.u
        return top1 * step_ratio**self.w * size_ratio**self.v * latency

    def reference(self) -> VariantSpec:
        """Return the backbone at its width."""
        if self.backbone.endswith(".json"):
            base = read_variant_file(Path(self.backbone))
        else:
            base = get_variant(self.backbone)
        if self.width == 1:
            return base
        scaled = scale_variant(base, self.width, 1.0, V1_MIN_KEPT_CHANNELS)
        return replace(scaled, name=f"{base.name}-width-{self.width:g}", published=None)

    def space(self) -> SearchSpace:
        """Return the networks that may be sampled."""
        backbone = self.reference()
        names = ("operators", "kernel_sizes", "expand_ratios", "layer_changes")
        try:
            return SearchSpace(backbone=backbone, **{name: getattr(self, name) for name in names})
        except ValidationError as error:
            raise ValueError(f"the space cannot be searched: {first_problem(error)}") from None


def target_of(name: str) -> tuple[str, str]:
    """Return the command of export/ and the precision that a target stands for."""
    for target, (command, usual) in TARGETS.items():
        if name == target:
            return command, usual
        exports = [e for r in RUNTIMES.values() if f"{r.command}.py" == command for e in r.exports]
        for precision in (p for export in exports for p in export.precisions):
            if name == f"{target}-{precision}":
                return command, precision
    raise ValueError(
        f"--target-artifact is {name!r}, expected {', '.join(TARGETS)}, with a precision where it "
        "is not the usual one, as ov-int8"
    )
