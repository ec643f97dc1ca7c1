"""A `tiny` checkpoint and its artifact, made once per test session."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from efficientnet.artifact import QuantizationRecord
from efficientnet.checkpoint import CheckpointRecord, save_checkpoint
from efficientnet.environment import current_environment
from efficientnet.model import build_model
from efficientnet.preprocess import PreprocessSpec
from efficientnet.variants import VARIANTS
from export import ort
from export.config import ExportConfig
from training import run
from training.config import ProgressiveConfig
from training.recipes import digits_recipe

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


TINY_PREPROCESS = PreprocessSpec(
    image_size=32,
    interpolation="bicubic",
    crop_fraction=None,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


QUANTIZATION = QuantizationRecord(
    method="",
    num_calibration_images=64,
    calibration_sha256="",
    kept_precision="fp32",
    kept_blocks=(),
)


def write_tiny_checkpoint(directory: Path) -> Path:
    """Write an untrained `tiny` network for the digits, with batch norm statistics of its own."""
    torch.manual_seed(0)
    model = build_model(VARIANTS["tiny"], num_classes=10).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # Far from the initial 0 and 1, so that folding them wrongly would show.
            torch.nn.init.normal_(module.running_mean, std=0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
    record = CheckpointRecord(
        variant="tiny",
        num_classes=10,
        class_names=tuple("0123456789"),
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


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_artifact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("artifacts") / "tiny" / "onnxruntime-fp32"
    return ort.main(ExportConfig(checkpoint=tiny_checkpoint, output=output))


@pytest.fixture(scope="session")
def trained_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train `tiny` on the digits until it knows most of them, about 20 seconds on a core."""
    one_size = ProgressiveConfig((32, 32), (0, 0), (0, 0), (0.0, 0.0), num_stages=1)
    output = tmp_path_factory.mktemp("runs")
    checkpoint = run.main(
        replace(digits_recipe("tiny"), epochs=6, progressive=one_size, output=output)
    )
    assert checkpoint is not None
    return checkpoint
