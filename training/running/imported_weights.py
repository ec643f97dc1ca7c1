"""Published weights -> checkpoint, as it comes out of training."""

import json
import logging
from datetime import UTC, datetime
from pathlib import Path

import torch

from efficientnet.formats.checkpoint import CheckpointRecord, save_checkpoint
from efficientnet.images.datasets import SAMPLE_PHOTOS
from efficientnet.images.preprocess_spec import PreprocessSpec
from efficientnet.machine.environment import current_environment
from efficientnet.network.model import build_model
from efficientnet.network.variants import get_variant
from efficientnet.network.weights_file import WeightsError
from training.inputs.import_config import ImportConfig
from training.inputs.published_weights import PublishedWeights, load_published
from training.running.run_folder import point_latest_to

log = logging.getLogger(__name__)


def main(config: ImportConfig) -> Path:
    """Check the weights and write a checkpoint; return its directory."""
    spec = get_variant(config.variant)
    names = None if config.class_names is None else read_class_names(config.class_names)
    published = load_published(
        config.source, spec, config.like, None, entry=config.entry, drop=config.drop
    )
    class_names = name_classes(published, names)
    preprocess = published.preprocess.model_copy(update={"method": config.preprocess_method})
    log_weights(published, preprocess)

    size = published.preprocess.image_size
    with torch.device("meta"):
        model = build_model(spec, len(class_names), options=published.network)
    model.load_state_dict(published.tensors, assign=True)
    with torch.inference_mode():
        logits = model.eval()(torch.zeros(1, 3, size, size))
    if not logits.isfinite().all():
        raise WeightsError(
            f"{published.origin} gives logits that are not finite for a gray image: "
            "the weights are damaged; download or copy them again"
        )

    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    run = config.output / f"{config.variant}-{stamp}"
    record = CheckpointRecord(
        variant=config.variant,
        num_classes=len(class_names),
        class_names=class_names,
        network=published.network,
        preprocess=preprocess,
        data=SAMPLE_PHOTOS,
        recipe=published.origin,
        train_config={"source": config.source, "sha256": published.sha256},
        environment=current_environment(),
    )
    save_checkpoint(run / "checkpoint", published.tensors, record, train_state=None)
    point_latest_to(run)
    log.info("%s points to %s: commands without --checkpoint take it", run.parent / "latest", run)
    return run / "checkpoint"


def read_class_names(path: Path) -> tuple[str, ...]:
    """Read the names of classes, one a line or a JSON list."""
    try:
        text = path.read_text(encoding="utf-8")
        lines = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise WeightsError(f"the class names cannot be read from {path}: {error}") from None
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise WeightsError(f"{path} holds no JSON list of names")
    names = tuple(line.strip() for line in lines)
    for number, name in enumerate(names):
        if not name or name in names[:number]:
            problem = f"'{name}' twice" if name else f"nothing in line {number + 1}"
            raise WeightsError(f"{path} has {problem}, expected a name of its own for each class")
    return names


def name_classes(published: PublishedWeights, names: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the names of a network's classes: those given, ImageNet's, or numbered ones."""
    count = len(published.tensors["classifier.1.bias"])
    if names is not None and len(names) != count:
        raise WeightsError(
            f"--class-names has {len(names)} names, and {published.origin} has {count} classes"
        )
    if names is None and published.class_names is None:
        log.info(
            f"{count} classes without names: they are called class_0 to class_{count - 1}; "
            "--class-names FILE gives them others"
        )
    return names or published.class_names or tuple(f"class_{index}" for index in range(count))


def log_weights(published: PublishedWeights, preprocess: PreprocessSpec) -> None:
    """Print what decides the network's answers."""
    network, cut = published.network, preprocess.crop_fraction
    trained = (t for n, t in published.tensors.items() if n.endswith(("weight", "bias")))
    of = "squashed image" if preprocess.is_squashed else "short side"
    shown = "the whole image squashed" if cut is None else f"the central {cut:.3f} of the {of}"
    for name, value in {
        "weights": f"{published.origin}, SHA-256 {published.sha256[:12]}",
        "parameters": f"{sum(t.numel() for t in trained):,}",
        "padding": network.padding,
        "batch norm": f"epsilon {network.batch_norm_epsilon:g}, "
        f"momentum {network.batch_norm_momentum:g}",
        "preprocessing": f"{preprocess.image_size} px, {shown}, {preprocess.interpolation}, "
        f"mean {preprocess.mean}, std {preprocess.std}, method {preprocess.method}",
    }.items():
        log.info("%-13s  %s", name, value)
