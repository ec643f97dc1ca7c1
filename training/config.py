"""What can be set in a training run: types, units and limits. The values are in recipes.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from pydantic import TypeAdapter

from efficientnet.preprocess import PreprocessSpec
from efficientnet.variants import VARIANTS, NetworkOptions, Padding


@dataclass(frozen=True)
class ProgressiveConfig:
    """Progressive learning: each pair is the value of the first and of the last stage."""

    image_size: tuple[int, int]
    """Training image size, pixels."""

    randaugment_magnitude: tuple[float, float]
    """Strength of RandAugment, where 10 is the original full scale; 0 = none, otherwise >= 2.5
    (below, Posterize would leave no bit)."""

    mixup_alpha: tuple[float, float]
    """Parameter of Mixup's Beta distribution; 0 = no Mixup."""

    dropout_rate: tuple[float, float]
    """Dropout before the classifier, 0..1."""

    num_stages: int = 4
    """Stages of equal step count; 1 = the last values throughout."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if self.num_stages < 1:
            raise ValueError(f"num_stages is {self.num_stages}, expected at least 1")
        if min(self.image_size) < 16:
            raise ValueError(f"image_size is {self.image_size}, expected at least 16 pixels")
        if min(*self.randaugment_magnitude, *self.mixup_alpha) < 0:
            raise ValueError("randaugment_magnitude and mixup_alpha cannot be negative")
        if any(0 < magnitude < 2.5 for magnitude in self.randaugment_magnitude):
            raise ValueError(
                f"randaugment_magnitude is {self.randaugment_magnitude}, expected 0 or >= 2.5"
            )
        if min(self.dropout_rate) < 0 or max(self.dropout_rate) >= 1:
            raise ValueError(f"dropout_rate is {self.dropout_rate}, expected 0 <= rate < 1")


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, learning rate over time, and the moving average of the weights."""

    name: Literal["rmsprop", "adamw"]
    """rmsprop is TensorFlow's (decay 0.9, momentum 0.9, epsilon inside the root)."""

    learning_rate: float
    """Peak for a batch of 256; it grows in proportion to the batch size."""

    schedule: Literal["exponential", "cosine"]
    """After warm-up: x 0.97 every 2.4 epochs in steps, or half a cosine down to 0."""

    warmup_epochs: float
    """Epochs over which the rate climbs from 0."""

    weight_decay: float
    """For convolutions and the classifier; biases and batch norms have none."""

    ema_decay: float
    """Moving average of weights and batch norm statistics; the average is what is deployed."""

    def __post_init__(self) -> None:
        """Check the limits."""
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}, expected more than 0")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}, expected 0 <= decay < 1")
        if self.warmup_epochs < 0 or self.weight_decay < 0:
            raise ValueError("warmup_epochs and weight_decay cannot be negative")


