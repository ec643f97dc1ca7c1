"""Export commands with their flags -> every artifact that some machine can make."""

from dataclasses import dataclass
from typing import get_args

from efficientnet.precision import Precision


@dataclass(frozen=True)
class Candidate:
    """One export command with its flags."""

    command: str
    name: str
    """First part of the artifact's directory."""
    precision: Precision
    flags: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """As people write it."""
        return f"{self.name} {self.precision}"


# Command, name, flags, and all precisions that the runtime has on some device.
PROGRAMS: tuple[tuple[str, str, tuple[str, ...], tuple[Precision, ...]], ...] = (
    ("ort", "onnxruntime", (), ("fp32", "fp16", "int8")),
    ("ov", "openvino", (), ("fp32", "bf16", "fp16", "int8")),
    ("native", "native", (), ("bf16", "int8")),
    ("aoti", "aoti", ("--device", "cpu"), ("fp32", "bf16", "fp16")),
    ("aoti", "aoti-cuda", ("--device", "cuda"), ("fp32", "bf16", "fp16")),
    ("ort", "onnxruntime-cuda", ("--provider", "cuda"), ("fp32", "fp16")),
    (
        "ort",
        "onnxruntime-tensorrt",
        ("--provider", "tensorrt"),
        ("fp16", "bf16", "int8", "fp8"),
    ),
    ("torch_trt", "torch-tensorrt", (), ("fp32", "bf16", "fp16")),
    ("trt", "tensorrt", (), get_args(Precision)),
    ("trt", "tensorrt-rtx", ("--flavor", "rtx"), get_args(Precision)),
)
CANDIDATES = tuple(
    Candidate(command, name, precision, flags)
    for command, name, flags, precisions in PROGRAMS
    for precision in precisions
)

COMMANDS = tuple(dict.fromkeys(candidate.command for candidate in CANDIDATES))
