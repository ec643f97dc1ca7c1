"""A variant -> artifacts of the export commands, measured beside the eager model."""

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from efficientnet import PROJECT_ROOT
from efficientnet.errors import PipelineError
from efficientnet.formats.artifact import read_artifact, read_program
from efficientnet.formats.checkpoint import save_checkpoint
from efficientnet.runtimes import open_runtime
from efficientnet.runtimes.aoti_runtime import load_package
from efficientnet.runtimes.cuda_graphs import cudnn_as_compiled
from perf.device_parts import networks, turns
from perf.device_parts.config import Part
from perf.device_parts.gpu_watch import GpuWatch
from perf.device_parts.network_case import NUM_PARITY_IMAGES, Scene
from perf.device_parts.plan import Order
from perf.device_parts.records import Line, Region

HOST: Region = "host to host"

COMMANDS: dict[Part, tuple[str, ...]] = {
    "aoti": ("export/aoti.py", "--device", "cuda"),
    "onnxruntime": ("export/ort.py", "--provider", "cuda"),
    "tensorrt": ("export/trt.py",),
    "tensorrt-rtx": ("export/trt.py", "--flavor", "rtx"),
}
DRY_COMMANDS: dict[Part, tuple[str, ...]] = {
    "aoti": ("export/aoti.py", "--device", "cpu"),
    "onnxruntime": ("export/ort.py",),
}
METHODS: dict[Part, str] = {
    "aoti": "AOTInductor, Triton squeeze-excite",
    "onnxruntime": "ONNX Runtime CUDA",
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT-RTX",
}
DRY_METHODS: dict[Part, str] = {"aoti": "AOTInductor (CPU)", "onnxruntime": "ONNX Runtime (CPU)"}
# Others have no convolutions of them.
PRECISIONS_OF: dict[Part, tuple[str, ...]] = {"onnxruntime": ("fp16", "fp32")}

log = logging.getLogger(__name__)


class ExportFailedError(PipelineError):
    """An export command that has failed; its message is the command's last line."""


def measure_exports(
    order: Order, scene: Scene, watch: GpuWatch, earlier: list[Line]
) -> Iterator[Line]:
    """Export precision by precision and batch by batch, the paper's first, and measure each."""
    method = (DRY_METHODS if order.is_dry_run else METHODS)[order.part]
    done = networks.cases_done(order.job, earlier)
    scratch = Path(order.scratch)
    checkpoint = scratch / f"{order.part}-{scene.variant}" / "checkpoint"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(checkpoint, scene.network.state_dict(), scene.record(), train_state=None)
    # No CPU need be tried in formats that it may not compute in.
    precisions = (
        ("fp32",) if order.is_dry_run else PRECISIONS_OF.get(order.part, networks.PRECISIONS)
    )
    for precision in precisions:
        best = networks.known_best(earlier, scene.variant, precision, order.is_dry_run)
        cases = networks.cases_of(precision, best, order.is_dry_run)
        # A program of AOTInductor takes most of a minute: a dry run makes one.
        for case in cases[: 1 if order.is_dry_run else None]:
            if (precision, case.batch_size, method) in done:
                continue
            output = checkpoint.with_name(f"{precision}-{case.batch_size}")
            try:
                export(order, checkpoint, output, case)
            except ExportFailedError as error:
                yield turns.unmeasured(order.job, scene, case, method, HOST, str(error))
                continue
            pace = turns.DRY_PACE if order.is_dry_run else turns.PACE
            contenders = _contenders(order, scene, case, method, output)
            yield from turns.compare(order.job, scene, case, contenders, pace, watch)
            turns.free_memory()


def export(order: Order, checkpoint: Path, output: Path, case: turns.Case) -> None:
    """Run the export command."""
    words = (DRY_COMMANDS if order.is_dry_run else COMMANDS)[order.part]
    size = str(case.batch_size)
    command = [sys.executable, *words, "--checkpoint", str(checkpoint), "--output", str(output)]
    command += ["--precision", case.precision, "--batches", size]
    command += ["--num-parity-images", str(NUM_PARITY_IMAGES)]
    log.info("%s", " ".join(command[1:]))
    done = subprocess.run(
        command, cwd=PROJECT_ROOT, stderr=subprocess.PIPE, text=True, errors="replace", check=False
    )
    sys.stderr.write(done.stderr)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ExportFailedError(f"{words[0]} failed: {lines[-1].removeprefix('error: ')[:400]}")


def _contenders(
    order: Order, scene: Scene, case: turns.Case, method: str, artifact: Path
) -> list[turns.Contender]:
    program = scene.program(case.precision)
    contenders = [
        turns.Contender(
            turns.EAGER, HOST, lambda: partial(_eager_from_host, program, scene.device)
        ),
        turns.Contender(method, HOST, lambda: open_runtime(artifact).infer, _as_exported(case)),
    ]
    if order.part != "aoti":
        return contenders
    shape = (case.batch_size, *scene.images.shape[1:])
    is_captured = scene.device.type == "cuda"
    contenders += [
        networks.eager(scene, case.precision, program),
        turns.Contender(
            method, networks.DEVICE, lambda: _load(artifact, is_captured), _as_exported(case)
        ),
    ]
    if is_captured:
        contenders.append(
            turns.Contender(
                f"{method}, CUDA graph",
                networks.DEVICE,
                lambda: networks.captured(_load(artifact, True), scene.images.new_empty(shape)),
                _as_exported(case),
            )
        )
    return contenders


def _as_exported(case: turns.Case) -> Callable[[], AbstractContextManager[object]]:
    return lambda: cudnn_as_compiled(case.precision)


def _load(artifact: Path, is_captured: bool) -> Callable[[Tensor], Tensor]:
    manifest = read_artifact(artifact)
    return load_package(read_program(artifact, manifest, manifest.program_file), is_captured)


def _eager_from_host(
    program: Callable[[Tensor], Tensor], device: torch.device, images: NDArray[np.float32]
) -> NDArray[np.float32]:
    return program(torch.from_numpy(images).to(device)).cpu().numpy()
