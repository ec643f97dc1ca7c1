"""Accuracy, step time, size and latency -> one reward."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """A time relative to the reference's, measured in turns with it."""

    value: float
    noise: float
    """Standard error over the turns, as a fraction."""
    own_ms: float
    reference_ms: float


@dataclass(frozen=True)
class Exponents:
    """Of step time, size and latency; the paper's are w = -0.07 and v = -0.05."""

    w: float
    v: float
    u: float

    def reward(
        self, top1: float, step_ratio: float, size_ratio: float, latency_ratio: float | None = None
    ) -> float:
        """Return A * S^w * P^v (* L^u): Tan and Le 2021, section 3.2."""
        latency = 1.0 if latency_ratio is None else latency_ratio**self.u
        return top1 * step_ratio**self.w * size_ratio**self.v * latency
