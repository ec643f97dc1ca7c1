"""A `tiny` checkpoint and its artifact, made once per test session: one worker makes it for all."""

import fcntl
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from networks import fit, images_of, random_network

from efficientnet.formats.artifact import QuantizationRecord
from efficientnet.formats.checkpoint import CheckpointRecord, save_checkpoint
from efficientnet.images.datasets import load_dataset
from efficientnet.images.preprocess import PreprocessSpec
from efficientnet.machine.environment import current_environment
from efficientnet.network.variants import VARIANTS, NetworkOptions, Padding
from export import ort
from export.inputs.config import OrtConfig

# Tests run side by side, one process a core: more threads would only wait for each other. Commands
# that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from all tests but those of `pytest -m gpu`, and let Ctrl-C be heard."""
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # A shell's job in the background ignores Ctrl-C, and so would the commands that tests start.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Take back the threads that a runtime opened by an earlier test left to torch.

    More of them sum in another order, and a training is no longer that of a process of its own.
    """
    torch.set_num_threads(1)


# With --dist loadfile a file is one worker's: one that takes long and begins last leaves the others
# without work.
LONG_FILES = (
    "test_export_matrix.py",
    "test_export_search.py",
    "test_pipeline.py",
    "test_export_stepwise.py",
    "test_weights.py",
    "test_perf_latency.py",
    "test_export_ablation.py",
    "test_perf_network.py",
    "test_training_search.py",
    "test_export_batch_splitting.py",
    "test_export_quantization.py",
    "test_commands.py",
    "test_export_all.py",
    "test_training_resume.py",
    "test_training_loop.py",
    "test_training_speed.py",
    "test_training_distributed.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files."""
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


TINY_PREPROCESS = PreprocessSpec(
    image_size=32,
    interpolation="bicubic",
    crop_fraction=None,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


def digits(num_images: int) -> np.ndarray:
    """Return held-out digits as the tiny networks want them, float32 [N, 3, 32, 32]."""
    return images_of(list(load_dataset("digits").val[:num_images]), TINY_PREPROCESS).numpy()


QUANTIZATION = QuantizationRecord(
    method="",
    num_calibration_images=64,
    calibration_sha256="",
    kept_precision="fp32",
    kept_blocks=(),
)


def write_tiny_checkpoint(
    directory: Path, padding: Padding = "symmetric", is_fitted: bool = False
) -> Path:
    """Write a random `tiny` network for the digits; fitted, it knows nine of ten."""
    torch.manual_seed(0)
    samples = list(load_dataset("digits").train)
    images = images_of(samples if is_fitted else samples[:64], TINY_PREPROCESS)
    model = random_network(VARIANTS["tiny"], 10, images[:64], padding)
    if is_fitted:
        fit(model, images, torch.tensor([sample.label for sample in samples]))
    record = CheckpointRecord(
        variant="tiny",
        num_classes=10,
        class_names=tuple("0123456789"),
        network=NetworkOptions(padding=padding),
        preprocess=TINY_PREPROCESS,
        data="digits",
        weights_sha256="",
        epoch=0,
        step=0,
        top1=0.0,
        top5=0.0,
        num_images_evaluated=0,
        recipe="tiny",
        train_config={},
        environment=current_environment(),
    )
    save_checkpoint(directory, model.state_dict(), record, train_state=None)
    return directory


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that all workers of pytest-xdist share; the first that asks makes it."""
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder, mark = shared / name, shared / f"{name}.made"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not mark.exists():
            folder.mkdir()
            make(folder)
            mark.touch()
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        write_tiny_checkpoint(folder / "checkpoint")

    return made_once(tmp_path_factory, "tiny-run", make) / "checkpoint"


@pytest.fixture(scope="session")
def tiny_artifact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    artifact = Path("tiny") / "onnxruntime-fp32"

    def make(folder: Path) -> None:
        ort.main(OrtConfig(checkpoint=tiny_checkpoint, output=folder / artifact))

    return made_once(tmp_path_factory, "tiny-artifacts", make) / artifact


@pytest.fixture(scope="session")
def fitted_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[Padding, Path]:
    """Networks that int8 can be judged by: it passes with no block kept in a higher precision."""

    def make(folder: Path) -> None:
        for padding in get_args(Padding):
            write_tiny_checkpoint(folder / padding / "checkpoint", padding, is_fitted=True)

    folder = made_once(tmp_path_factory, "fitted-runs", make)
    return {padding: folder / padding / "checkpoint" for padding in get_args(Padding)}


@pytest.fixture(scope="session")
def fitted_checkpoint(fitted_checkpoints: dict[Padding, Path]) -> Path:
    return fitted_checkpoints["same"]
