"""ASGI middleware: request bodies that are too large, too slow, cut off or of another type -> 4xx.

What is refused is answered before its body is read, and the client gets to read the answer.
"""

import asyncio
import time
from collections.abc import Callable

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.refusals import Refusal, printable, refusal_response, too_large
from serving.settings import Settings
from serving.work import RETRY_AFTER_S, WorkQueue

CLASSIFY, CLASSIFY_BATCH = "/classify", "/classify/batch"
HOW_TO_SEND = {
    CLASSIFY: "curl -F image=@picture.jpg .../classify",
    CLASSIFY_BATCH: "curl -F images=@one.jpg -F images=@two.jpg .../classify/batch",
}

# Clients of the open inference protocol send tensors in JSON, or JSON with bytes behind it, whose
# type is either, or not given at all.
TENSOR_TYPES = (b"application/json", b"application/octet-stream", b"")

# Boundaries, part headers and the other fields of a form, beside the file itself.
FORM_OVERHEAD_BYTES = 100_000

# A client that sends its whole body before it reads the answer sees a connection reset when the
# answer comes early and the connection is closed. So after the answer the rest of the body is read
# and thrown away, up to this much: an endless upload is cut off. `serving.connections` does so at a
# tenth of the cost; this is for servers that do not.
MAX_DISCARDED_BYTES = 200_000_000
MAX_DISCARD_S = 10.0

# A body may be slower than the least rate for this long.
UPLOAD_GRACE_S = 5.0

# Bodies on their way, for each place where work is done: each may hold 1 MB of memory and, above
# that, a file in the temporary folder.
UPLOADS_PER_PLACE = 8

# When all are taken, one that is so far behind the least rate gives way to the next.
BEHIND_S = 0.5


def is_infer(path: str) -> bool:
    """Whether tensors are sent there."""
    return path.startswith("/v2/") and path.endswith("/infer")


def takes_body(path: str) -> bool:
    """Whether an address classifies what is sent there."""
    return path in HOW_TO_SEND or is_infer(path)


def how_to_send(path: str) -> str:
    """Say how a picture is sent to an address."""
    how = HOW_TO_SEND.get(path, HOW_TO_SEND[CLASSIFY])
    return f"send it as a form field with a file, like: {how}"


def _expected(path: str) -> str:
    if is_infer(path):
        return (
            "application/json, or application/octet-stream with an Inference-Header-Content-Length"
        )
    picture = ", or an image type with the picture as the body" if path == CLASSIFY else ""
    return f"multipart/form-data with each picture as a file, like: {HOW_TO_SEND[path]}{picture}"


class Uploads:
    """Bounds the bodies of all requests to `app`, and what those that classify take.

    The wrapped application sees a refusal as an exception from its `receive`, and answers it as it
    answers its other errors.

    Args:
        app: what reads the bodies.
        settings: the limits.
        work: gives where pictures are classified, once the service has started.
    """

    def __init__(self, app: ASGIApp, settings: Settings, work: Callable[[], WorkQueue]) -> None:
        self._app = app
        self._settings = settings
        self._work = work
        self._uploads = set[_Body]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(scope, receive, send, self._settings)
        try:
            if scope.get("refusal"):
                raise scope["refusal"]
            if scope["method"] == "POST" and takes_body(scope["path"]):
                self._check_request(body)
        except Refusal as refusal:
            await refusal_response(refusal)(scope, body.receive, body.send)
            return
        if not body.is_complete:
            self._uploads.add(body)
        body.on_complete = lambda: self._uploads.discard(body)
        try:
            await self._app({**scope, "started": body.started}, body.receive, body.send)
        finally:
            body.complete()

    def _check_request(self, body: "_Body") -> None:
        body.require_type_and_size()
        self._work().require_place()
        max_uploads = UPLOADS_PER_PLACE * self._settings.max_concurrency
        is_full = not body.is_complete and len(self._uploads) >= max_uploads
        if is_full and not self._cut_off_slowest():
            raise Refusal(
                "overloaded",
                f"{max_uploads} pictures are on their way, and more are not taken; send this one "
                "again in a moment",
                {"Retry-After": str(RETRY_AFTER_S)},
            )

    def _cut_off_slowest(self) -> bool:
        slowest = max(self._uploads, key=lambda body: body.seconds_behind)
        if slowest.seconds_behind < BEHIND_S:
            return False
        self._uploads.remove(slowest)
        slowest.cut_off()
        return True


