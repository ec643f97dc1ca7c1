"""Bodies of the open inference protocol <-> arrays: JSON, and bytes behind the JSON.

The protocol: https://github.com/kserve/open-inference-protocol; the bytes are its extension
binary_tensor_data (Triton's docs/protocol/extension_binary_data.md).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from efficientnet.errors import first_problem
from serving.refusals import Refusal, printable

HEADER_LENGTH = "Inference-Header-Content-Length"

DATATYPE = "FP32"
BYTES_PER_VALUE = 4

# What a request may ask for beside its values, and would wait for in vain.
UNKNOWN_PARAMETERS = ("classification", "sequence_id", "shared_memory_region")

Parameters = dict[str, bool | int | float | str]


class _Body(BaseModel):
    # More than the protocol names is let through, as clients of later versions send it.
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class InputTensor(_Body):
    """Preprocessed images."""

    name: str
    datatype: str
    """FP32."""
    shape: tuple[int, ...]
    """Images, channels, height, width."""
    parameters: Parameters = {}
    """binary_data_size: bytes of this tensor behind the JSON."""
    data: Any = None
    """Numbers, in a list or in lists of lists; none where there are bytes."""


class WantedOutput(_Body):
    """What is asked for."""

    name: str
    parameters: Parameters = {}
    """binary_data: whether it comes as bytes behind the JSON."""


class InferRequest(_Body):
    """Images for the network."""

    id: str | None = None
    """Given back."""
    parameters: Parameters = {}
    """binary_data_output: whether all outputs come as bytes."""
    inputs: tuple[InputTensor, ...] = Field(min_length=1)
    outputs: tuple[WantedOutput, ...] | None = None
    """None = all."""


class OutputTensor(_Body):
    """Logits."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    """Images, classes."""
    parameters: Parameters | None = None
    data: list[float] | None = None
    """Row by row; none where there are bytes."""


class InferResponse(_Body):
    """Answer of the network."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: tuple[OutputTensor, ...]


def refuse(sentence: str) -> Refusal:
    """Make the answer to a request that the protocol, or the model, does not know."""
    return Refusal("invalid_request", sentence)


def split_body(body: bytes, header_length: str | None) -> tuple[bytes, bytes]:
    """Separate the JSON from the bytes behind it.

    Args:
        body: of the request.
        header_length: bytes of JSON, as the header says; None = all.

    Raises:
        Refusal: no such number.
    """
    if header_length is None:
        return body, b""
    length = int(header_length) if header_length.isdecimal() and len(header_length) < 12 else -1
    if not 0 < length <= len(body):
        raise refuse(
            f"{HEADER_LENGTH} is '{printable(header_length, 40)}', expected a number of bytes up "
            f"to the {len(body)} of the body"
        )
    return body[:length], body[length:]


def parse(text: bytes, max_values: int) -> InferRequest:
    """Read the JSON.

    Args:
        text: JSON.
        max_values: of all tensors together; more are refused before anything is made of them.

    Raises:
        Refusal: not this JSON, or too many values.
    """
    # A list takes up to thirty times the memory of its text; a value more is a comma more.
    num_commas = text.count(b",")
    if num_commas > max_values + len(InferRequest.model_fields) * 100:
        raise refuse(
            f"the JSON holds about {num_commas} values, more than the {max_values} of the most "
            "images that a request may hold; send fewer"
        )
    try:
        return InferRequest.model_validate_json(text)
    except ValidationError as error:
        raise refuse(f"the JSON is no request: {printable(first_problem(error))}") from None


def read_images(
    request: InferRequest, extra: bytes, input_name: str, image_shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """Return the images that a request holds, float32 [N, *image_shape].

    Args:
        request: the JSON.
        extra: the bytes behind it.
        input_name: of the network.
        image_shape: of one image.

    Raises:
        Refusal: another tensor than the network takes, or other values than its shape says.
    """
    _require_known(request.parameters)
    if len(request.inputs) != 1 or request.inputs[0].name != input_name:
        found = ", ".join(printable(tensor.name, 40) for tensor in request.inputs[:5])
        raise refuse(f"the inputs are '{found}', expected '{input_name}' alone")
    (tensor,) = request.inputs
    _require_known(tensor.parameters)
    expected = ", ".join(map(str, image_shape))
    if tensor.datatype != DATATYPE or tensor.shape[1:] != image_shape or tensor.shape[0] < 1:
        found = f"{printable(tensor.datatype, 20)} {list(tensor.shape[:8])}"
        raise refuse(f"the input is {found}, expected {DATATYPE} [images, {expected}]")
    num_values = int(np.prod(tensor.shape, dtype=object))
    num_bytes = tensor.parameters.get("binary_data_size")
    if num_bytes is None:
        if extra:
            raise refuse(f"{len(extra)} bytes follow the JSON, and no input has binary_data_size")
        values = _from_json(tensor.data)
    else:
        if tensor.data is not None:
            raise refuse("the input has both data and binary_data_size, expected one of them")
        if num_bytes != len(extra) or num_bytes != num_values * BYTES_PER_VALUE:
            raise refuse(
                f"binary_data_size is {num_bytes} and {len(extra)} bytes follow the JSON, expected "
                f"{num_values * BYTES_PER_VALUE} for the shape {list(tensor.shape)}"
            )
        values = np.frombuffer(extra, "<f4")
    if values.size != num_values:
        raise refuse(
            f"the input has {values.size} values, expected {num_values} for the shape "
            f"{list(tensor.shape)}"
        )
    images = values.reshape(tensor.shape).astype(np.float32, copy=False)
    # In a call with others they would make it fail for all.
    if not np.isfinite(images).all():
        raise refuse("the input has values that are NaN or infinite: no answer would mean anything")
    return images


def write_response(
    request: InferRequest, logits: NDArray[np.float32], response: InferResponse
) -> tuple[bytes, int | None]:
    """Return the body, and how many bytes of it are JSON; None = all, there is nothing else.

    Args:
        request: says in which form it wants the logits.
        logits: [N, classes].
        response: without outputs' values.

    Raises:
        Refusal: an output that there is not.
    """
    (output,) = response.outputs
    is_binary = request.parameters.get("binary_data_output") is True
    for wanted in request.outputs or ():
        if wanted.name != output.name:
            raise refuse(
                f"there is no output '{printable(wanted.name, 40)}', expected '{output.name}'"
            )
        _require_known(wanted.parameters)
        is_binary = wanted.parameters.get("binary_data", is_binary) is True
    if is_binary:
        data = np.ascontiguousarray(logits, "<f4").tobytes()
        output = output.model_copy(update={"parameters": {"binary_data_size": len(data)}})
    else:
        data = b""
        output = output.model_copy(update={"data": logits.ravel().tolist()})
    answer = response.model_copy(update={"outputs": (output,)})
    text = answer.model_dump_json(exclude_none=True).encode()
    return text + data, len(text) if is_binary else None


def _require_known(parameters: Parameters) -> None:
    for name in UNKNOWN_PARAMETERS:
        # What is false, 0 or empty asks for nothing.
        if parameters.get(name):
            raise refuse(f"the parameter {name} is not known here; see the extensions in /v2")


def _from_json(data: Any) -> NDArray[np.float32]:
    try:
        values = np.asarray(data)
    except ValueError:  # lists of several lengths
        values = np.asarray(None)
    if values.dtype.kind not in "iuf":
        raise refuse(
            "the data are no numbers in lists of equal length; for bytes behind the JSON give "
            f"binary_data_size and the header {HEADER_LENGTH}"
        )
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        return values.astype(np.float32).ravel()
