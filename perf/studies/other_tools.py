"""A program and images -> the median call in ms, as a tool that others wrote tells it."""

import json
import re
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from efficientnet.errors import PipelineError
from efficientnet.formats.artifact import read_manifest
from efficientnet.machine.children import output_of
from efficientnet.measuring.programs import Program
from efficientnet.runtimes.names import EAGER_RUNTIME, RUNTIMES
from efficientnet.runtimes.openvino_runtime import compile_properties

# All images, and a file for each: benchmark_app takes no more than a batch from a file.
IMAGES_FILE, IMAGES_FOLDER = "images.npy", "images"

# Compiling, or loading torch, on a busy machine.
MAX_REST_S = 300


class ToolError(PipelineError):
    """Another's tool failed, or answered what is not understood."""


class OtherTool(NamedTuple):
    """A way to measure programs of one runtime."""

    name: str
    package: str
    scope: str
    """What a call of it is, where ours is host memory to host memory."""
    median_ms: Callable[[Program, Path, float, int], float]
    """Program, folder with the images, seconds, threads."""

    @property
    def version(self) -> str:
        """Of its package."""
        return metadata.version(self.package)


def tool_of(program: Program) -> OtherTool | str:
    """Return the tool for a program, or why there is none."""
    if program.runtime in TOOLS:
        return TOOLS[program.runtime]
    if program.runtime == "onnxruntime":
        return "onnxruntime's package has no tool that measures (onnxruntime_perf_test is built)"
    return f"nobody else measures the {RUNTIMES[program.runtime].title}"


def benchmark_app(program: Program, folder: Path, seconds: float, num_threads: int) -> float:
    """Run OpenVINO's own tool: synchronous calls, with the properties that our runtime sets."""
    manifest = read_manifest(program.path)
    quantization = manifest.quantization
    precision = quantization.kept_precision if quantization else manifest.precision
    properties = {
        name: "YES" if value is True else value
        for name, value in compile_properties(precision, num_threads).items()
    }
    config = folder / "properties.json"
    config.write_text(json.dumps({"CPU": properties}), encoding="utf-8")
    size = program.preprocess.image_size
    command = [
        *(str(Path(sys.executable).parent / "benchmark_app"), "-d", "CPU", "-api", "sync"),
        *("-m", str(program.path / manifest.program_file), "-shape", f"[1,3,{size},{size}]"),
        *("-hint", "none", "-load_config", str(config), "-t", str(max(1, round(seconds)))),
        *("-i", str(folder / IMAGES_FOLDER), "-ip", "f32", "-inference_only", "False"),
    ]
    text = output_of("benchmark_app", command, ToolError, 3 * seconds + MAX_REST_S)
    # Only one number is kept of what it prints, short times of which are in microseconds.
    found = re.search(r"Median:\s*([\d.]+) ([mu])s", text)
    if found is None:
        raise ToolError(f"benchmark_app told no median, but: {text[-300:]}")
    return float(found[1]) / (1000 if found[2] == "u" else 1)


def torch_benchmark(program: Program, folder: Path, seconds: float, num_threads: int) -> float:
    """Run torch.utils.benchmark on the eager model; see torch_timer.py."""
    arguments = [str(program.path), str(folder / IMAGES_FILE), str(seconds), str(num_threads)]
    command = [sys.executable, "-P", "-m", "perf.studies.torch_timer", *arguments]
    text = output_of("torch.utils.benchmark", command, ToolError, 3 * seconds + MAX_REST_S)
    return float(text.splitlines()[-1])


TOOLS = {
    "openvino": OtherTool(
        "benchmark_app",
        "openvino",
        "the call inside the library, of inputs that lie ready",
        benchmark_app,
    ),
    EAGER_RUNTIME: OtherTool(
        "torch.utils.benchmark", "torch", "a tensor in, a tensor out", torch_benchmark
    ),
}