class _Body:
    def __init__(self, scope: Scope, receive: Receive, send: Send, settings: Settings) -> None:
        headers = Headers(scope=scope)
        self._receive = receive
        self._send = send
        self._settings = settings
        self._path: str = scope["path"]
        self._encoding = headers.get("content-encoding", "").lower().replace("identity", "")
        self._declared_bytes = int(headers.get("content-length", "0"))
        self._content_type, options = parse_options_header(headers.get("content-type"))
        boundary = options.get(b"boundary", b"")
        self._is_form = self._content_type == b"multipart/form-data" and bool(boundary)
        self._end_mark = b"--" + boundary + b"--"
        self._has_end_mark = False
        self._tail = b""
        self._is_coming: Callable[[], bool] | None = scope.get("is_body_coming")
        """Of serving.connections."""
        self._received_bytes = 0
        self._is_discarded = True
        self._is_cut_off = False
        self._deadline: asyncio.Timeout | None = None
        """Of the receiving that is under way."""
        # Such a client sends nothing before it is asked to, and takes an early answer.
        self._waits_to_be_asked = headers.get("expect", "").lower() == "100-continue"
        self.started = time.monotonic()
        self.is_complete = "content-length" not in headers and "transfer-encoding" not in headers
        self.on_complete: Callable[[], None] = lambda: None

    def require_type_and_size(self) -> None:
        kind = self._content_type
        if not self._is_taken(kind):
            found = kind.decode(errors="replace") or "not given"
            raise Refusal(
                "unsupported_type",
                f"the Content-Type is {printable(found)}, expected {_expected(self._path)}",
            )
        if self._encoding:
            raise Refusal(
                "unsupported_type",
                f"the Content-Encoding is {printable(self._encoding)}, expected none: send the "
                "body as it is",
            )
        if self._declared_bytes > self._settings.max_upload_bytes + FORM_OVERHEAD_BYTES:
            raise too_large(self._settings.max_upload_bytes)

    def _is_taken(self, kind: bytes) -> bool:
        if not kind and self.is_complete:  # no body at all is told so later
            return True
        if is_infer(self._path):
            return kind in TENSOR_TYPES
        is_picture = kind.startswith(b"image/") and self._path == CLASSIFY
        return kind == b"multipart/form-data" or is_picture

    @property
    def seconds_behind(self) -> float:
        """How much longer it has taken than at the least rate."""
        at_rate = self._received_bytes / self._settings.min_upload_bytes_per_s
        return time.monotonic() - self.started - at_rate

    def cut_off(self) -> None:
        """Have it answered as one that is too slow, now."""
        self._is_cut_off = True
        if self._deadline is not None:
            self._deadline.reschedule(asyncio.get_running_loop().time())

    def complete(self) -> None:
        if not self.is_complete:
            self.is_complete = True
            self.on_complete()

    async def receive(self) -> Message:
        if self.is_complete:
            return await self._receive()
        try:
            remaining = self._next_deadline() - time.monotonic()
            async with asyncio.timeout(remaining) as self._deadline:
                message = await self._receive_counted()
        except TimeoutError:
            self._is_discarded = False
            raise self._too_slow() from None
        finally:
            self._deadline = None
        limit = self._settings.max_upload_bytes + FORM_OVERHEAD_BYTES
        if max(self._received_bytes, self._declared_bytes) > limit:
            raise too_large(self._settings.max_upload_bytes)
        if self.is_complete and self._is_form and not self._has_end_mark:
            raise Refusal(
                "invalid_request",
                f"the form cannot be read: the body ends early, after {self._received_bytes} "
                "bytes and before the boundary that closes it; send the picture again",
            )
        return message

    async def send(self, message: Message) -> None:
        if self._is_coming is not None:
            if message["type"] == "http.response.start" and self._is_coming():
                headers = [*message.get("headers", ()), (b"connection", b"close")]
                message = {**message, "headers": headers}
            await self._send(message)
            return
        is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if is_last and not self.is_complete:
            await self._send({**message, "more_body": True})
            await self._discard_rest()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    def _next_deadline(self) -> float:
        if self._is_cut_off:
            return 0.0
        at_rate = UPLOAD_GRACE_S + self._received_bytes / self._settings.min_upload_bytes_per_s
        return self.started + min(at_rate, self._settings.timeout_s)

    def _too_slow(self) -> Refusal:
        seconds = time.monotonic() - self.started
        return Refusal(
            "upload_too_slow",
            f"the upload is too slow: {self._received_bytes} bytes came in {seconds:.0f} s, "
            f"expected {self._settings.min_upload_bytes_per_s} bytes a second and all of it within "
            f"{self._settings.timeout_s} s",
            {"Connection": "close"},
        )

    async def _receive_counted(self) -> Message:
        message = await self._receive()
        self._waits_to_be_asked = False
        body = message.get("body", b"")
        self._received_bytes += len(body)
        if self._is_form and not self._has_end_mark:
            self._has_end_mark = self._end_mark in self._tail + body
            self._tail = (self._tail + body)[-len(self._end_mark) :]
        if not message.get("more_body", False):
            if message["type"] == "http.disconnect":
                self._has_end_mark = True  # nobody is there to be told
            self.complete()
        return message

    async def _discard_rest(self) -> None:
        is_hopeless = self._declared_bytes > MAX_DISCARDED_BYTES
        if self._waits_to_be_asked or is_hopeless or not self._is_discarded:
            return
        try:
            async with asyncio.timeout(MAX_DISCARD_S):
                while not self.is_complete and self._received_bytes < MAX_DISCARDED_BYTES:
                    await self._receive_counted()
        except TimeoutError:
            return
