"""ASGI middleware: requests -> spans for an OpenTelemetry collector, if OTEL_ variables name one.

A span for each request, below that of the client if it sends `traceparent`, and one for each stage
of each picture. What is sampled, and what else is sent, say OpenTelemetry's own variables.
"""

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from efficientnet.errors import PipelineError
from serving.admission import PROBES
from serving.stages import StageTimes

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"
PACKAGE = "opentelemetry-exporter-otlp-proto-http"

SERVICE_NAME = "efficientnet"

# Key of the scope.
SPAN = "request_span"


class TracingError(PipelineError):
    """A collector that cannot be sent to."""


class RequestSpan:
    """The span of a request, to which stages are added."""

    def __init__(self, tracer: "Tracer", span: "Span") -> None:
        self._tracer = tracer
        self._span = span

    def add(self, pictures: Sequence[StageTimes]) -> None:
        """Add the stages of each picture."""
        from opentelemetry.trace import set_span_in_context

        context = set_span_in_context(self._span)
        to_epoch_s = time.time() - time.perf_counter()
        for number, times in enumerate(pictures):
            for stage, start, end in times.laps:
                span = self._tracer.start_span(
                    stage,
                    context,
                    attributes={"picture": number},
                    start_time=_ns(start, to_epoch_s),
                )
                span.end(_ns(end, to_epoch_s))


class Traces:
    """Sends a span for each request but probes.

    Args:
        app: behind the gate, which names what there is of paths and methods.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._provider: TracerProvider | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] != "http" or scope["path"] in PROBES or self._provider is None:
            await self._app(scope, receive, send)
        else:
            await self._trace(self._provider.get_tracer(SERVICE_NAME), scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The exporter has a thread, so it is made in the worker, and not before it is forked.
        provider = self._provider = _provider()

        async def send_all_first(message: Message) -> None:
            if message["type"].startswith("lifespan.shutdown."):
                await asyncio.to_thread(provider.shutdown)
            await send(message)

        await self._app(scope, receive, send_all_first)

    async def _trace(self, tracer: "Tracer", scope: Scope, receive: Receive, send: Send) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        status = 500

        async def send_seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        span = tracer.start_span(
            f"{scope['method']} {scope['path']}",
            TraceContextTextMapPropagator().extract(dict(Headers(scope=scope))),
            SpanKind.SERVER,
            {
                "http.request.method": scope["method"],
                "http.route": scope["path"],
                "request.id": scope["gate.request_id"],
            },
        )
        try:
            await self._app({**scope, SPAN: RequestSpan(tracer, span)}, receive, send_seen)
        finally:
            span.set_attribute("http.response.status_code", status)
            if status >= 500:
                span.set_status(Status(StatusCode.ERROR))
            span.end()


def traced(app: ASGIApp, environment: Mapping[str, str] = os.environ) -> ASGIApp:
    """Have the requests of an application traced where a collector is named; else return it.

    Raises:
        TracingError: see is_traced.
    """
    return Traces(app) if is_traced(environment) else app


def is_traced(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether a collector is named.

    Raises:
        TracingError: it speaks another protocol than ours, or the package for it is missing.
    """
    if not any(environment.get(name) for name in ENDPOINTS):
        return False
    for name in PROTOCOLS:
        if environment.get(name, PROTOCOL) != PROTOCOL:
            raise TracingError(f"{name} is '{environment[name]}', expected {PROTOCOL}")
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter  # noqa: F401
    except ImportError as error:
        raise TracingError(
            f"a collector for traces is named, and what sends to it is missing ({error}): "
            f"pip install {PACKAGE}, or unset {' and '.join(ENDPOINTS)}"
        ) from error
    return True


def _provider() -> "TracerProvider":
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    ours = Resource({"service.name": SERVICE_NAME})
    provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def _ns(perf_counter_s: float, to_epoch_s: float) -> int:
    return int(1e9 * (perf_counter_s + to_epoch_s))
