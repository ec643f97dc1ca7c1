"""What many tests start from, made once per test session: one worker makes it for all."""

import fcntl
import gc
import hashlib
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from commands import Done, run
from networks import fit, images_of, random_network
from quick import hold_contenders_here, take_back, tell_peaks
from service_processes import start_service

from efficientnet.formats.artifact import QuantizationRecord
from efficientnet.formats.checkpoint import CheckpointRecord, save_checkpoint
from efficientnet.images import datasets
from efficientnet.images.datasets import load_dataset
from efficientnet.images.preprocess_spec import PreprocessSpec
from efficientnet.machine.environment import current_environment
from efficientnet.network.variants import VARIANTS, NetworkOptions, Padding, VariantSpec
from export import ort, ov
from export.inputs.config import OpenVinoConfig, OrtConfig

# They are the same each time, and take half a second to make.
datasets.digit_images = cache(datasets.digit_images)
# Nor does httpx need the world's certificates anew for each request to this machine.
ssl.create_default_context = cache(ssl.create_default_context)

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def known_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure no peaks of this processor but where they are tested."""
    tell_peaks(monkeypatch.setattr)


@pytest.fixture
def own_processes() -> None:
    """Let contenders have the processes that they have outside of tests."""


@pytest.fixture(autouse=True)
def contenders_here(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Start no process for a contender but for `own_processes`."""
    if "own_processes" not in request.fixturenames:
        hold_contenders_here(monkeypatch.setattr)
        if measuring := sys.modules.get("export.builders.measuring"):

            def run_fork(command: list[str], **_: object) -> Done:
                return run(*command[1:], cwd=Path.cwd())

            forks = SimpleNamespace(PIPE=None, run=run_fork)
            monkeypatch.setattr(measuring, "subprocess", forks)
    # More threads, which an earlier test's runtime may have opened, sum in another order.
    take_back()
    yield


@pytest.fixture(scope="module", autouse=True)
def garbage_is_searched_for_in_what_is_new() -> None:
    """Leave out the libraries: they take half a second of each search, and measuring has many."""
    gc.freeze()


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw none of a training, which takes longer than an epoch, but where they are looked at."""
    if "training.running.report" in sys.modules:
        monkeypatch.setattr("training.running.run_folder.draw_curves", lambda *_: Path())
        monkeypatch.setattr("training.running.report.draw_confusion", lambda *_: b"")


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
    directory: Path,
    padding: Padding = "symmetric",
    is_fitted: bool = False,
    spec: VariantSpec = VARIANTS["tiny"],
) -> Path:
    """Write a random `tiny` network for the digits; fitted, it knows nine of ten."""
    torch.manual_seed(0)
    samples = list(load_dataset("digits").train)
    images = images_of(samples if is_fitted else samples[:64], TINY_PREPROCESS)
    model = random_network(spec, 10, images[:64], padding)
    if is_fitted:
        fit(model, images, torch.tensor([sample.label for sample in samples]))
    record = CheckpointRecord(
        variant=spec.name,
        architecture=None if spec.name in VARIANTS else spec,
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
            folder.mkdir(exist_ok=True)
            make(folder)
            mark.touch()
    return folder


@pytest.fixture(scope="session", autouse=True)
def graphs_are_exported_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let all tests share what torch's exporter makes of a network: it takes seconds each time."""
    export = torch.onnx.export

    def export_once(network: torch.nn.Module, images: Any, *file: Any, **settings: Any) -> Any:
        import onnx
        import onnx_ir

        if file:
            return export(network, images, *file, **settings)
        key = hashlib.sha256(f"{network} {images[0].shape} {settings}".encode())
        for name, tensor in network.state_dict().items():
            key.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            key.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())

        def make(folder: Path) -> None:
            program = export(network, images, **settings)
            assert program is not None
            onnx.save(program.model_proto, folder / "graph.onnx")

        folder = made_once(tmp_path_factory, f"graph-{key.hexdigest()}", make)
        return torch.onnx.ONNXProgram(onnx_ir.load(folder / "graph.onnx"), None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", export_once)
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        write_tiny_checkpoint(folder / "checkpoint")

    return made_once(tmp_path_factory, "tiny-run", make) / "checkpoint"


def exported(factory: pytest.TempPathFactory, name: str, config: OrtConfig) -> Path:
    """Have ONNX Runtime's artifact of a tiny network made once, into a folder of that name."""
    artifact = Path("tiny") / "onnxruntime-fp32"

    def make(folder: Path) -> None:
        ort.main(replace(config, output=folder / artifact))

    return made_once(factory, name, make) / artifact


@pytest.fixture(scope="session")
def tiny_artifact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory, "tiny-artifacts", OrtConfig(tiny_checkpoint))


@pytest.fixture(scope="session")
def openvino_artifact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    artifact = Path("tiny") / "openvino-fp32"

    def make(folder: Path) -> None:
        ov.main(OpenVinoConfig(tiny_checkpoint, folder / artifact, num_parity_images=64))

    return made_once(tmp_path_factory, "tiny-openvino", make) / artifact


@pytest.fixture(scope="session", autouse=True)
def services_are_forks() -> Iterator[None]:
    """Let services start without the seconds that their imports take; see service_processes.py."""
    names = ("serving.demo", "perf.service_load.load_contenders")
    forks = SimpleNamespace(**{**vars(subprocess), "Popen": start_service})
    with pytest.MonkeyPatch.context() as patch:
        for module in filter(None, map(sys.modules.get, names)):
            patch.setattr(module, "subprocess", forks)
        yield


@pytest.fixture(scope="session")
def service_port(tiny_artifact: Path) -> Iterator[int]:
    """A running service, of which tests may ask what they want, but not that it ends."""
    from serving.demo import running_service

    with running_service(tiny_artifact) as port:
        yield port


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


@pytest.fixture(scope="session")
def fitted_artifact(fitted_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = OrtConfig(fitted_checkpoint, num_parity_images=64)
    return exported(tmp_path_factory, "fitted-artifacts", config)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, driven by Playwright; a test of a page is skipped where one of them is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        pytest.skip("there is no Chromium on this machine")
    # Chromium's sandbox does not start as root, as in most containers.
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """A page at a module's `address`, whose scripts must raise nothing."""
    page = browser.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    yield page
    assert not errors
    page.close()
