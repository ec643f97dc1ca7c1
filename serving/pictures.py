"""Request bodies -> picture files and top_k: a form, or one picture as the body itself.

Above a megabyte a body lies in a file in the temporary folder until it is worked on.
"""

import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from tempfile import SpooledTemporaryFile
from typing import Any, BinaryIO, cast

from starlette.datastructures import UploadFile
from starlette.requests import Request

from serving.refusals import Refusal, printable
from serving.uploads import CLASSIFY, CLASSIFY_BATCH, how_to_send

SPOOLED_BYTES = 1_000_000

COUNT = re.compile(r"0*[1-9][0-9]*")
# More digits are as good as these: no network has so many classes.
MAX_DIGITS = 18


@dataclass(frozen=True)
class Pictures:
    """What a request holds."""

    files: tuple[UploadFile, ...]
    top_k: int | None
    """None where the request does not say."""


@asynccontextmanager
async def read_picture(request: Request) -> AsyncGenerator[Pictures]:
    """Give one picture: the field `image` of a form, or the body if its type is an image's.

    Raises:
        Refusal: none, several, or a wrong field.
    """
    if request.headers.get("content-type", "").lower().startswith("image/"):
        async with read_body(request) as body:
            yield Pictures((body,), _top_k(request, None))
        return
    async with _read_form(request, "image") as found:
        if len(found.files) > 1:
            raise Refusal(
                "several_pictures",
                f"the form holds {len(found.files)} pictures, expected one; send several to "
                f"{CLASSIFY_BATCH}",
            )
        yield found


@asynccontextmanager
async def read_pictures(request: Request, max_pictures: int) -> AsyncGenerator[Pictures]:
    """Give the fields `images` of a form, in their order.

    Raises:
        Refusal: none, too many, or a wrong field.
    """
    async with _read_form(request, "images") as found:
        if len(found.files) > max_pictures:
            raise Refusal(
                "too_many_pictures",
                f"the form holds {len(found.files)} pictures, expected at most {max_pictures}; "
                "send the others in another request",
            )
        yield found


@asynccontextmanager
async def read_body(request: Request) -> AsyncGenerator[UploadFile]:
    """Give a whole body that is no form."""
    body = UploadFile(cast(BinaryIO, SpooledTemporaryFile(SPOOLED_BYTES)), size=0)  # noqa: SIM115
    try:
        async for part in request.stream():
            await body.write(part)
        await body.seek(0)
        yield body
    finally:
        await body.close()


@asynccontextmanager
async def _read_form(request: Request, field: str) -> AsyncGenerator[Pictures]:
    async with request.form() as form:
        how = how_to_send(request.scope["path"])
        values: list[Any] = form.getlist(field)
        if not values:
            raise Refusal("invalid_field", f"the field '{field}' is missing; {how}")
        if not all(isinstance(value, UploadFile) for value in values):
            raise Refusal(
                "invalid_field", f"the field '{field}' is text, expected a picture file; {how}"
            )
        yield Pictures(tuple(values), _top_k(request, form.get("top_k")))


def _top_k(request: Request, of_form: Any) -> int | None:
    # A browser sends a field that was left empty.
    in_form = None if of_form in (None, "") else _count("top_k", of_form)
    of_address = request.query_params.get("top_k")
    in_address = None if of_address is None else _count("top_k", of_address)
    return in_form or in_address


def _count(name: str, value: Any) -> int:
    if not isinstance(value, str) or not COUNT.fullmatch(value):
        found = printable(value, 40) if isinstance(value, str) else "a file"
        raise Refusal(
            "invalid_field", f"{name} is '{found}', expected a whole number of at least 1"
        )
    digits = value.lstrip("0")
    return int(digits) if len(digits) <= MAX_DIGITS else 10**MAX_DIGITS


# What OpenAPI says of both; they read the request themselves, so that a picture may be the body.
TOP_K: dict[str, Any] = {
    "type": "integer",
    "minimum": 1,
    "description": "Classes to return; more than there are gives all of them.",
}
_FILE: dict[str, Any] = {"type": "string", "format": "binary"}


def _form_of(field: str, schema: dict[str, Any]) -> dict[str, Any]:
    properties = {field: schema, "top_k": TOP_K}
    return {
        "multipart/form-data": {
            "schema": {"type": "object", "properties": properties, "required": [field]}
        }
    }


def _described(content: dict[str, Any]) -> dict[str, Any]:
    parameter = {"name": "top_k", "in": "query", "required": False, "schema": TOP_K}
    return {"requestBody": {"required": True, "content": content}, "parameters": [parameter]}


DESCRIPTIONS = {
    CLASSIFY: _described({**_form_of("image", _FILE), "image/*": {"schema": _FILE}}),
    CLASSIFY_BATCH: _described(
        _form_of("images", {"type": "array", "items": _FILE, "minItems": 1})
    ),
}
