"""The native engine's shared library, through ctypes: a program file -> an engine that answers."""

import ctypes
import os
from functools import cache
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efficientnet.formats.artifact import ArtifactError

# What build.py makes, which serving does not import.
LIBRARY = Path(__file__).with_name("_engine.so")

PORTABLE = "portable"

MAX_THREADS = 64

_ERROR_BYTES = 1024
_KEEP_TENSORS, _KEEP_TIMES, _TAKE_PROGRAM = 1, 2, 4
_MAP_TYPES = {0: np.dtype(np.uint8), 1: np.dtype("<u2")}


@cache
def load_library(path: Path = LIBRARY) -> ctypes.CDLL:
    """Load the library."""
    hint = "'python -m efficientnet.runtimes.native.build' builds it with g++ (apt-get install g++)"
    if not path.is_file():
        raise ArtifactError(
            f"the native engine was not built: there is no {path.name} in {path.parent}, as there "
            f"was no C++ compiler when the project was installed; {hint}"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ArtifactError(f"the native engine cannot be loaded ({error}); {hint}") from error
    pointer, number, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    error = (text, ctypes.c_size_t)
    for name, result, arguments in (
        ("levels", text, ()),
        ("open", pointer, (text, ctypes.c_size_t, text, number, number, number, *error)),
        ("infer", number, (pointer, pointer, number, number, number, pointer, *error)),
        ("read_tensor", number, (pointer, number, pointer, ctypes.c_size_t, *error)),
        ("layer_times", number, (pointer, pointer, number)),
        ("info", None, (pointer, pointer)),
        ("level", text, (pointer,)),
        ("peak", ctypes.c_double, (text, number, ctypes.POINTER(ctypes.c_double))),
        ("close", None, (pointer,)),
    ):
        function = getattr(library, f"engine_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def levels(library: Path = LIBRARY) -> tuple[str, ...]:
    """Name the sets of kernels that run on this processor, best first; the last is portable."""
    return tuple(load_library(library).engine_levels().decode().split())


class Engine:
    """An opened program. Calls from several threads take turns."""

    def __init__(
        self,
        program: str | Path | bytes | mmap,
        num_threads: int = 1,
        max_batch_size: int = 1,
        level: str | None = None,
        keeps_tensors: bool = False,
        keeps_times: bool = False,
        library: Path = LIBRARY,
    ) -> None:
        """Open a program.

        Args:
            program: its file or the bytes of that, which are not needed afterwards; private pages
                (formats.artifact.read_pages) are given back while they are worked through.
            num_threads: of a call; more than 64 are not used.
            max_batch_size: most images of a call.
            level: of levels(); None = the first, even where that is the portable one.
            keeps_tensors: whether each layer runs by itself and its map can be read.
            keeps_times: whether the times of layers can be read.
            library: the engine.

        Raises:
            ArtifactError: the file is damaged or not there, or the level is not there.
        """
        self._handle = None
        self._library: Any = load_library(library)
        self._process = os.getpid()
        data = _read(Path(program)) if isinstance(program, (str, Path)) else program
        takes_program = isinstance(data, mmap)
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        self._handle = self._library.engine_open(
            (ctypes.c_char * len(data)).from_buffer(data) if takes_program else data,
            len(data),
            (level or levels(library)[0]).encode(),
            min(num_threads, MAX_THREADS),
            max_batch_size,
            _KEEP_TENSORS * keeps_tensors
            | _KEEP_TIMES * keeps_times
            | _TAKE_PROGRAM * takes_program,
            error,
            len(error),
        )
        if not self._handle:
            raise ArtifactError(error.value.decode(errors="replace"))
        info = (ctypes.c_int * 8)()
        self._library.engine_info(self._handle, info)
        height, width, self.num_classes, self.num_tensors, self.num_layers = info[:5]
        self.image_shape = (height, width)
        self.num_threads = info[5]
        self.level: str = self._library.engine_level(self._handle).decode()

    def infer(self, images: NDArray[Any], is_alone: bool = True) -> NDArray[np.float32]:
        """Map float32 [N, 3, H, W], or pixels uint8 [N, H, W, 3], to logits [N, num_classes].

        Not in a fork of the process that opened the program. Where the call is not alone, other
        work wants the processor's cores: then no two threads share an image.
        """
        is_pixels = images.dtype == np.uint8
        height, width = self.image_shape
        expected = (height, width, 3) if is_pixels else (3, height, width)
        if images.dtype not in (np.uint8, np.float32) or images.shape[1:] != expected:
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}, expected float32 "
                f"[N, 3, {height}, {width}] or uint8 [N, {height}, {width}, 3]"
            )
        images = np.ascontiguousarray(images)
        logits = np.empty((len(images), self.num_classes), np.float32)
        self._call(
            "infer", images.ctypes.data, is_pixels, len(images), is_alone, logits.ctypes.data
        )
        return logits

    def read_tensor(self, index: int, tensor: Any) -> NDArray[Any]:
        """Return a map of the last image: uint8 or the bits of bfloat16, [H, W, C].

        `index` is its place in the program's list of tensors, `tensor` its record there.
        """
        shape = tuple(int(tensor[side]) for side in ("height", "width", "channels"))
        values = np.empty(shape, _MAP_TYPES[int(tensor["dtype"])])
        self._call("read_tensor", index, values.ctypes.data, values.nbytes)
        return values

    def layer_times(self) -> list[float]:
        """Return the seconds that each layer of the last image took.

        0 for layers that were computed together with a later one.
        """
        seconds = (ctypes.c_double * self.num_layers)()
        failed = self._library.engine_layer_times(self._handle, seconds, self.num_layers)
        assert not failed
        return list(seconds)

    def close(self) -> None:
        """Give threads and memory back."""
        # Threads do not come along when a process forks: there is nothing to end in the child.
        if self._handle and os.getpid() == self._process:
            self._library.engine_close(self._handle)
        self._handle = None

    def __del__(self) -> None:
        self.close()

    def _call(self, name: str, *arguments: Any) -> None:
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        function = getattr(self._library, f"engine_{name}")
        if function(self._handle, *arguments, error, len(error)):
            text = error.value.decode(errors="replace")
            raise (ArtifactError if os.getpid() != self._process else ValueError)(text)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
