"""Layers with their weights <-> the native engine's program file, as docs/native.md lists it."""

from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC, VERSION = b"EFFNATIV", 1
ALIGNMENT = 64

HEADER = np.dtype(
    [("magic", "S8")]
    + [(name, "<u4") for name in ("version", "num_tensors", "num_layers", "num_classes")]
    + [(f"{name}_offset", "<u8") for name in ("tensors", "layers", "blob")]
    + [("blob_bytes", "<u8"), ("zero", "<u8")]
)
TENSOR = np.dtype(
    [(name, "<i4") for name in ("height", "width", "channels", "dtype")]
    + [("scale", "<f4"), ("zero_point", "<i4"), ("zero", "<i8")]
)
ARRAYS = (
    *("weights", "bias", "scales", "table"),
    *("squeeze_weights", "squeeze_bias", "excite_weights", "excite_bias"),
)
LAYER = np.dtype(
    [(name, "<i4") for name in ("kind", "input", "residual", "output")]
    + [(name, "<i4") for name in ("kernel", "stride", "pad_top", "pad_left")]
    + [(name, "<i4") for name in ("activation", "fraction_bits", "output_offset")]
    + [(name, "<i4") for name in ("residual_multiplier", "squeeze_channels")]
    + [("multiplier", "<f4"), ("mean_multiplier", "<f4"), ("zero", "<i4")]
    + [(name, "<i8") for name in ARRAYS]
    + [("zeros", "<i8", 4)]
)


class Kind(IntEnum):
    """What a layer computes."""

    INPUT = 0
    CONV = 1
    DEPTHWISE = 2
    SQUEEZE_EXCITE = 3
    CONVERT = 4
    CLASSIFIER = 5


class DType(IntEnum):
    """Of a map."""

    U8 = 0
    BF16 = 1


class Activation(IntEnum):
    """What follows a convolution."""

    NONE = 0
    SILU = 1
    RELU6 = 2


class Program:
    """Collects the tensors, layers and arrays of a network, in the order in which they run."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.tensors: list[NDArray[np.void]] = []
        self.layers: list[NDArray[np.void]] = []
        self._blob = bytearray()

    def add_tensor(
        self, shape: tuple[int, int, int], dtype: DType, scale: float = 0.0, zero_point: int = 0
    ) -> int:
        """Add a map of a shape (height, width, channels); return its number."""
        self.tensors.append(np.array((*shape, dtype, scale, zero_point, 0), TENSOR))
        return len(self.tensors) - 1

    def add_layer(self, kind: Kind, **fields: Any) -> None:
        """Add a layer; arrays are given as such, and what is left out is absent or zero."""
        record = np.zeros((), LAYER)
        for name in ("input", "residual", "output", *ARRAYS):
            record[name] = -1
        record["kind"] = kind
        for name, value in fields.items():
            record[name] = self._store(value) if name in ARRAYS else value
        self.layers.append(record)

    @property
    def array_bytes(self) -> int:
        """Bytes of weights, scales and tables."""
        return len(self._blob)

    def write(self, path: Path) -> None:
        """Write the file."""
        tensors, layers = np.array(self.tensors, TENSOR), np.array(self.layers, LAYER)
        layers_offset = _aligned(HEADER.itemsize + tensors.nbytes)
        blob_offset = _aligned(layers_offset + layers.nbytes)
        header = np.zeros((), HEADER)
        header["magic"], header["version"] = MAGIC, VERSION
        header["num_tensors"], header["num_layers"] = len(tensors), len(layers)
        header["num_classes"] = self.num_classes
        header["tensors_offset"], header["layers_offset"] = HEADER.itemsize, layers_offset
        header["blob_offset"], header["blob_bytes"] = blob_offset, len(self._blob)
        content = bytearray(blob_offset)
        for offset, array in ((0, header), (HEADER.itemsize, tensors), (layers_offset, layers)):
            content[offset : offset + array.nbytes] = array.tobytes()
        path.write_bytes(content + self._blob)

    def _store(self, array: NDArray[Any]) -> int:
        offset = _aligned(len(self._blob))
        self._blob.extend(bytes(offset - len(self._blob)) + array.tobytes())
        return offset


@dataclass(frozen=True)
class ProgramView:
    """A program file's records, and its arrays by offset."""

    num_classes: int
    tensors: NDArray[np.void]
    layers: NDArray[np.void]
    blob: bytes = field(repr=False)

    def array(self, offset: int, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """Return an array of the blob; not to be written to."""
        count = int(np.prod(shape))
        return np.frombuffer(self.blob, dtype, count, int(offset)).reshape(shape)


def read_program_file(path: Path) -> ProgramView:
    """Read a file that write made; the engine, and not this, checks what others made."""
    data = path.read_bytes()
    (header,) = np.frombuffer(data, HEADER, 1)
    return ProgramView(
        int(header["num_classes"]),
        np.frombuffer(data, TENSOR, header["num_tensors"], header["tensors_offset"]),
        np.frombuffer(data, LAYER, header["num_layers"], header["layers_offset"]),
        data[int(header["blob_offset"]) :],
    )


def to_bf16(values: NDArray[np.floating]) -> NDArray[np.uint16]:
    """Round finite float32 to bfloat16, to nearest even; numpy has no such type."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(values: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Widen bfloat16 to float32."""
    return (values.astype(np.uint32) << 16).view(np.float32)


def real_values(values: NDArray[Any], tensor: Any) -> NDArray[np.float32]:
    """Return what a map's bytes stand for, by its record."""
    if tensor["dtype"] == DType.BF16:
        return from_bf16(values)
    return (values.astype(np.float32) - float(tensor["zero_point"])) * tensor["scale"]


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
