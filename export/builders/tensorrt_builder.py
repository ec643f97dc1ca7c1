"""ONNX graph -> engine: the one way through TensorRT 10, TensorRT 11 and TensorRT-RTX.

The network is strongly typed, so precision is what the graph says: 11 knows no other way, and 10
offers it. See tensorrt_library.py for what `Any` stands for.
"""

import json
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import onnx
from tqdm import tqdm

from efficientnet.errors import PipelineError
from efficientnet.formats.artifact import BatchRange
from efficientnet.machine.atomic import write_bytes
from efficientnet.runtimes.tensorrt_library import PACKAGES, logger_of, messages_of
from export.graphs.folding import INPUT_NAME

log = logging.getLogger(__name__)


class TensorRTError(PipelineError):
    """An engine that cannot be built, or not here."""


@dataclass(frozen=True)
class BuildSettings:
    """What the builder is told, beside the graph."""

    optimization_level: int = 3
    """0 to 5: how many kernels are tried; 3 is the library's own default."""
    uses_tf32: bool = True
    """Whether products of float32 may round their factors to 10 bits."""
    timing_cache: Path | None = None
    """File of what kernels took on this GPU; None = none is kept."""
    compute_capabilities: tuple[str, ...] = ()
    """TensorRT-RTX: names in its ComputeCapability; () = what it takes by itself."""


class Engine(NamedTuple):
    """A built engine."""

    data: bytes
    seconds: float
    """What the builder took."""
    log: tuple[str, ...]
    """What it said."""


def build_engine(
    trt: Any,
    graph: onnx.ModelProto,
    profiles: Sequence[BatchRange],
    settings: BuildSettings,
    name: str,
) -> Engine:
    """Build an engine of a graph with the input `images`, float32 [batch, 3, H, W].

    `profiles` are the batch sizes that it gets kernels for; none where the graph's batch is fixed.
    Ctrl-C ends it within a step of the builder's.
    """
    stopping = threading.Event()
    # Python sees Ctrl-C in its main thread only: not while that is inside the builder, for minutes;
    # and in a method that the library calls, its log or a monitor, the exception is swallowed. So
    # the library works in a second thread, and is told at the builder's next step.
    with ThreadPoolExecutor(1) as pool:
        # The thread starts idle: the pool would not wait for one that an interrupt finds starting.
        pool.submit(int).result()
        try:
            built = pool.submit(_build, trt, graph, profiles, settings, name, stopping)
            # An interrupt just before this thread goes to sleep would not wake it.
            while wait([built], timeout=1).not_done:
                pass
            return built.result()
        except KeyboardInterrupt:
            stopping.set()
            raise


