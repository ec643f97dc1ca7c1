"""A variant -> artifacts of the export commands, measured beside the eager model."""

import logging
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from efficientnet import PROJECT_ROOT
from efficientnet.errors import PipelineError
from efficientnet.formats.artifact import read_artifact, read_program
from efficientnet.formats.checkpoint import save_checkpoint
from efficientnet.machine.children import output_of
from efficientnet.runtimes import open_runtime
from efficientnet.runtimes.aoti_runtime import load_package
from efficientnet.runtimes.cuda_graphs import cudnn_as_compiled
from perf.device_parts import networks, turns
from perf.device_parts.config import Part
from perf.device_parts.network_case import NUM_PARITY_IMAGES
from perf.device_parts.records import LatencyMeasured

log = logging.getLogger(__name__)


class Export(NamedTuple):
    """A command, and the name of what it makes."""

    method: str
    command: tuple[str, ...]
    precisions: tuple[str, ...] = networks.PRECISIONS


EXPORTS: dict[Part, Export] = {
    "aoti": Export("AOTInductor, Triton squeeze-excite", ("export/aoti.py", "--device", "cuda")),
    # It has no convolutions in bf16.
    "onnxruntime": Export(
        "ONNX Runtime CUDA", ("export/ort.py", "--provider", "cuda"), ("fp16", "fp32")
    ),
    "tensorrt": Export("TensorRT", ("export/trt.py",)),
    "tensorrt-rtx": Export("TensorRT-RTX", ("export/trt.py", "--flavor", "rtx")),
}
# No CPU need be tried in formats that it may not compute in.
DRY_EXPORTS: dict[Part, Export] = {
    "aoti": Export("AOTInductor (CPU)", ("export/aoti.py", "--device", "cpu"), ("fp32",)),
    "onnxruntime": Export("ONNX Runtime (CPU)", ("export/ort.py",), ("fp32",)),
}


class ExportFailedError(PipelineError):
    """An export command that has failed; its message is the command's last line."""


def measure_exports(bench: turns.Bench) -> Iterator[LatencyMeasured]:
    """Export precision by precision and batch by batch, the paper's first, and measure each."""
    order, scene = bench.order, bench.scene
    export = (DRY_EXPORTS if order.is_dry_run else EXPORTS)[order.part]
    checkpoint = Path(order.scratch) / f"{order.part}-{scene.variant}" / "checkpoint"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(checkpoint, scene.network.state_dict(), scene.record(), train_state=None)
    for precision in export.precisions:
        # A program of AOTInductor takes most of a minute: a dry run makes one.
        for case in networks.cases_of(bench, precision)[: 1 if order.is_dry_run else None]:
            if networks.is_done(bench, case, export.method):
                continue
            output = checkpoint.with_name(f"{precision}-{case.batch_size}")
            try:
                run_export(export, checkpoint, output, case)
            except ExportFailedError as error:
                yield turns.unmeasured(bench, case, export.method, turns.HOST, str(error)[:400])
                continue
            yield from turns.compare(bench, case, _contenders(bench, case, export.method, output))
            turns.free_memory()


def run_export(export: Export, checkpoint: Path, output: Path, case: turns.Case) -> None:
    """Run the export command."""
    command = [*export.command, "--checkpoint", str(checkpoint), "--output", str(output)]
    command += ["--precision", case.precision, "--batches", str(case.batch_size)]
    command += ["--num-parity-images", str(NUM_PARITY_IMAGES)]
    log.info("%s", " ".join(command))
    output_of(command[0], [sys.executable, *command], ExportFailedError, cwd=PROJECT_ROOT)


def _contenders(
    bench: turns.Bench, case: turns.Case, method: str, artifact: Path
) -> list[turns.Contender]:
    scene = bench.scene
    program = scene.program(case.precision)
    is_captured = scene.device.type == "cuda"
    settings = partial(cudnn_as_compiled, case.precision)

    def eager_from_host(images: NDArray[np.float32]) -> NDArray[np.float32]:
        return program(torch.from_numpy(images).to(scene.device)).cpu().numpy()

    def load() -> Callable[[Tensor], Tensor]:
        manifest = read_artifact(artifact)
        return load_package(read_program(artifact, manifest, manifest.program_file), is_captured)

    contenders = [
        turns.Contender(turns.EAGER, turns.HOST, lambda: eager_from_host),
        turns.Contender(method, turns.HOST, lambda: open_runtime(artifact).infer, settings),
    ]
    if bench.order.part == "aoti":
        contenders.append(networks.eager(program))
        contenders.append(turns.Contender(method, turns.DEVICE, load, settings))
    if bench.order.part == "aoti" and is_captured:

        def graph() -> Callable[[Tensor], Tensor]:
            return networks.captured(load(), scene.images, case.batch_size)

        name = f"{method}, CUDA graph"
        contenders.append(turns.Contender(name, turns.DEVICE, graph, settings))
    return contenders
