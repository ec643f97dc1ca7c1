import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from facts import raises_naming

from efficientnet.images.datasets import load_dataset
from serving.demo import running_service

with warnings.catch_warnings():
    # Deprecations inside OpenTelemetry's own imports.
    warnings.simplefilter("ignore")
    from serving.tracing import ENDPOINTS, PROTOCOLS, TracingError, traced

PARENT_TRACE, PARENT_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@contextmanager
def collector() -> Iterator[tuple[str, list[Any]]]:
    """Give the address of a collector on this machine, and the spans that it is sent."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/traces"
            for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for of_scope in of_resource.scope_spans:
                    spans.extend((of_resource.resource, span) for span in of_scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{served.server_port}", spans
    finally:
        served.shutdown()
        thread.join()
        served.server_close()


def attributes_of(thing: Any) -> dict[str, Any]:
    return {pair.key: pair.value.string_value or pair.value.int_value for pair in thing.attributes}


def test_requests_and_the_stages_of_their_pictures_reach_the_collector(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    digits = [sample.read() for sample in load_dataset("digits").val[:2]]
    with collector() as (address, sent):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=tests")
        with (
            running_service(tiny_artifact) as port,
            httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
        ):
            parent = {"traceparent": f"00-{PARENT_TRACE}-{PARENT_SPAN}-01"}
            parts = [("images", ("digit.png", digit)) for digit in digits]
            answer = client.post("/classify/batch", files=parts, headers=parent)
            assert answer.status_code == 200
            assert client.post("/classify", content=b"x").status_code == 415
            client.get("/livez")
        # What was not sent before the service ended never is.
        requests = {span.name: span for _, span in sent if not span.parent_span_id}
        requests |= {
            span.name: span for _, span in sent if span.parent_span_id.hex() == PARENT_SPAN
        }
    # Asking whether it is ready, which the test does too, leaves no trace.
    assert requests.keys() == {"POST /classify/batch", "POST /classify"}
    of_batch, of_refused = requests["POST /classify/batch"], requests["POST /classify"]
    assert of_batch.trace_id.hex() == PARENT_TRACE
    assert of_refused.trace_id.hex() != PARENT_TRACE
    told = attributes_of(of_batch)
    assert told["request.id"] == answer.headers["X-Request-ID"]
    assert told["http.response.status_code"] == 200
    assert attributes_of(of_refused)["http.response.status_code"] == 415
    stages = [span for _, span in sent if span.parent_span_id == of_batch.span_id]
    assert len(sent) == len(stages) + 2
    for picture in (0, 1):
        own = [span for span in stages if attributes_of(span)["picture"] == picture]
        assert [span.name for span in own] == ["queue", "decode", "preprocess", "queue", "infer"]
        times = [time for s in own for time in (s.start_time_unix_nano, s.end_time_unix_nano)]
        assert times == sorted(times)
    resource = attributes_of(sent[0][0])
    assert resource["service.name"] == "efficientnet"
    assert resource["deployment.environment.name"] == "tests"


async def nothing(*_: Any) -> None:
    pass


def test_without_a_collector_there_is_nothing_around_the_service():
    assert traced(nothing, {}) is nothing
    assert traced(nothing, dict.fromkeys(ENDPOINTS, "")) is nothing


def test_a_protocol_that_is_not_spoken_is_refused():
    environment = {ENDPOINTS[1]: "http://collector:4317", PROTOCOLS[1]: "grpc"}
    with raises_naming(TracingError, PROTOCOLS[1], "grpc", "http/protobuf"):
        traced(nothing, environment)


def test_a_collector_without_the_package_for_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
):
    import sys

    name = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, name, None)
    with raises_naming(TracingError, "pip install opentelemetry-exporter-otlp-proto-http"):
        traced(nothing, {ENDPOINTS[1]: "http://collector:4318"})


def test_a_collector_that_does_not_answer_harms_no_request(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")  # it is tried for so long at the end
    with running_service(tiny_artifact) as port:
        digit = load_dataset("digits").val[0].read()
        for _ in range(5):
            answer = httpx.post(
                f"http://127.0.0.1:{port}/classify", files={"image": ("digit.png", digit)}
            )
            assert answer.status_code == 200
