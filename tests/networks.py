"""Networks in which no weight is what it starts as, made in seconds instead of trained."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from efficientnet.images.datasets import Sample
from efficientnet.images.preprocess import PreprocessSpec, preprocess
from efficientnet.network.model import EfficientNet, SqueezeExcite, build_model
from efficientnet.network.variants import NetworkOptions, Padding, VariantSpec


def images_of(samples: list[Sample], spec: PreprocessSpec) -> Tensor:
    """Return samples as images [N, 3, H, W]."""
    return torch.from_numpy(np.stack([preprocess(sample.read(), spec) for sample in samples]))


def random_network(
    spec: VariantSpec, num_classes: int, images: Tensor, padding: Padding = "symmetric"
) -> EfficientNet:
    """Build a network with random weights, and running statistics, scales and shifts of batch norm.

    A fresh network has shifts of zero, by which losing them does not show. Statistics are drawn
    around those of `images`, layer after layer, so that activations stay of order 1.
    """
    model = build_model(spec, num_classes, options=NetworkOptions(padding=padding)).eval()
    hooks = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(_draw_batch_norm))
        elif isinstance(module, SqueezeExcite):
            nn.init.normal_(module.fc1.bias, std=0.5)
            nn.init.normal_(module.fc2.bias, std=0.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=2 * module.in_features**-0.5)
            nn.init.normal_(module.bias, std=0.5)
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return model


def fit(model: EfficientNet, images: Tensor, labels: Tensor) -> None:
    """Train a network for two epochs: its logits then stand apart by more than int8 rounds."""
    num_epochs, batch_size = 2, 64
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-2, total_steps=num_epochs * -(-len(images) // batch_size)
    )
    model.train()
    for _ in range(num_epochs):
        for chosen in torch.randperm(len(images)).split(batch_size):
            optimizer.zero_grad()
            cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    # The running statistics of so few steps are still those of the beginning.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for batch in images.split(128):
            model(batch)
    model.eval()


def _draw_batch_norm(norm: nn.Module, inputs: tuple[Tensor]) -> None:
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None and norm.running_var is not None
    (x,) = inputs
    std, mean = torch.std_mean(x, (0, 2, 3))
    norm.running_mean.copy_(mean + 0.2 * std * torch.randn_like(std))
    norm.running_var.copy_(std.square() * torch.empty_like(std).uniform_(0.5, 2.0))
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias, std=0.5)