def fix_batch(graph: onnx.ModelProto, batch_size: int) -> onnx.ModelProto:
    """Return a copy of a graph that takes one batch size only."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(graph)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch_size
    # What is in between has the old batch in it; the parser finds the shapes by itself.
    del fixed.graph.value_info[:]
    return fixed


def profiles_for(batch: tuple[int, int, int]) -> tuple[BatchRange, ...]:
    """Return the profiles for --batch MIN OPT MAX: the range, and MIN alone.

    Kernels for a range do not know a batch's size, which costs most where batches are small
    (NVIDIA/TensorRT#976 reports a factor of three at one image). So MIN has kernels of its own;
    what that costs is a second copy of the weights in the engine.
    """
    low, opt, high = batch
    whole = BatchRange(min=low, opt=opt, max=high)
    if low == high:
        return (whole,)
    return whole, BatchRange(min=low, opt=low, max=low)


def layers_of(trt: Any, engine: Any) -> object:
    """Ask a loaded engine for its layers: names alone where it was built without details."""
    inspector: Any = engine.create_engine_inspector()
    return json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _build(
    trt: Any,
    graph: onnx.ModelProto,
    profiles: Sequence[BatchRange],
    settings: BuildSettings,
    name: str,
    stopping: threading.Event,
) -> Engine:
    messages = messages_of(trt)
    messages.take()
    builder: Any = trt.Builder(logger_of(trt))
    # Asks for it in 10, changes nothing in 11.
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network: Any = builder.create_network(strongly_typed)
    parser: Any = trt.OnnxParser(network, logger_of(trt))
    if not parser.parse(graph.SerializeToString()):
        raise TensorRTError(_parser_problems(trt, parser, name))
    config: Any = _new_config(trt, builder, settings)
    size = [dim.dim_value for dim in graph.graph.input[0].type.tensor_type.shape.dim[1:]]
    for batch in profiles:
        profile: Any = builder.create_optimization_profile()
        shapes = [(n, *size) for n in (batch.min, batch.opt, batch.max)]
        profile.set_shape(INPUT_NAME, *shapes)
        if config.add_optimization_profile(profile) < 0:
            raise TensorRTError(
                f"{trt.__name__} refuses batches of {batch.min} to {batch.max}: "
                f"{messages.take_problems()}"
            )
    said = messages.take()
    # Cache and monitor are the builder's only as long as they are held here.
    cache: Any = None
    if settings.timing_cache:
        cache = _read_timing_cache(trt, config, settings.timing_cache)
    started = time.perf_counter()
    with tqdm(desc=name, unit="step", disable=None, leave=False) as bar:
        monitor: Any = _new_monitor(trt, bar, stopping)
        config.progress_monitor = monitor
        serialized: Any = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - started
    if serialized is None:
        raise TensorRTError(
            f"{trt.__name__} {trt.__version__} cannot build {name}: {messages.take_problems()}"
        )
    said += messages.take()
    if settings.timing_cache:
        write_bytes(settings.timing_cache, bytes(cache.serialize()))
    summary = f"{name}: {network.num_layers} layers of the graph, {seconds:.1f} s"
    lines = (f"{message.severity} {message.text}" for message in said)
    return Engine(bytes(serialized), seconds, (summary, *lines))


def _new_config(trt: Any, builder: Any, settings: BuildSettings) -> Any:
    config: Any = builder.create_builder_config()
    config.builder_optimization_level = settings.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if trt.__name__ == PACKAGES["tensorrt-rtx"]:
        # Calls that allocate cannot be captured as a CUDA graph.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if not settings.uses_tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if settings.compute_capabilities:
        config.num_compute_capabilities = len(settings.compute_capabilities)
        for index, capability in enumerate(settings.compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, capability), index)
    return config


def _read_timing_cache(trt: Any, config: Any, path: Path) -> Any:
    data = path.read_bytes() if path.is_file() else b""
    cache: Any = config.create_timing_cache(data)
    is_taken = cache is not None and config.set_timing_cache(cache, False)
    # Some versions give an empty cache for one that they cannot read, and say so in the log alone.
    problems = [m for m in messages_of(trt).take() if m.severity != "INFO"]
    said = [m.text for m in problems if "cache" in m.text.lower()]
    if data and (said or not is_taken):
        log.info(
            "%s is not of this version and GPU, it is started anew: %s",
            path,
            "; ".join(said) or "it was refused",
        )
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _new_monitor(trt: Any, bar: "tqdm[NoReturn]", stopping: threading.Event) -> Any:
    class Monitor(trt.IProgressMonitor):
        """Shows the outermost phase as the bar, and the one inside that it is at."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outermost: str | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.outermost = phase_name
                bar.reset(num_steps)
            else:
                bar.set_postfix_str(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name == self.outermost:
                bar.update()
            return not stopping.is_set()

    return Monitor()


def _parser_problems(trt: Any, parser: Any, name: str) -> str:
    lines: list[str] = []
    for index in range(parser.num_errors):
        error: Any = parser.get_error(index)
        lines.append(f"  {error.node_operator()} '{error.node_name()}': {error.desc()}")
    return "\n".join(
        [f"the parser of {trt.__name__} {trt.__version__} refuses the graph of {name}:", *lines]
    )
