"""A checkpoint directory -> the eager float32 model: the baseline of every comparison."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from efficientnet.formats.checkpoint import load_checkpoint
from efficientnet.machine.denormals import flushed_denormals
from efficientnet.network.cost import network_cost
from efficientnet.runtimes.protocol import ProgramInfo, check_images


class TorchRuntime:
    """Runs the model as it was trained, channels_last, on the CPU."""

    def __init__(self, model: torch.nn.Module, info: ProgramInfo) -> None:
        # Measured on 2 cores, V2-S at 384 px: 68 ms against 84 ms for contiguous tensors.
        self._model = model.to(memory_format=torch.channels_last)
        self.info = info

    @flushed_denormals()
    @torch.inference_mode()
    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """See Runtime.infer."""
        check_images(images, self.info)
        # torch takes no negative strides, and warns of read-only memory.
        images = np.require(images, requirements=["C", "W"])
        batch = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)
        return self._model(batch).numpy()


@flushed_denormals()  # torch's threads may be started here, and keep their arithmetic
def open_directory(directory: Path, num_threads: int) -> TorchRuntime:
    """Open a checkpoint; sets the number of threads of the whole process."""
    torch.set_num_threads(num_threads)
    model, record = load_checkpoint(directory)
    size = record.preprocess.image_size
    cost = network_cost(record.spec, size, num_classes=record.num_classes)
    info = ProgramInfo(
        program_sha256=record.weights_sha256,
        variant=record.variant,
        runtime="torch",
        precision="fp32",
        preprocess=record.preprocess,
        class_names=record.class_names,
        data=record.data,
        max_batch_size=None,
        flops_per_image=cost.flops,
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
    )
    return TorchRuntime(model, info)
