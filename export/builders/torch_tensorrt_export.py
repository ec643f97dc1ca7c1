"""Checkpoint -> TensorRT engine inside a torch program (torch-tensorrt), checked."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as shape_settings

from efficientnet.errors import PipelineError
from efficientnet.formats.artifact import Binding
from efficientnet.machine.gpu import Gpu, current_gpu, why_no_gpu
from efficientnet.precision import Precision
from efficientnet.runtimes.torch_tensorrt_runtime import PACKAGE, import_torch_tensorrt, version_of
from export.builders.aoti_builder import Batch, batches_for, weight_bytes_of
from export.builders.writing import Built, default_output, programs_for, write_checked_artifact
from export.graphs.folding import (
    INPUT_NAME,
    TORCH_TYPES,
    InPrecision,
    fold_batch_norm,
    use_convolutions_in_squeeze_excite,
)
from export.inputs.config import TorchTrtConfig
from export.inputs.rebuild import rebuild_command
from export.inputs.reference import Reference, load_reference

PROGRAM_FILE = "model.pt2"
TIMING_CACHE_FILE = "timing.cache"

# The TensorRT of every release for this torch has no kernels below.
LEAST_CAPABILITY = (7, 5)
LEAST_CAPABILITY_FOR_BF16 = (8, 0)

log = logging.getLogger(__name__)


class TorchTensorRTError(PipelineError):
    """A program that cannot be built here."""


def main(config: TorchTrtConfig) -> Path:
    """Build, check and write the artifact; return its directory."""
    gpu = find_gpu(config.precision)
    torch_tensorrt = load_package()
    version = version_of(torch_tensorrt)
    log.info("torch-tensorrt %s for %s", version, gpu.name)
    reference = load_reference(config)
    output = default_output(config, reference, "torch-tensorrt")
    batches = batches_for(config)
    static_programs = programs_for(PROGRAM_FILE, (b for b in batches if isinstance(b, int)))
    files = [program.file for program in static_programs] or [PROGRAM_FILE]

    def build(directory: Path, kept: tuple[str, ...]) -> Built:
        network = network_for(reference, config.precision)
        for file, batch in zip(files, batches, strict=True):
            log.info("build %s", file)
            build_program(torch_tensorrt, network, reference, config, batch, directory / file)
        (directory / TIMING_CACHE_FILE).unlink(missing_ok=True)
        return Built(
            program_file=files[0],
            weight_bytes=weight_bytes_of(reference.model, TORCH_TYPES[config.precision]),
            other_files=tuple(files[1:]),
            static_programs=static_programs,
            log=(f"built by torch-tensorrt {version} for {gpu.name}",),
            target_device=gpu.name,
            binding=Binding(
                library=PACKAGE,
                version=version,
                compute_capability=gpu.compute_capability,
                device=gpu.name,
                rebuild=rebuild_command("export/torch_trt.py", config, reference.checkpoint),
            ),
        )

    return write_checked_artifact(reference, config, output, "torch-tensorrt", build)


def find_gpu(precision: Precision) -> Gpu:
    """Return the GPU, if there is one that torch-tensorrt builds for in a precision."""
    gpu = current_gpu()
    if gpu is None:
        raise TorchTensorRTError(
            f"no NVIDIA GPU answers here ({why_no_gpu()}), and torch-tensorrt builds for the GPU "
            "it runs on: run this command on that machine; here 'python export/trt.py --flavor "
            "rtx' builds for later, and 'python export/ort.py' makes an artifact for the CPU"
        )
    capability = tuple(map(int, gpu.compute_capability.split(".")))
    if capability < LEAST_CAPABILITY:
        raise TorchTensorRTError(
            f"{gpu.name} has compute capability {gpu.compute_capability}, and no release of "
            f"torch-tensorrt for torch {torch.__version__} supports less than 7.5: take "
            "'python export/trt.py' with TensorRT 10.4 ('pip install tensorrt-cu12==10.4.0') or "
            "'python export/aoti.py --device cuda --precision fp16'"
        )
    if precision == "bf16" and capability < LEAST_CAPABILITY_FOR_BF16:
        raise TorchTensorRTError(
            f"{gpu.name}: compute capability {gpu.compute_capability} does not compute in bf16, "
            "which needs 8.0: take --precision fp16"
        )
    return gpu


def load_package() -> Any:
    """Import torch-tensorrt."""
    minor = ".".join(torch.__version__.split(".")[:2])
    how = (
        f"'pip install \"torch-tensorrt=={minor}.*\"' (pip fetches TensorRT's libraries from "
        "NVIDIA), or take 'python export/trt.py', which needs TensorRT alone"
    )
    if importlib.util.find_spec(PACKAGE) is None:
        raise TorchTensorRTError(f"{PACKAGE} is not installed: {how}")
    try:
        return import_torch_tensorrt()
    # Its Python part without its libraries fails with an OSError.
    except (ImportError, OSError) as error:
        raise TorchTensorRTError(f"{PACKAGE} cannot be imported ({error}): {how}") from error


def network_for(reference: Reference, precision: Precision) -> nn.Module:
    """Return the network on the GPU, with the number format that its engine computes in."""
    network = fold_batch_norm(reference.model)
    use_convolutions_in_squeeze_excite(network)
    return InPrecision(network, TORCH_TYPES[precision]).eval().cuda()


def build_program(
    torch_tensorrt: Any,
    network: nn.Module,
    reference: Reference,
    config: TorchTrtConfig,
    batch: Batch,
    file: Path,
) -> None:
    """Build the engine of a network on the GPU, whose weights tell the precision, and write it."""
    shape = (3, reference.image_size, reference.image_size)
    if isinstance(batch, int):
        num_images, dynamic_shapes = batch, None
        images: Any = torch_tensorrt.Input((batch, *shape), dtype=torch.float32, name=INPUT_NAME)
    else:
        high = batch[1]
        # torch.export takes a batch of one for a constant.
        num_images = max(2, config.batch[1])
        dynamic_shapes = ({0: torch.export.Dim("batch", min=1, max=high)},)
        images = torch_tensorrt.Input(
            min_shape=(1, *shape),
            opt_shape=(config.batch[1], *shape),
            max_shape=(high, *shape),
            dtype=torch.float32,
            name=INPUT_NAME,
        )
    example = torch.zeros(num_images, *shape, device="cuda")
    # Without the second setting torch.export records a range from 1 as one from 2, and so does the
    # engine: a single image would be refused.
    with (
        torch.no_grad(),
        shape_settings.patch(  # pyright: ignore[reportAttributeAccessIssue]
            backed_size_oblivious=True
        ),
    ):
        exported = torch.export.export(network, (example,), dynamic_shapes=dynamic_shapes)
        compiled: Any = torch_tensorrt.dynamo.compile(
            exported,
            arg_inputs=[images],
            # Nothing of the network may be left to torch between two engines.
            require_full_compilation=True,
            min_block_size=1,
            immutable_weights=True,
            # fp32 means float32.
            disable_tf32=config.precision == "fp32",
            optimization_level=config.optimization_level,
            # By default it stays in the system's temporary folder.
            timing_cache_path=str(file.parent / TIMING_CACHE_FILE),
        )
        torch_tensorrt.save(
            compiled, str(file), arg_inputs=[example], dynamic_shapes=dynamic_shapes
        )
