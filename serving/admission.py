"""ASGI middleware around all others: names each request, checks its address, writes its log line.

BentoML labels its metrics with the path as it was sent, and keeps every label for ever in shared
memory; behind the gate there are only the paths that exist and one for all others. An exception
that nobody expected ends here, in one line of the log: a server that sees it closes the connection.
"""

import ipaddress
import logging
import math
import re
import secrets
import socket
import time
from collections.abc import Callable, Collection
from hmac import compare_digest

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.answers import PROBLEMS
from serving.refusals import (
    Refusal,
    as_http,
    in_one_line,
    printable,
    problem_response,
    refusal_response,
)

# A path and its question; no address of the service is longer than 100.
MAX_ADDRESS_BYTES = 4000

ELSEWHERE = "/elsewhere"
PROBES = frozenset({"/livez", "/healthz", "/readyz", "/metrics"})
# And BentoML's description of its own.
OWN_PATHS = PROBES | {"/schema.json"}

METHODS = frozenset(["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
OTHER_METHOD = "OTHER"

ANY_HOST = "*"

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")

# As ASGI has them, since they go with every answer.
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
)
CONTENT_POLICY = b"content-security-policy"
# Answers that are no page load nothing; a page says itself what it loads.
NOTHING_LOADED = b"default-src 'none'; frame-ancestors 'none'"

# Thousands of lines a second would take the time that answers need.
OVERLOADED = PROBLEMS["overloaded"][0]
OVERLOAD_LINES_S = 1.0

# Of BentoML's family, so that its configuration of the log decides.
log = logging.getLogger("bentoml.access")


class Gate:
    """Passes requests on to `app`, which hears of these keys in the scope.

    - `path`, `method`: as sent where they exist, else ELSEWHERE and OTHER_METHOD;
    - `asked_path`, `asked_method`: as sent, safe to be quoted;
    - `gate.request_id`: also in the log line and in the header X-Request-ID, of the request if it
      has one that is fit for a log (BentoML has a key `request_id` of its own);
    - `refusal`: a Refusal to answer with, or None.

    Args:
        app: what is guarded.
        is_path: whether an address exists, beside BentoML's.
        allowed_hosts: names that the Host header may have, beside addresses in numbers, localhost
            and this machine's name; ANY_HOST allows all.
        api_key: what all but the probes must be asked with; "" = nothing.
        is_draining: whether clients are told to open another connection, which another process
            will take.
    """

    def __init__(
        self,
        app: ASGIApp,
        is_path: Callable[[str], bool],
        allowed_hosts: Collection[str] = (),
        api_key: str = "",
        is_draining: Callable[[], bool] = lambda: False,
    ) -> None:
        self._app = app
        self._is_draining = is_draining
        self._key = api_key.encode()
        self._is_path = lambda path: path in OWN_PATHS or is_path(path)
        here = {"localhost", socket.gethostname().lower()}
        self._hosts = {host.lower() for host in allowed_hosts} | here
        self._overload_logged_at, self._num_unlogged = -math.inf, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._pass_on(self._named(scope), receive, send)
        else:  # no address takes web sockets, and BentoML would label them by their path, too
            await send({"type": "websocket.close", "code": 1008})

    def _named(self, scope: Scope) -> Scope:
        path, method = scope["path"], scope["method"]
        refusal = self._refusal(scope)
        # With a slash too many, FastAPI redirects.
        is_known = self._is_path(path) or (path.endswith("/") and self._is_path(path[:-1]))
        if refusal or not is_known:
            path = ELSEWHERE
        return {
            **_asked(scope),
            "path": path,
            "raw_path": path.encode(),
            "method": method if method in METHODS else OTHER_METHOD,
            "refusal": refusal,
        }

    def _refusal(self, scope: Scope) -> Refusal | None:
        num_bytes = len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"])
        if num_bytes > MAX_ADDRESS_BYTES:
            return Refusal(
                "address_too_long",
                f"the address has {num_bytes} bytes, more than the {MAX_ADDRESS_BYTES} allowed",
            )
        host = Headers(scope=scope).get("host", "")
        # Platforms ask by whatever name they like.
        if scope["path"] not in PROBES and not self._is_allowed(host):
            return Refusal(
                "host_not_allowed",
                f"the Host header is '{printable(host)}', which is no name of this service; "
                "if it is one, add it to CLASSIFIER_ALLOWED_HOSTS",
            )
        if self._key and scope["path"] not in PROBES and not self._has_key(scope):
            return Refusal(
                "unauthorized",
                "the service has a key: send it in the header 'Authorization: Bearer KEY'",
                {"WWW-Authenticate": "Bearer"},
            )
        return None

    def _has_key(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        # In a time that does not tell how much of it is right.
        return scheme.lower() == "bearer" and compare_digest(key.strip().encode(), self._key)

    def _is_allowed(self, host: str) -> bool:
        # A page of another site can reach the service under that site's name, if its name server
        # says that this machine is the site's; an address in numbers it cannot make its own.
        name = host.rpartition("]")[0].lstrip("[") or host.partition(":")[0]
        if not host or ANY_HOST in self._hosts or name.lower() in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def refuse(self, scope: Scope, refusal: Refusal) -> bytes:
        """Return what a request is answered with, whatever it holds, and write its log line."""
        asked = _asked(scope)
        self._log(asked, refusal.status_code, time.monotonic())
        headers = (*_headers(asked), (CONTENT_POLICY, NOTHING_LOADED), (b"connection", b"close"))
        return as_http(refusal_response(refusal), headers)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, status = time.monotonic(), 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers: list[tuple[bytes, bytes]] = [
                    *message.get("headers", ()),
                    *_headers(scope),
                ]
                if not any(name == CONTENT_POLICY for name, _ in headers):
                    headers.append((CONTENT_POLICY, NOTHING_LOADED))
                if self._is_draining():
                    headers.append((b"connection", b"close"))
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except Exception as error:
            log.error("request %s failed: %s", scope["gate.request_id"], in_one_line(error))
            if not status:
                sentence = "the service failed on this request; its log says why"
                response = problem_response("internal_error", sentence)
                await response(scope, receive, send_named)
        if scope["path"] not in PROBES:
            self._log(scope, status, started)

    def _log(self, scope: Scope, status: int, started: float) -> None:
        now, others = time.monotonic(), ""
        if status == OVERLOADED:
            if now < self._overload_logged_at + OVERLOAD_LINES_S:
                self._num_unlogged += 1
                return
            if self._num_unlogged:
                others = f", and {self._num_unlogged} other {OVERLOADED} before it"
            self._overload_logged_at, self._num_unlogged = now, 0
        log.info(
            "%s %s %s %d %.0f ms, request %s%s",
            (scope.get("client") or ["-"])[0],
            scope["asked_method"],
            scope["asked_path"],
            status,
            1000 * (now - started),
            scope["gate.request_id"],
            others,
        )


def _asked(scope: Scope) -> Scope:
    return {
        **scope,
        "asked_path": printable(scope["path"]),
        "asked_method": printable(scope["method"], 20),
        "gate.request_id": _request_id(scope),
    }


def _headers(asked: Scope) -> tuple[tuple[bytes, bytes], ...]:
    return (*SECURITY_HEADERS, (b"x-request-id", asked["gate.request_id"].encode()))


def _request_id(scope: Scope) -> str:
    asked = Headers(scope=scope).get("x-request-id", "")
    return asked if REQUEST_ID.fullmatch(asked) else secrets.token_hex(8)


def with_cors(app: ASGIApp, origins: Collection[str]) -> ASGIApp:
    """Let pages of other sites ask, if there are any: browsers ask before they send a picture."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type", "X-Request-ID"],
        expose_headers=["X-Request-ID", "Server-Timing", "Retry-After"],
    )
