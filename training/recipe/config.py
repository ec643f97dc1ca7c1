"""What can be set in a training run: types, units and limits. The values are in recipes.py."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import TypeAdapter

from efficientnet.command import require_least
from efficientnet.images.preprocess_spec import PreprocessSpec
from efficientnet.network.variants import NetworkOptions, Padding, VariantSpec, spec_of

Schedule = Literal["paper", "released", "fixed", "random"]

MAX_RANDAUGMENT_MAGNITUDE = 30.0
MAX_TRAIN_IMAGE_SIZE = 1024

# What may change when a run is gone on with: it does not change what is computed.
FREE_TO_CHANGE = {"recipe_reason", "num_workers", "output"}
FREE_TO_CHANGE |= {"keep_checkpoints", "checkpoint_every_steps"}


@dataclass(frozen=True)
class ProgressiveConfig:
    """Progressive learning: each pair is the value of the first and of the last stage."""

    image_size: tuple[int, int]
    """Training image size, pixels, 16..1024."""

    randaugment_magnitude: tuple[float, float]
    """Strength of RandAugment, 0..30, where 10 is the original full scale; 0 = none. The paper's
    largest is 25."""

    mixup_alpha: tuple[float, float]
    """Parameter of Mixup's Beta distribution; 0 = no Mixup."""

    dropout_rate: tuple[float, float]
    """Dropout before the classifier, 0..1."""

    cutmix_alpha: tuple[float, float] = (0.0, 0.0)
    """Parameter of CutMix's Beta distribution; 0 = no CutMix. With Mixup too, half of each batch
    gets the one and half the other."""

    num_stages: int = 4
    """Stages of equal step count; 1 = the last values throughout."""

    schedule: Annotated[Schedule, tyro.conf.arg(prefix_name=False)] = "paper"
    """paper: Algorithm 1, all values rise linearly. released: Google's code, whose first stage
    already takes a step up in size. fixed: the last values throughout. random: like paper, in an
    order of the stages drawn by the seed (what the paper compares with)."""

    def __post_init__(self) -> None:
        if self.num_stages < 1:
            raise ValueError(f"num_stages is {self.num_stages}, expected at least 1")
        if min(self.image_size) < 16 or max(self.image_size) > MAX_TRAIN_IMAGE_SIZE:
            raise ValueError(
                f"image_size is {self.image_size}, expected at least 16 and at most "
                f"{MAX_TRAIN_IMAGE_SIZE} pixels"
            )
        if min(*self.randaugment_magnitude, *self.mixup_alpha, *self.cutmix_alpha) < 0:
            raise ValueError("randaugment_magnitude, mixup_alpha, cutmix_alpha cannot be negative")
        if max(self.randaugment_magnitude) > MAX_RANDAUGMENT_MAGNITUDE:
            raise ValueError(
                f"randaugment_magnitude is {self.randaugment_magnitude}, expected at most "
                f"{MAX_RANDAUGMENT_MAGNITUDE:g}"
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

    schedule: Literal["exponential", "cosine", "constant"]
    """After warm-up: x 0.97 every 2.4 epochs in steps, half a cosine down to 0, or the peak."""

    warmup_epochs: float
    """Epochs over which the rate climbs from 0."""

    weight_decay: float
    """For convolutions and the classifier; biases and batch norms have none."""

    ema_decay: float
    """Moving average of weights and batch norm statistics; the average is what is deployed."""

    def __post_init__(self) -> None:
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
    """Passes over the training images; not used when there are `steps`."""

    batch_size: int
    """Images per optimizer step, over all processes."""

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

    architecture: tyro.conf.Suppress[VariantSpec | None] = None
    """Table of stages of a --variant-file; None = the variant is built in."""

    recipe: tyro.conf.Suppress[str] = "digits"
    """The name that --recipe was given, of which all these values are."""

    recipe_reason: tyro.conf.Suppress[str] = ""
    """Why it was taken; empty = it was asked for."""

    steps: int | None = None
    """Optimizer steps in all, instead of `epochs`."""

    micro_batch_size: int | None = None
    """Images per forward pass, a divisor of batch_size whose gradients are added up, and what
    batch norm sees at once; None = batch_size / processes."""

    batch_plan: Literal["fixed", "memory"] = "fixed"
    """fixed: micro_batch_size throughout. memory: at each stage the largest part of a
    process's share of the batch that the device holds; micro_batch_size is then not used."""

    compile: bool = False
    """Compile the network, once for each stage; no graph but the stage's size is ever made."""

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

    cutout: float = 0.0
    """Side of a gray square at a random place, of the image's side; 0 = none."""

    augment_on: Literal["cpu", "device"] = "cpu"
    """Where RandAugment runs: image by image in the worker processes, or on whole batches where the
    network is trained (crop and mirror stay with the decoding)."""

    weights_like: str | None = None
    """For a file that does not tell which published weights it holds: their timm:NAME or
    torchvision:NAME."""

    data: str | None = None
    """Folder with one folder of images per class, or with train/ and val/ (valid, validation,
    test) of those; folder, pattern, http(s) address or pipe: of tar shards; cifar10, cifar100,
    flowers102, stanford_cars, imagenet; None = the handwritten digits that come with
    scikit-learn."""

    image_key: str | None = None
    """Which of several images of a key of the shards is meant: what follows the first dot of its
    name, e.g. left.png."""

    data_folder: Path = Path("data")
    """Where the named sets are kept and downloaded to."""

    minival: float | None = None
    """Part of the training images that is held out and evaluated in the place of val, 0..0.5; the
    paper's is 0.02."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16, fp16: forward pass under autocast; fp16 with a scaled loss."""

    on_nan: Literal["stop", "rollback"] = "stop"
    """A loss that is not finite ends the run, or takes it back to the last checkpoint, from where
    it goes on with other random numbers (three times at most)."""

    keep_checkpoints: int = 3
    """Last checkpoints that are kept; the best is kept besides."""

    checkpoint_every_steps: int | None = None
    """Optimizer steps between checkpoints within an epoch; None = one after each epoch only."""

    num_workers: int | None = None
    """Processes that decode and augment; None = one per core for a folder, 0 for the digits."""

    seed: int = 0
    """Order of the images, augmentation, initial weights, dropout."""

    output: Path = Path("runs")
    """Folder in which the run's own folder is made."""

    name: str | None = None
    """The run's own folder; None = variant and time. A run of this name that was cut short is gone
    on with, so that the same command can be started again."""

    def __post_init__(self) -> None:
        require_least(self, epochs=1, batch_size=1, steps=1, eval_image_size=16)
        require_least(self, num_randaugment_layers=0, num_workers=0)
        require_least(self, keep_checkpoints=1, checkpoint_every_steps=1)
        rates = ("label_smoothing", "stochastic_depth_rate", "batch_norm_momentum", "cutout")
        for name in rates:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 <= {name} < 1")
        if self.micro_batch_size is not None and (
            self.micro_batch_size < 1 or self.batch_size % self.micro_batch_size
        ):
            raise ValueError(
                f"micro_batch_size is {self.micro_batch_size}, "
                f"expected a divisor of batch_size {self.batch_size}"
            )
        if not 0 < self.min_crop_area <= 1:
            raise ValueError(f"min_crop_area is {self.min_crop_area}, expected 0 < area <= 1")
        if self.minival is not None and not 0 < self.minival <= 0.5:
            raise ValueError(f"minival is {self.minival}, expected more than 0 and at most 0.5")
        if self.name is not None and (self.name in ("", "latest") or "/" in self.name):
            raise ValueError(f"name is {self.name!r}, expected a folder's name, not 'latest'")
        if self.augment_on == "device" and self.autoaugment:
            raise ValueError("augment_on device knows RandAugment only; give --no-autoaugment")
        spec_of(self.variant, self.architecture)
        if self.weights_like and not self.weights:
            raise ValueError("weights_like is given without weights: say which file it is about")
        if self.autoaugment and any(self.progressive.randaugment_magnitude):
            raise ValueError(
                f"autoaugment together with randaugment_magnitude "
                f"{self.progressive.randaugment_magnitude}, expected one of them; "
                "set the magnitude to 0 0, or --no-autoaugment"
            )

    @property
    def spec(self) -> VariantSpec:
        """The network's table of stages."""
        return spec_of(self.variant, self.architecture)

    def require_stages_fit(self) -> None:
        """Raise a ValueError if there are more stages than epochs (or steps)."""
        num_stages = self.progressive.num_stages
        limit, unit = (self.epochs, "epochs") if self.steps is None else (self.steps, "steps")
        if self.progressive.schedule != "fixed" and num_stages > limit:
            raise ValueError(
                f"num_stages is {num_stages}, more than the {limit} {unit}; give "
                f"--progressive.num-stages of at most {limit}, or more --{unit}"
            )

    def preprocess_spec(self, start: PreprocessSpec | None) -> PreprocessSpec:
        """Return how evaluation and deployment prepare an image.

        Mean and std are those of the weights to start from, or 0.5, which maps pixels to -1..1 as
        the released V2 weights have it.
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
        """Return padding and batch norm: those of the weights to start from, which fit no other."""
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
    """Turn what config_to_json made back into a config; ValueError if it has other fields."""
    return _ADAPTER.validate_python(values)


def flat_values(values: dict[str, Any]) -> dict[str, Any]:
    """Name each value of what config_to_json made by its flag, e.g. `progressive.num_stages`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = value if isinstance(value, dict) else None
        flat |= {f"{name}.{k}": v for k, v in inner.items()} if inner else {name: value}
    return flat


def changed_values(begun: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Tell what differs between two recipes, as config_to_json makes them, in the results."""
    before, after = flat_values(begun), flat_values(now)
    return [
        f"{name} {before.get(name)} and now {value}"
        for name, value in after.items()
        if name not in FREE_TO_CHANGE and before.get(name) != value
    ]
