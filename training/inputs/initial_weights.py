"""--weights SOURCE -> the weights that training starts from: published ones, or a checkpoint."""

import logging
from pathlib import Path

from efficientnet.formats import checkpoint
from efficientnet.formats.checkpoint import RECORD_FILE, CheckpointError
from training.inputs.published_weights import PublishedWeights, load_published, published_entries
from training.recipe.config import TrainConfig

log = logging.getLogger(__name__)


def start_image_size(weights: str) -> int | None:
    """Return the size that weights are used at, as far as it can be told without fetching them."""
    if (Path(weights) / RECORD_FILE).is_file():
        return checkpoint.read_checkpoint(Path(weights)).preprocess.image_size
    entry = published_entries().get(weights)
    return entry.usage.image_size[0] if entry else None


def load_start(config: TrainConfig) -> PublishedWeights | None:
    """Load what `config.weights` names; None without."""
    if config.weights is None:
        return None
    if not Path(config.weights).is_dir():
        return load_published(config.weights, config.spec, config.weights_like, num_classes=None)
    model, record = checkpoint.load_checkpoint(Path(config.weights))
    if record.spec != config.spec:
        if record.variant == config.variant:
            raise CheckpointError(
                f"{config.weights} holds another network of the name {config.variant}: its table "
                "of stages is not that of the --variant-file"
            )
        raise CheckpointError(
            f"{config.weights} holds a {record.variant}, expected a {config.variant}; "
            f"train {record.variant}, or name weights of {config.variant}"
        )
    return PublishedWeights(
        tensors=model.state_dict(),
        network=record.network,
        preprocess=record.preprocess,
        class_names=record.class_names,
        origin=str(config.weights),
        sha256=record.weights_sha256,
    )


def log_start(start: PublishedWeights, num_classes: int) -> None:
    """Say what training starts from, and what is not taken over."""
    network, preprocess = start.network, start.preprocess
    log.info(
        f"start from {start.origin} (sha256 {start.sha256[:12]}), {network.padding} padding, batch "
        f"norm epsilon {network.batch_norm_epsilon:g}, mean {preprocess.mean}, std {preprocess.std}"
    )
    old = len(start.tensors["classifier.1.bias"])
    log.info("its classifier of %d classes is replaced by a new one of %d", old, num_classes)
