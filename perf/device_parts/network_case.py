"""Variant, device -> a network with random weights, real images, and the answers of float32."""

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from efficientnet.formats.checkpoint import CheckpointRecord
from efficientnet.images.datasets import SAMPLE_PHOTOS, load_dataset
from efficientnet.images.preprocess import PreprocessSpec, preprocess
from efficientnet.machine.environment import current_environment, num_usable_cores
from efficientnet.network.model import EfficientNet, ResidualBlock, build_model
from efficientnet.network.variants import get_variant
from perf.device_parts.records import Parity

NUM_CLASSES = 1000
NUM_PARITY_IMAGES = 64
PARITY_BATCH_SIZE = 16
NUM_STATISTICS_IMAGES = 32

# Random branches as large as what they are added to enlarge each other's rounding: in bf16, V2-S
# was off by 3.5 standard deviations of its logits. Trained networks are off by 0.05 at most.
RESIDUAL_GAIN = 0.1

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class ImagesToLogits(nn.Module):
    """Float32 images of any layout -> float32 logits; a precision and channels_last inside."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network.to(dtype).to(memory_format=torch.channels_last)
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to logits [N, num_classes]."""
        x = images.to(self.dtype, memory_format=torch.channels_last)
        return self.network(x).float()


@dataclass(frozen=True, eq=False)
class Scene:
    """What all programs of one process are given and compared with."""

    variant: str
    device: torch.device
    spec: PreprocessSpec
    network: EfficientNet
    """Float32, on the device, in evaluation mode."""
    host_images: NDArray[np.float32]
    """[N, 3, H, W], different ones."""
    images: Tensor
    """The same on the device."""
    reference: Tensor
    """Float32 logits of the first NUM_PARITY_IMAGES, on the host."""

    def program(self, precision: str) -> ImagesToLogits:
        """Return the eager program of a precision."""
        return ImagesToLogits(copy.deepcopy(self.network), DTYPES[precision]).eval()

    def batches(self, batch_size: int) -> list[Tensor]:
        """Return at least two batches of the images, on the device."""
        count = _num_rows(len(self.images), batch_size)
        repeats = -(-count // len(self.images))
        return list(self.images.repeat(repeats, 1, 1, 1)[:count].split(batch_size))

    def host_batches(self, batch_size: int) -> list[NDArray[np.float32]]:
        """Return at least two batches of the images, on the host."""
        count = _num_rows(len(self.host_images), batch_size)
        rows = np.resize(self.host_images, (count, *self.host_images.shape[1:]))
        return np.split(rows, count // batch_size)

    def parity(self, logits: Tensor) -> Parity:
        """Compare logits of the first images with the reference's."""
        logits = logits.float().cpu()[: len(self.reference)]
        reference = self.reference[: len(logits)]
        errors = (logits - reference).abs() / self.reference.std()
        agree = logits.argmax(1) == reference.argmax(1)
        return Parity(
            num_images=len(logits),
            max_relative_error=float(errors.max()),
            top1_agreement=float(agree.float().mean()),
        )

    def record(self) -> CheckpointRecord:
        """Describe the network for a checkpoint that exports start from."""
        return CheckpointRecord(
            variant=self.variant,
            num_classes=NUM_CLASSES,
            class_names=tuple(f"class-{number}" for number in range(NUM_CLASSES)),
            preprocess=self.spec,
            data=SAMPLE_PHOTOS,
            recipe="random weights",
            environment=current_environment(),
        )


def build_scene(variant: str, device: torch.device) -> Scene:
    """Build a network whose activations stay of order 1, so that no format overflows.

    Its weights are random: batch norm gets the statistics of real images, and the classifier
    logits that differ from image to image.
    """
    spec = PreprocessSpec(
        image_size=get_variant(variant).eval_image_size,
        interpolation="bicubic",
        crop_fraction=None,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    samples = load_dataset(SAMPLE_PHOTOS).val
    with ThreadPoolExecutor(num_usable_cores()) as pool:
        arrays = list(pool.map(lambda sample: preprocess(sample.read(), spec), samples))
    host_images = np.stack(arrays)
    images = torch.from_numpy(host_images).to(device)
    torch.manual_seed(0)
    network = build_model(get_variant(variant), NUM_CLASSES)
    classifier = network.classifier[1]
    assert isinstance(classifier, nn.Linear)
    nn.init.normal_(classifier.weight, std=2 * classifier.in_features**-0.5)
    for module in network.modules():
        if isinstance(module, ResidualBlock) and module.has_residual:
            norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
            nn.init.constant_(norms[-1].weight, RESIDUAL_GAIN)
    network = network.to(device).to(memory_format=torch.channels_last).eval()
    _settle_batch_norm(network, images[:NUM_STATISTICS_IMAGES])
    with torch.inference_mode(), exact():
        chunks = images[:NUM_PARITY_IMAGES].split(PARITY_BATCH_SIZE)
        reference = torch.cat([network(chunk).float().cpu() for chunk in chunks])
    return Scene(variant, device, spec, network, host_images, images, reference)


def exact() -> AbstractContextManager[object]:
    """Let float32 convolutions be float32, not TF32, and cuDNN try which algorithm is fastest."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False)


def _settle_batch_norm(network: nn.Module, images: Tensor) -> None:
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad(), exact():
        network(images.contiguous(memory_format=torch.channels_last))
    network.eval()


def _num_rows(num_images: int, batch_size: int) -> int:
    # Whole batches, and no call that sees the images of the call before it.
    return max(2, num_images // batch_size) * batch_size
