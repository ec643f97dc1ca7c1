"""What can be set when a checkpoint is exported."""

import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from efficientnet.command import require_least
from efficientnet.precision import Precision
from efficientnet.runtimes.names import EXPORTS

Activations = Literal["asymmetric", "symmetric"]

MIN_PARITY_IMAGES = 64
MIN_CALIBRATION_IMAGES = 64
MIN_GATE_IMAGES = 100

# The last maps have 1/32 of the image's height; below, their kernels would see nothing but padding.
MIN_IMAGE_SIZE = 32


# Of ONNX Runtime's precisions.
HINTS = {
    "bf16": "; OpenVINO has bf16: python export/ov.py",
    "fp32": " (it has TF32 alone); take --provider cuda, or python export/trt.py",
}

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class ExportConfig:
    """Settings that all exports share."""

    checkpoint: Path | None = None
    """Checkpoint directory; None = the one of the newest complete run."""

    output: Path | None = None
    """Artifact directory; None = artifacts/<variant>/<runtime>-<precision>."""

    precision: Precision = "fp32"
    """Number format that the convolutions compute in."""

    batch: tuple[int, int, int] = (1, 1, 64)
    """Fewest images in a call, those that the program is tuned for, most images."""

    batches: tuple[int, ...] | None = None
    """Batch sizes that the artifact is made for, in fixed shapes where the runtime has them (ONNX
    Runtime on the CPU takes any up to the largest); None = the middle one of --batch."""

    size: int | None = None
    """Height and width of the images in pixels, at least 32; None = the checkpoint's."""

    data: str | None = None
    """Images for parity, calibration and the accuracy gate, where the training data has moved: a
    folder or tar shards, as in training/run.py; None = what the checkpoint was trained on."""

    num_parity_images: int = 128
    """Held-out images that the artifact is compared on, at least 64."""

    num_calibration_images: int = 256
    """Training images that the ranges of int8 and fp8 are chosen by, at least 64."""

    num_gate_images: int | None = 2000
    """Held-out images that the accuracy gate of int8 and fp8 takes at most, at least 100; None =
    all."""

    max_drop: float = 0.5
    """Points of top-1 that int8 and fp8 may lose on them; 100: all, for an artifact that is only
    timed, of a network that may know nothing."""

    keeps_blocks: bool = True
    """Of int8 and fp8: where too much is lost, keep the costliest blocks in a higher precision, as
    few as do; if not, the artifact is refused then."""

    seed: int = 0
    """Draws the calibration images."""

    def __post_init__(self) -> None:
        low, opt, high = self.batch
        if not 1 <= low <= opt <= high:
            raise ValueError(
                f"--batch is {low} {opt} {high}, expected 1 <= MIN <= OPT <= MAX, e.g. 1 1 64"
            )
        if self.size is not None and self.size < MIN_IMAGE_SIZE:
            raise ValueError(
                f"--size is {self.size}, expected at least {MIN_IMAGE_SIZE}: the last maps have "
                "1/32 of the image's height, and there would be nothing but padding in them"
            )
        if self.max_drop < 0:
            raise ValueError(f"--max-drop is {self.max_drop:g}, expected at least 0 points")
        require_least(
            self,
            batches=1,
            num_parity_images=MIN_PARITY_IMAGES,
            num_calibration_images=MIN_CALIBRATION_IMAGES,
            num_gate_images=MIN_GATE_IMAGES,
        )

    @property
    def is_quantized(self) -> bool:
        """Whether ranges are needed, and the accuracy gate decides."""
        return self.precision in ("int8", "fp8")

    @property
    def static_batches(self) -> tuple[int, ...]:
        """Batch sizes that get fixed shapes, ascending."""
        return tuple(sorted(set(self.batches or (self.batch[1],))))

    @property
    def tuned_batch_size(self) -> int:
        """Images in a call that the program is tuned for, and that it is measured with."""
        return self.static_batches[0]

    @property
    def max_batch_size(self) -> int:
        """Most images of a call."""
        return max(self.batches) if self.batches else self.batch[2]


