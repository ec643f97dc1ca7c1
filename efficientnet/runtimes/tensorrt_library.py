"""TensorRT's and TensorRT-RTX's Python package: its import, its log, its engines' files.

It comes without type information: here, in tensorrt_runtime.py and in export/builders/tensorrt_*.py
`Any` stands for its modules and objects, and for nothing else; tests/tensorrt_names.txt lists all
that is used of them.
"""

import importlib
from collections import deque
from functools import cache
from typing import Any, NamedTuple

from efficientnet.formats.artifact import ArtifactError, Binding, ProgramFile

# Runtime's name -> Python package.
PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}

PROBLEMS = ("INTERNAL_ERROR", "ERROR")

# Of what is said at the lowest level, which is a thousand times more than the rest: the layers that
# a builder has made, with the number formats that they compute in.
LAYER_LISTS = ("Layers:", "Engine Layer Information:")

MAX_MESSAGES = 10_000


class Message(NamedTuple):
    """What a library said in its log."""

    severity: str
    """VERBOSE, INFO, WARNING, ERROR or INTERNAL_ERROR."""
    text: str


class Messages:
    """The newest of what a library has said since it was last asked for."""

    def __init__(self) -> None:
        self._kept: deque[Message] = deque(maxlen=MAX_MESSAGES)

    def add(self, message: Message) -> None:
        """Keep a message, unless it is one of the many that nobody reads."""
        if message.severity != "VERBOSE" or message.text.startswith(LAYER_LISTS):
            self._kept.append(message)

    def take(self) -> list[Message]:
        """Return what there is and forget it."""
        taken = list(self._kept)
        self._kept.clear()
        return taken

    def take_problems(self) -> str:
        """Return the errors in one line, and forget all else."""
        texts = dict.fromkeys(m.text for m in self.take() if m.severity in PROBLEMS)
        return "; ".join(texts) or "it gives no reason"


def import_package(runtime: str) -> Any:
    """Import the package of a runtime."""
    return importlib.import_module(PACKAGES[runtime])


def deserialize(trt: Any, file: ProgramFile, binding: Binding | None) -> Any:
    """Load an engine."""
    messages = messages_of(trt)
    messages.take()
    runtime: Any = trt.Runtime(logger_of(trt))
    engine: Any = runtime.deserialize_cuda_engine(file.data)
    if engine is None:
        raise ArtifactError(
            f"{trt.__name__} {trt.__version__} refuses {file.path}: {messages.take_problems()}; "
            f"make it again: {binding.rebuild if binding else 'python export/trt.py'}"
        )
    return engine


@cache
def _collector(trt: Any) -> tuple[Any, Messages]:
    # A library keeps the first logger that it is given for the whole process.
    messages = Messages()

    class Collector(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            messages.add(Message(severity.name, msg))

    return Collector(), messages


def logger_of(trt: Any) -> Any:
    """Return the logger that all objects of a library get."""
    return _collector(trt)[0]


def messages_of(trt: Any) -> Messages:
    """Return what a library says."""
    return _collector(trt)[1]
