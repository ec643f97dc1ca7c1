"""ASGI middleware: a request body over the limit -> 413, which the client gets to read."""

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Boundaries, part headers and the other fields of a form, beside the file itself.
FORM_OVERHEAD_BYTES = 100_000

# A client that sends its whole body before it reads the answer sees a connection reset when the
# answer comes early and the connection is closed. So the rest of the body is read and thrown away
# first, up to this much: a picture that is too large is understood, an endless upload is cut off.
MAX_DISCARDED_BYTES = 200_000_000


def too_large(max_upload_bytes: int) -> HTTPException:
    """Make the 413 that says what the limit is."""
    return HTTPException(
        413,
        f"the upload is larger than the {max_upload_bytes / 1e6:g} MB allowed; "
        "send a smaller picture",
    )


class UploadLimit:
    """Bounds the bodies of all requests to `app`, with and without a Content-Length.

    The wrapped application sees the 413 as an exception from its `receive`, and answers it as it
    answers its other errors.
    """

    def __init__(self, app: ASGIApp, max_upload_bytes: int) -> None:
        self.app = app
        self.max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] == "http":
            body = _Body(scope, receive, send, self.max_upload_bytes)
            await self.app(scope, body.receive, body.send)
        else:
            await self.app(scope, receive, send)


class _Body:
    def __init__(self, scope: Scope, receive: Receive, send: Send, max_upload_bytes: int) -> None:
        headers = Headers(scope=scope)
        self._receive = receive
        self._send = send
        self._max_upload_bytes = max_upload_bytes
        self._declared_bytes = int(headers.get("content-length", "0"))
        self._received_bytes = 0
        self._is_complete = "content-length" not in headers and "transfer-encoding" not in headers
        # Such a client sends nothing before it is asked to, and takes an early answer.
        self._waits_to_be_asked = headers.get("expect", "").lower() == "100-continue"

    async def receive(self) -> Message:
        limit = self._max_upload_bytes + FORM_OVERHEAD_BYTES
        if self._declared_bytes > limit:
            raise too_large(self._max_upload_bytes)
        message = await self._receive_counted()
        if self._received_bytes > limit:
            raise too_large(self._max_upload_bytes)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._discard_rest()
        await self._send(message)

    async def _receive_counted(self) -> Message:
        message = await self._receive()
        self._waits_to_be_asked = False
        self._received_bytes += len(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)
        return message

    async def _discard_rest(self) -> None:
        if self._waits_to_be_asked or self._declared_bytes > MAX_DISCARDED_BYTES:
            return
        while not self._is_complete and self._received_bytes < MAX_DISCARDED_BYTES:
            await self._receive_counted()