@dataclass(frozen=True)
class MixedConfig(ExportConfig):
    """Settings of an export to a runtime that tells what each layer takes."""

    float_layers: tuple[str, ...] = ()
    """Of int8: layers and blocks that compute in float, by their names in the network
    (features.1, features.4.0.block.1), whatever the accuracy gate keeps besides."""

    search: bool = False
    """Of int8: profile all layers in int8 and in float on this machine, let those compute in float
    that are faster so, and keep the fastest mixture that is within --max-drop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, is_given in (("--search", self.search), ("--float-layers", self.float_layers)):
            if is_given and self.precision != "int8":
                raise ValueError(f"{flag} is for --precision int8, which is {self.precision}")
        if self.search and self.float_layers:
            raise ValueError("--search chooses the --float-layers itself; give one of both")


@dataclass(frozen=True)
class OrtConfig(MixedConfig):
    """Settings of an export to ONNX Runtime."""

    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    """What executes the graph; cuda and tensorrt need onnxruntime-gpu."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.search and self.provider != "cpu":
            raise ValueError(
                f"--search is for --provider cpu, whose profile tells what each layer takes; it is "
                f"{self.provider}"
            )
        allowed = EXPORTS[self.name].precisions
        if self.precision not in allowed:
            raise ValueError(
                f"--precision is {self.precision}, for which ONNX Runtime's {self.provider} "
                f"provider has no convolution; expected {', '.join(allowed)}"
                + HINTS.get(self.precision, "")
            )

    @property
    def name(self) -> str:
        """First part of the artifact's directory."""
        return "onnxruntime" if self.provider == "cpu" else f"onnxruntime-{self.provider}"


@dataclass(frozen=True)
class OpenVinoConfig(MixedConfig):
    """Settings of an export to OpenVINO."""

    activations: Activations | None = None
    """How they are quantized to int8: asymmetric keeps all 256 levels after SiLU, which is hardly
    ever below zero; symmetric kernels are sometimes faster. None = asymmetric, and with --search
    both are tried."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activations and self.precision != "int8":
            raise ValueError(f"--activations is for --precision int8, which is {self.precision}")
        if self.precision == "fp8":
            raise ValueError(
                "--precision is fp8, which no CPU that OpenVINO runs on computes in; "
                "expected fp32, bf16, fp16 or int8"
            )


@dataclass(frozen=True)
class TensorRTConfig(ExportConfig):
    """Settings of an engine; --batches makes one for each size, --batch one for the range."""

    precision: Precision = "fp16"
    """Number format that the convolutions compute in."""

    optimization_level: int = 3
    """0 to 5: how long the builder looks for fast kernels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.optimization_level <= 5:
            raise ValueError(f"--optimization-level is {self.optimization_level}, expected 0 to 5")


@dataclass(frozen=True)
class TrtConfig(TensorRTConfig):
    """Settings of an engine of TensorRT or TensorRT-RTX."""

    flavor: Literal["tensorrt", "rtx"] = "tensorrt"
    """rtx: TensorRT-RTX, which builds without a GPU, and for several at once."""

    compute_capability: tuple[str, ...] | None = None
    """Of rtx: GPUs to build for, e.g. 8.6 8.9, or 'portable' for all from 8.0 on; None = the one
    here, without one portable."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compute_capability is not None and self.flavor != "rtx":
            raise ValueError(
                "--compute-capability is for --flavor rtx; TensorRT builds for the GPU that is here"
            )


@dataclass(frozen=True)
class TorchTrtConfig(TensorRTConfig):
    """Settings of an engine inside a torch program."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_quantized:
            raise ValueError(
                f"--precision is {self.precision}, for which torch-tensorrt needs NVIDIA's "
                "ModelOpt in an environment of its own: take "
                f"'python export/trt.py --precision {self.precision}', which needs none"
            )


@dataclass(frozen=True)
class AotiConfig(ExportConfig):
    """Settings of a compiled program; --batches makes one for each size, --batch one for all."""

    device: Device | None = None
    """What the program runs on, and is compiled on; None = the GPU where there is one."""

    fused_squeeze_excite: bool = True
    """Of cuda: squeeze-excite as two Triton kernels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_quantized:
            instead = (
                "'python export/ov.py --precision int8' for the CPU or 'python export/trt.py "
                "--precision int8' for a GPU"
                if self.precision == "int8"
                else "'python export/trt.py --precision fp8'"
            )
            raise ValueError(
                f"--precision is {self.precision}, and AOTInductor compiles in fp32, fp16 or bf16: "
                f"take {instead}"
            )


@dataclass(frozen=True)
class NativeConfig(ExportConfig):
    """Settings of an export to the project's own CPU engine."""

    precision: Literal["bf16", "int8"] = "bf16"
    """Number format that the convolutions compute in."""

    reference: bool = False
    """Let processors run it that have neither VNNI nor AMX, too, with the portable kernels that the
    others are checked by: the same answers, many times slower."""


def flags_of(config: ExportConfig) -> list[str]:
    """Write all settings that are not the default as flags."""
    words: list[str] = []
    for field in fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def rebuild_command(script: str, config: ExportConfig, checkpoint: Path) -> str:
    """Write the command line that makes the same artifact again elsewhere."""
    if checkpoint.is_relative_to(Path.cwd()):
        checkpoint = checkpoint.relative_to(Path.cwd())
    return shlex.join(["python", script, *flags_of(replace(config, checkpoint=checkpoint))])
