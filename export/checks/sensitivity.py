"""Network and images -> its blocks, ranked by what quantising each alone does to the logits."""

import logging
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

from efficientnet.formats.artifact import BlockCost
from efficientnet.network.model import ConvNormAct, EfficientNet, SqueezeExcite
from export.graphs.calibration import choose_samples
from export.graphs.folding import fold_batch_norm
from export.graphs.quantization import FP8_LARGEST
from export.inputs.config import ExportConfig
from export.inputs.reference import Reference, batches_of

NUM_IMAGES = 64

log = logging.getLogger(__name__)


def rank_blocks(reference: Reference, config: ExportConfig) -> list[BlockCost]:
    """Quantise one block after the other, the rest in float32; the costliest comes first.

    Simulated in torch, so that the ranking does not depend on a runtime: weights for each output
    channel, the convolutions' inputs for each map, both in 8 bits.
    """
    folded = fold_batch_norm(reference.model)
    samples = choose_samples(reference, config)[:NUM_IMAGES]
    blocks = dict(named_blocks(folded))
    squares = dict.fromkeys(blocks, 0.0)
    logits: list[Tensor] = []
    with (
        torch.inference_mode(),
        tqdm(
            total=len(samples), desc="ranking blocks", unit="img", disable=None, leave=False
        ) as bar,
    ):
        for images in batches_of(samples, reference.preprocess):
            x = torch.from_numpy(images)
            expected = folded(x)
            logits.append(expected)
            names = list(blocks)
            for index, name in enumerate(names):
                block = blocks[name]
                # The layers work in place where they can: each gets a copy.
                with _quantized(block, config.precision):
                    changed = block(x.clone())
                for later in names[index + 1 :]:
                    changed = blocks[later](changed)
                found = folded.classifier(folded.avgpool(changed).flatten(1))
                squares[name] += float((found - expected).double().square().sum())
                x = block(x)
            bar.update(len(images))
    std = float(torch.cat(logits).double().std())
    num_values = sum(part.numel() for part in logits)
    costs = [
        BlockCost(block=name, logit_error=(total / num_values) ** 0.5 / max(std, 1e-12))
        for name, total in squares.items()
    ]
    return sorted(costs, key=lambda cost: cost.logit_error, reverse=True)


def named_blocks(model: EfficientNet) -> Generator[tuple[str, nn.Module]]:
    """Give stem, residual blocks and head in order, with their names in the model."""
    for stage, layer in enumerate(model.features):
        if isinstance(layer, ConvNormAct):
            yield f"features.{stage}", layer
        else:
            assert isinstance(layer, nn.Sequential)
            for index, block in enumerate(layer):
                yield f"features.{stage}.{index}", block


@contextmanager
def _quantized(block: nn.Module, precision: str) -> Generator[None]:
    # Squeeze-excite's own layers stay in float in every runtime.
    inner = {
        part
        for module in block.modules()
        if isinstance(module, SqueezeExcite)
        for part in module.modules()
    }
    convolutions = [
        module
        for module in block.modules()
        if isinstance(module, nn.Conv2d) and module not in inner
    ]
    originals = [conv.weight for conv in convolutions]
    hooks = []
    for conv in convolutions:
        conv.weight = nn.Parameter(_quantize_weights(conv.weight, precision), requires_grad=False)
        hooks.append(
            conv.register_forward_pre_hook(
                lambda _, inputs: (_quantize_activation(inputs[0], precision),)
            )
        )
    try:
        yield
    finally:
        for conv, weight, hook in zip(convolutions, originals, hooks, strict=True):
            conv.weight = weight
            hook.remove()


def _quantize_weights(weight: Tensor, precision: str) -> Tensor:
    largest = weight.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
    if precision == "fp8":
        scale = largest / FP8_LARGEST
        return (weight / scale).to(torch.float8_e4m3fn).float() * scale
    scale = largest / 127
    return (weight / scale).round() * scale


def _quantize_activation(x: Tensor, precision: str) -> Tensor:
    if precision == "fp8":
        scale = x.abs().amax().clamp(min=1e-12) / FP8_LARGEST
        return (x / scale).to(torch.float8_e4m3fn).float() * scale
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-12)
    zero = (-low / scale).round()
    return ((x / scale + zero).round().clamp(0, 255) - zero) * scale