@dataclass(frozen=True)
class TrainConfig:
    """A recipe: everything that decides what a run computes."""

    variant: tyro.conf.Suppress[str]
    """Architecture size; the word after the command."""

    progressive: ProgressiveConfig

    optimizer: OptimizerConfig

    epochs: int

    batch_size: int
    """Images per optimizer step."""

    eval_image_size: int
    """Pixels; also the size at which the checkpoint is deployed."""

    crop_fraction: float | None
    """Evaluation cuts this part of the short side out of the centre; None = the whole image is
    squashed to a square."""

    interpolation: Literal["bilinear", "bicubic"]
    """How images are resized, in training and evaluation."""

    min_crop_area: float
    """Smallest part of the image's area that a random training crop keeps, 0..1."""

    horizontal_flip: bool
    """Mirror half of the training images."""

    num_randaugment_layers: int
    """Operations that RandAugment applies to an image."""

    label_smoothing: float

    stochastic_depth_rate: float
    """Drop rate that the last block approaches; it grows linearly from 0."""

    batch_norm_momentum: float
    """Weight of a new batch in the running statistics (torch's convention)."""

    micro_batch_size: int | None = None
    """Images per forward pass, a divisor of batch_size whose gradients are added up;
    None = batch_size."""

    autoaugment: bool = False
    """AutoAugment's policy for ImageNet (V1's and V2-B's recipe), not together with
    RandAugment."""

    preprocess_method: Literal["exact", "fast"] = "exact"
    """How evaluation and deployment decode and resize: as timm does, or faster with slightly other
    pixels (`python perf/preprocessing.py` measures both)."""

    padding: Padding | None = None
    """same: TensorFlow's; symmetric: faster, as torchvision trains it. None = that of --weights,
    without them symmetric."""

    weights: str | None = None
    """Start from these weights with a new classifier: timm:NAME, torchvision:NAME, a .safetensors
    or .pth file of theirs, or a checkpoint directory; None = random ones."""

    weights_like: str | None = None
    """For a file that does not tell which published weights it holds: their timm:NAME or
    torchvision:NAME."""

    data: Path | None = None
    """Folder with one folder of images per class, or with train/ and val/ of those;
    None = the handwritten digits that come with scikit-learn."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: forward pass under autocast."""

    num_workers: int | None = None
    """Processes that decode and augment; None = one per core for a folder, 0 for the digits."""

    seed: int = 0
    """Order of the images, augmentation, initial weights, dropout."""

    output: Path = Path("runs")
    """Folder in which the run's own folder is made."""

    def __post_init__(self) -> None:
        """Check what does not depend on the data."""
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError("epochs and batch_size must be at least 1")
        if self.micro_batch_size is not None and (
            self.micro_batch_size < 1 or self.batch_size % self.micro_batch_size
        ):
            raise ValueError(
                f"micro_batch_size is {self.micro_batch_size}, "
                f"expected a divisor of batch_size {self.batch_size}"
            )
        if self.eval_image_size < 16:
            raise ValueError(f"eval_image_size is {self.eval_image_size}, expected at least 16")
        if not 0 < self.min_crop_area <= 1:
            raise ValueError(f"min_crop_area is {self.min_crop_area}, expected 0 < area <= 1")
        if self.variant not in VARIANTS:
            raise ValueError(f"unknown variant {self.variant!r}")
        if self.weights_like and not self.weights:
            raise ValueError("weights_like is given without weights: say which file it is about")
        if self.autoaugment and any(self.progressive.randaugment_magnitude):
            raise ValueError(
                f"autoaugment together with randaugment_magnitude "
                f"{self.progressive.randaugment_magnitude}, expected one of them; "
                "set the magnitude to 0 0, or --no-autoaugment"
            )

    def preprocess_spec(self, start: PreprocessSpec | None) -> PreprocessSpec:
        """Return how evaluation and deployment prepare an image.

        Args:
            start: of the weights that training starts from, whose mean and deviation are kept;
                None: 0.5, which maps pixels to -1..1 as the released V2 weights have it.
        """
        return PreprocessSpec(
            image_size=self.eval_image_size,
            interpolation=self.interpolation,
            crop_fraction=self.crop_fraction,
            mean=start.mean if start else (0.5, 0.5, 0.5),
            std=start.std if start else (0.5, 0.5, 0.5),
            method=self.preprocess_method,
        )

    def network_options(self, start: NetworkOptions | None) -> NetworkOptions:
        """Return padding and batch norm of the network.

        Args:
            start: of the weights that training starts from, which fit no other padding or epsilon.

        Raises:
            ValueError: `padding` is given and is not theirs.
        """
        if start and self.padding and self.padding != start.padding:
            raise ValueError(
                f"padding is {self.padding}, but the weights of {self.weights} are used with "
                f"{start.padding} padding; leave --padding out"
            )
        options = start or NetworkOptions(padding=self.padding or "symmetric")
        return options.model_copy(update={"batch_norm_momentum": self.batch_norm_momentum})


_ADAPTER = TypeAdapter(TrainConfig)


def config_to_json(config: TrainConfig) -> dict[str, Any]:
    """Turn a config into plain JSON values."""
    return _ADAPTER.dump_python(config, mode="json")


def config_from_json(values: dict[str, Any]) -> TrainConfig:
    """Turn what config_to_json made back into a config.

    Raises:
        ValueError: a field is missing or has a value that is not allowed.
    """
    return _ADAPTER.validate_python(values)
