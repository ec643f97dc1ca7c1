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
from efficientnet.machine import gpu as gpus
from efficientnet.precision import Precision
from efficientnet.runtimes.torch_tensorrt_runtime import PACKAGE, import_torch_tensorrt, version_of
from export.builders import writing
from export.graphs import folding
from export.inputs.config import TorchTrtConfig, rebuild_command
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
    output = writing.default_output(config, reference, "torch-tensorrt")
    files = writing.program_files(PROGRAM_FILE, config)
    dtype = folding.TORCH_TYPES[config.precision]

    def build(directory: Path, _: tuple[str, ...]) -> writing.Built:
        network = folding.fold_batch_norm(reference.model)
        folding.use_convolutions_in_squeeze_excite(network)
        on_gpu = folding.InPrecision(network, dtype).eval().cuda()
        for file, batch in files.items():
            log.info("build %s", file)
            build_program(torch_tensorrt, on_gpu, reference, config, batch, directory / file)
        (directory / TIMING_CACHE_FILE).unlink(missing_ok=True)
        return writing.Built(
            next(iter(files)),
            folding.weight_bytes_of(reference.model, dtype),
            static_programs=writing.static_programs(files),
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

    return writing.write_checked_artifact(reference, config, output, "torch-tensorrt", build)


def find_gpu(precision: Precision) -> gpus.Gpu:
    """Return the GPU, if there is one that torch-tensorrt builds for in a precision."""
    gpu = gpus.current_gpu()
    if gpu is None:
        raise TorchTensorRTError(
            f"no NVIDIA GPU answers here ({gpus.why_no_gpu()}), and torch-tensorrt builds for the "
            "GPU it runs on: run this command on that machine; here 'python export/trt.py --flavor "
            "rtx' builds for later, and 'python export/ort.py' makes an artifact for the CPU"
        )
    capability = gpus.numbers(gpu.compute_capability)
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


def build_program(
    torch_tensorrt: Any,
    network: nn.Module,
    reference: Reference,
    config: TorchTrtConfig,
    batch: writing.Batch,
    file: Path,
) -> None:
    """Build the engine of a network on the GPU, whose weights tell the precision, and write it."""
    shape = (3, reference.image_size, reference.image_size)
    if isinstance(batch, int):
        num_images, dynamic_shapes, sizes = batch, None, {"shape": (batch, *shape)}
    else:
        # torch.export takes a batch of one for a constant.
        num_images = max(2, config.batch[1])
        dynamic_shapes = ({0: torch.export.Dim("batch", min=1, max=batch[1])},)
        limits = {"min": 1, "opt": config.batch[1], "max": batch[1]}
        sizes = {f"{name}_shape": (size, *shape) for name, size in limits.items()}
    images: Any = torch_tensorrt.Input(**sizes, dtype=torch.float32, name=folding.INPUT_NAME)
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
