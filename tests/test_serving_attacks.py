import asyncio
import json
import logging
import re
import socket
import threading
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from costly_pictures import ico_of, png_of_zeros, progressive_jpeg
from facts import raises_naming
from processes import wait_until
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.types import Message, Receive, Scope, Send

from efficientnet.images.datasets import load_dataset
from serving.admission import (
    ELSEWHERE,
    MAX_ADDRESS_BYTES,
    PROBES,
    SECURITY_HEADERS,
    Gate,
    with_cors,
)
from serving.answers import PROBLEMS, Prediction, Problem
from serving.demo import running_service
from serving.refusals import Refusal, refusal_response
from serving.settings import PREFIX, VARIABLES, Settings, read_settings
from serving.stages import StageTimes
from serving.uploads import CLASSIFY_BATCH, UPLOADS_PER_PLACE, Uploads
from serving.work import IsWanted, WorkQueue

with warnings.catch_warnings():
    # Deprecations inside BentoML's and OpenTelemetry's own imports.
    warnings.simplefilter("ignore")
    from serving.routes import _PATHS, app, is_path, short_lane

ROOT = Path(__file__).resolve().parent.parent
BOUNDARY = "picture-boundary"
FORM_TYPE = f"multipart/form-data; boundary={BOUNDARY}"
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")


@dataclass(frozen=True)
class RunningService:
    port: int
    log_path: Path
    client: httpx.Client


@pytest.fixture(scope="module")
def service(
    tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningService]:
    log_path = tmp_path_factory.mktemp("service") / "service.log"
    with (
        pytest.MonkeyPatch.context() as patch,
        running_service_with(patch, tiny_artifact, log_path) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        yield RunningService(port, log_path, client)


@contextmanager
def running_service_with(
    patch: pytest.MonkeyPatch, artifact: Path, log_path: Path
) -> Iterator[int]:
    patch.setenv("CLASSIFIER_ALLOWED_HOSTS", "pictures.example, other.example")
    with running_service(artifact, log_path) as port:
        yield port


def digit() -> bytes:
    return load_dataset("digits").val[0].read()


def form(*pictures: bytes, field: str = "image", is_closed: bool = True) -> bytes:
    head = f"--{BOUNDARY}\r\nContent-Disposition: form-data; "
    head += f'name="{field}"; filename="p"\r\n\r\n'
    parts = b"".join(head.encode() + picture + b"\r\n" for picture in pictures)
    return parts + (f"--{BOUNDARY}--\r\n".encode() if is_closed else b"")


def classify(client: httpx.Client, picture: bytes) -> httpx.Response:
    return client.post("/classify", files={"image": ("picture", picture)})


def assert_refuses(response: httpx.Response, status: int, reason: str) -> None:
    assert response.headers["Content-Type"] == "application/problem+json"
    problem = Problem.model_validate(response.json())
    assert (response.status_code, problem.status) == (status, status)
    assert reason in problem.detail


# Metrics and the log


def test_metrics_have_a_label_for_each_route_and_one_for_everything_else(service: RunningService):
    for index in range(20):
        assert service.client.get(f"/{index}/{'x' * 3000}").status_code == 404
        assert service.client.get(f"/docs/assets/{index}.js").status_code == 404
        assert service.client.request(f"METHOD{index}", "/classify").status_code == 400
        assert service.client.request("PROPFIND", "/classify").status_code == 405
        assert service.client.get(f"/classify/{index}").status_code == 404
    assert classify(service.client, digit()).status_code == 200
    labels = set(re.findall(r'endpoint="([^"]*)"', service.client.get("/metrics").text))
    ours = {path for path in labels if not path.endswith("z")}  # livez, readyz, healthz
    assert {"/classify", ELSEWHERE} <= ours <= _PATHS | {ELSEWHERE}


@pytest.mark.parametrize("place", ["path", "question"])
def test_a_long_address_is_refused_and_has_no_label_of_its_own(service: RunningService, place: str):
    address = "/" + ("?" if place == "question" else "") + "x" * MAX_ADDRESS_BYTES
    assert_refuses(service.client.get(address), 414, f"more than the {MAX_ADDRESS_BYTES} allowed")
    assert_refuses(service.client.get("/" + "x" * 60_000), 414, "the address has 60001 bytes")
    assert "xxxx" not in service.client.get("/metrics").text


def test_a_path_forges_no_line_of_the_log(service: RunningService):
    service.client.get("/%0d%0a2026-11-28T00:00:00 forged%1b[2J%e2%80%a8also")
    assert wait_until(lambda: "forged" in service.log_path.read_text())
    text = service.log_path.read_text()
    assert "\x1b" not in text and "\u2028" not in text
    assert all(LOG_LINE.match(line) for line in text.splitlines() if "forged" in line)
    assert r"\r\n2026-11-28T00:00:00 forged\x1b[2J\u2028also 404" in text


@pytest.mark.parametrize("path", sorted(PROBES))
def test_a_probe_that_is_asked_by_another_method_says_which_it_takes(
    service: RunningService, path: str
):
    response = service.client.request("TRACE", path)
    assert response.headers["Allow"] == "GET, HEAD"
    assert_refuses(response, 405, f"{path} does not take")


def test_an_answer_names_its_line_of_the_log(service: RunningService):
    number = service.client.get("/nothing-here").headers["X-Request-ID"]
    assert wait_until(lambda: number in service.log_path.read_text())
    (line,) = [line for line in service.log_path.read_text().splitlines() if number in line]
    assert "GET /nothing-here 404" in line


# Requests


@pytest.mark.parametrize(
    "kind",
    ["application/x-www-form-urlencoded", "application/json", "text/plain", "multipart/mixed", ""],
)
def test_a_body_of_another_type_is_refused_before_it_is_read(service: RunningService, kind: str):
    head = "POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20000000\r\n"
    head += f"Content-Type: {kind}\r\n\r\n" if kind else "\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as client:
        client.sendall(head.encode())
        answer = ""
        while "}" not in answer:  # the head comes first
            answer += client.recv(10_000).decode()
    assert answer.startswith("HTTP/1.1 415 ")
    assert f"the Content-Type is {kind or 'not given'}, expected multipart/form-data" in answer
    assert '"code":"unsupported_type"' in answer


def test_a_client_that_sends_a_whole_body_of_another_type_reads_the_reason(
    service: RunningService,
):
    response = service.client.post(
        "/classify",
        content=b"&" * 20_000_000,
        headers={"Content-Type": "application/x-www-form-urlencoded", "Connection": "close"},
    )
    assert_refuses(response, 415, "expected multipart/form-data")


def test_several_pictures_in_one_form_are_refused(service: RunningService):
    headers = {"Content-Type": FORM_TYPE}
    for number in (2, 5):
        body = form(*[digit()] * number)
        response = service.client.post("/classify", content=body, headers=headers)
        assert_refuses(response, 400, f"the form holds {number} pictures, expected one")
    response = service.client.post("/classify", content=form(digit()), headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize("num_bytes", [60, 200, -3, -len(BOUNDARY) - 6])
def test_a_form_without_its_end_is_told_to_end_early(service: RunningService, num_bytes: int):
    body = form(digit())[:num_bytes]
    response = service.client.post("/classify", content=body, headers={"Content-Type": FORM_TYPE})
    assert_refuses(response, 400, f"the body ends early, after {len(body)} bytes")


def test_a_client_that_leaves_within_its_upload_is_no_fault(service: RunningService):
    head = f"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: {FORM_TYPE}\r\n"
    head += "X-Request-ID: left-early\r\nContent-Length: 1000\r\n\r\n--picture"
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as client:
        client.sendall(head.encode())
    assert wait_until(lambda: "left-early" in service.log_path.read_text())
    (line,) = [line for line in service.log_path.read_text().splitlines() if "left-early" in line]
    assert "/classify 499" in line and "ERROR" not in line


def test_a_web_socket_is_not_opened_and_ends_no_worker(service: RunningService):
    head = "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    head += "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as client:
        client.sendall(head.encode())
        assert client.recv(100).startswith(b"HTTP/1.1 200 ")
        time.sleep(2)  # connections are looked at each second
        assert service.client.get("/livez").status_code == 200
    assert "another is started" not in service.log_path.read_text()


def test_a_heic_picture_gets_what_to_do(service: RunningService):
    picture = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(1000)
    assert_refuses(classify(service.client, picture), 422, "HEIC picture, which is not read")


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        (progressive_jpeg(7000, 45_000), "more than 100 scans"),
        (ico_of(png_of_zeros(17_000, 10_000)), "more than the 50 megapixels"),
    ],
    ids=["scans", "icon"],
)
def test_a_picture_that_would_take_minutes_is_refused(
    service: RunningService, picture: bytes, reason: str
):
    assert_refuses(classify(service.client, picture), 413, reason)


# Headers and hosts


@pytest.mark.parametrize("path", ["/", "/docs", "/model", "/nothing", "/livez", "/metrics"])
def test_every_answer_has_the_headers_that_browsers_heed(service: RunningService, path: str):
    headers = service.client.get(path).headers
    assert all(headers[name.decode()] == value.decode() for name, value in SECURITY_HEADERS)
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe-inline" not in policy or path == "/docs"
    assert not re.search(r"script-src[^;]*unsafe", policy)


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "[evil]", "127.0.0.1.a"]
)
def test_a_host_that_is_not_ours_is_refused(service: RunningService, host: str):
    for path in ("/", "/model", "/classify"):
        response = service.client.get(path, headers={"Host": host})
        assert_refuses(response, 400, "add it to CLASSIFIER_ALLOWED_HOSTS")
    assert service.client.get("/readyz", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "localhost:3000",
        "127.0.0.1",
        "10.1.2.3:80",
        "[::1]:3000",
        "Pictures.example",
        "other.example:8",
    ],
)
def test_hosts_of_the_setting_and_addresses_in_numbers_are_taken(
    service: RunningService, host: str
):
    assert service.client.get("/model", headers={"Host": host}).status_code == 200


def test_openapi_lists_every_error_of_the_docs(service: RunningService):
    schema = service.client.get("/openapi.json").json()
    rows = re.findall(
        r"^\| (\d+) \| `(\w+)` \| (.*) \|$", (ROOT / "docs/serving.md").read_text(), re.M
    )
    table = {code: (int(status), meaning) for status, code, meaning in rows}
    assert table == PROBLEMS
    described = json.dumps(schema["paths"])
    # Of no address that there is, and of clients that read no answer.
    unsaid = {"method_not_allowed", "client_gone"}
    assert {code for code in PROBLEMS if f"{code}: " not in described} == unsaid
    for path in ("/classify", CLASSIFY_BATCH):
        for status in (400, 408, 413, 415, 422, 429, 500, 503, 504, 507):
            content = schema["paths"][path]["post"]["responses"][str(status)]["content"]
            assert list(content) == ["application/problem+json"]


# Settings


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("CLASSIFIER_TIMEOUT", "CLASSIFIER_TIMEOUT_S"),
        ("CLASSIFIER_MAX_UPLOAD", "CLASSIFIER_MAX_UPLOAD_BYTES"),
        ("CLASSIFIER_ARTEFACT", "CLASSIFIER_ARTIFACT"),
        ("CLASSIFIER_TOPK", "CLASSIFIER_DEFAULT_TOP_K"),
    ],
)
def test_a_misspelt_variable_is_refused_with_the_nearest(variable: str, nearest: str):
    with raises_naming(ValueError, variable, nearest):
        read_settings({variable: "7"})


def test_what_a_platform_says_of_a_service_with_this_name_is_no_setting():
    variables = (
        "CLASSIFIER_SERVICE_HOST",
        "CLASSIFIER_SERVICE_PORT",
        "CLASSIFIER_SERVICE_PORT_HTTP",
        "CLASSIFIER_PORT",
        "CLASSIFIER_PORT_3000_TCP",
        "CLASSIFIER_PORT_3000_TCP_ADDR",
        "CLASSIFIER_V2_SERVICE_HOST",
    )
    assert read_settings(dict.fromkeys(variables, "tcp://10.0.0.1:3000")) == Settings()


def test_every_setting_stands_in_the_docs_with_its_default():
    rows = re.findall(
        rf"^\| `({PREFIX}\w+)` \|.*\| (.*) \|$", (ROOT / "docs/serving.md").read_text(), re.M
    )
    assert [variable for variable, _ in rows] == list(VARIABLES)
    defaults = Settings()
    for variable, text in rows:
        value = getattr(defaults, VARIABLES[variable])
        if isinstance(value, int) and variable != "CLASSIFIER_NUM_THREADS":
            assert text == str(value)


def test_hosts_are_separated_by_commas():
    settings = read_settings({"CLASSIFIER_ALLOWED_HOSTS": " a.example ,b.example,"})
    assert settings.allowed_hosts == ("a.example", "b.example")


KEY = "a-key-of-thirty-two-characters.."


async def answer_or_refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """Stand in for the application behind the gate."""
    refusal = scope["refusal"]
    response = refusal_response(refusal) if refusal else PlainTextResponse("answered")
    await response(scope, receive, send)


@pytest.mark.parametrize("path", ["/", "/classify", "/v2/models/classifier/infer", "/docs", "/no"])
@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (f"Bearer {KEY}", 200),
        (f"bearer  {KEY}", 200),
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        (f"Bearer {KEY[:-1]}", 401),
        (f"Bearer {KEY}.", 401),
        (f"Basic {KEY}", 401),
        (KEY, 401),
    ],
)
def test_a_service_with_a_key_answers_nobody_without_it(
    path: str, authorization: str | None, status: int
):
    client = TestClient(Gate(answer_or_refuse, is_path, (), KEY), "http://localhost")
    headers = {} if authorization is None else {"Authorization": authorization}
    response = client.get(path, headers=headers)
    assert response.status_code == status
    if status == 401:
        assert response.json()["code"] == "unauthorized" and KEY not in response.text
        assert response.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("path", sorted(PROBES))
def test_probes_need_no_key(path: str):
    client = TestClient(Gate(answer_or_refuse, is_path, (), KEY), "http://localhost")
    assert client.get(path).status_code == 200


def test_a_key_is_long_enough_and_told_to_nobody():
    settings = read_settings({"CLASSIFIER_API_KEY": "0123456789abcdef"})
    assert settings.api_key == "0123456789abcdef" and settings.api_key not in repr(settings)
    for short in ("0123456789abcde", "0123 456789 abcdef", "0123456789abcde\xe9"):
        with raises_naming(ValueError, "CLASSIFIER_API_KEY", 16) as refused:
            read_settings({"CLASSIFIER_API_KEY": short})
        assert short not in str(refused.value)


def test_pages_of_other_sites_may_ask_only_where_the_setting_names_them():
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    gate = Gate(answer_or_refuse, is_path, (), KEY)
    closed = TestClient(with_cors(gate, ()), "http://localhost")
    assert "Access-Control-Allow-Origin" not in closed.options("/classify", headers=asked).headers
    settings = read_settings({"CLASSIFIER_CORS_ORIGINS": "https://a.example, https://b.example"})
    open_to_a = TestClient(with_cors(gate, settings.cors_origins), "http://localhost")
    allowed = "Access-Control-Allow-Origin"
    # A browser asks without the key first.
    response = open_to_a.options("/classify", headers=asked)
    assert response.status_code == 200 and response.headers[allowed] == "https://a.example"
    other = open_to_a.options("/classify", headers={**asked, "Origin": "https://c.example"})
    assert allowed not in other.headers
    answered = open_to_a.get("/", headers={"Origin": "https://a.example"})
    assert answered.status_code == 401 and answered.headers[allowed] == "https://a.example"


# Overload, clients that are gone, and slow ones: in this process, where a picture takes as long as
# the test wants.


class HeldClassifier:
    """Works on a picture until it is let go, and tells what it was asked."""

    def __init__(self, num_threads: int = 1, max_places: int = 1, timeout_s: float = 60) -> None:
        self.identity: dict[str, str] = {}
        self.settings = Settings(max_concurrency=max_places)
        self.work = WorkQueue(num_threads, max_places, timeout_s)
        self.begun: list[bytes] = []
        self.finished: list[bytes] = []
        self.may_go_on = threading.Event()

    def prepare(self, data: bytes, is_wanted: IsWanted, times: StageTimes) -> Any:
        self.begun.append(data)
        self.may_go_on.wait(30)
        return data

    def infer(self, images: Any, is_wanted: IsWanted, times: StageTimes) -> Future[Any]:
        self.finished.append(images)
        answer: Future[Any] = Future()
        answer.set_result(images)
        return answer

    def predictions(self, logits: Any, top_k: int) -> list[Prediction]:
        return [Prediction(label=logits.decode(errors="replace"), class_index=0, probability=1)]


class BrokenClassifier(HeldClassifier):
    def prepare(self, data: bytes, is_wanted: IsWanted, times: StageTimes) -> Any:
        raise IndexError("list index\nout of \x1b[2Jrange")


@contextmanager
def served(classifier: HeldClassifier, settings: Settings | None = None) -> Iterator[Any]:
    app.state.classifier = classifier
    uploads = Uploads(short_lane, settings or classifier.settings, lambda: classifier.work)
    try:
        yield Gate(uploads, is_path)
    finally:
        classifier.may_go_on.set()
        classifier.work.close()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        return json.loads(self.body)["error"]


Messages = AsyncIterator[dict[str, Any]]


async def ask(
    gate: Any, messages: Callable[[], Messages], method: str = "POST", path: str = "/classify"
) -> Answer:
    """Send a request whose body comes as `messages` give it; then the client stays connected."""
    source, answer = messages(), Answer(0, {}, b"")

    async def receive() -> dict[str, Any]:
        async for message in source:
            return message
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {k.decode().lower(): v.decode() for k, v in message["headers"]}
        else:
            answer.body += message.get("body", b"")

    headers = [(b"host", b"localhost"), (b"content-type", FORM_TYPE.encode())]
    if method == "POST":
        headers.append((b"transfer-encoding", b"chunked"))
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "scheme": "http",
        "http_version": "1.1",
        "root_path": "",
    }
    await gate(scope, receive, send)
    return answer


def body(picture: bytes) -> Callable[[], Messages]:
    async def messages() -> Messages:
        yield {"type": "http.request", "body": form(picture), "more_body": False}

    return messages


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def run(task: Awaitable[None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await task

    asyncio.run(limited())


def test_overload_is_told_before_a_body_is_read_and_the_page_goes_on():
    async def unread() -> Messages:
        raise AssertionError("the body was read")
        yield {}

    async def test(gate: Any, classifier: HeldClassifier) -> None:
        first = asyncio.create_task(ask(gate, body(b"1")))
        await until(lambda: classifier.begun == [b"1"])
        # Its body would come, and is only thrown away after the answer.
        refused = await ask(gate, body(b"2"))
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        assert "wait for it, and more are not taken" in refused.error
        for path in ("/", "/docs"):
            assert (await ask(gate, unread, "GET", path)).status == 200
        classifier.may_go_on.set()
        assert (await first).status == 200
        assert (await ask(gate, body(b"3"))).status == 200
        assert classifier.finished == [b"1", b"3"]

    classifier = HeldClassifier()
    with served(classifier) as gate:
        run(test(gate, classifier))


def test_what_is_refused_at_once_is_told_and_counted_as_all_else(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CLASSIFIER_MAX_CONCURRENCY", "1")
    with running_service(tiny_artifact, tmp_path / "service.log") as port:
        headers = {"Content-Type": "image/png", "X-Request-ID": "mine"}
        address, picture = f"http://127.0.0.1:{port}/classify", digit()
        with httpx.Client(headers=headers, timeout=60) as client, ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(client.post, address, content=picture) for _ in range(60)]
        answers = [answer.result() for answer in asked]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused and {answer.status_code for answer in answers} == {200, 429}
        for answer in refused:
            problem = Problem.model_validate_json(answer.content)
            assert (problem.status, problem.code) == (429, "overloaded")
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert answer.headers["Retry-After"] == "1"
            assert answer.headers["X-Request-ID"] == "mine"
            for name, value in SECURITY_HEADERS:
                assert answer.headers[name.decode()] == value.decode()
        metrics = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    counted = re.findall(
        r'request_total\{endpoint="/classify",http_response_code="429".*\} (\S+)', metrics
    )
    assert sum(map(float, counted)) == len(refused)


def test_overloads_are_logged_once_a_second_with_their_number(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        await refusal_response(Refusal("overloaded", "too much"))(scope, receive, send)

    async def test() -> None:
        for _ in range(5):
            await ask(gate, body(b"1"))
        monkeypatch.setattr("serving.admission.OVERLOAD_LINES_S", 0.0)
        await ask(gate, body(b"1"))

    gate = Gate(refuse, is_path)
    with caplog.at_level("INFO", "bentoml.access"):
        asyncio.run(test())
    first, last = (record.getMessage() for record in caplog.records)
    assert "429" in first and "other" not in first
    assert "4 other 429" in last


def test_a_refusal_is_sent_before_the_body_comes():
    async def test(gate: Any, classifier: HeldClassifier) -> None:
        first = asyncio.create_task(ask(gate, body(b"1")))
        await until(lambda: bool(classifier.begun))
        answered = asyncio.Event()

        async def late() -> Messages:
            await answered.wait()
            yield {"type": "http.request", "body": form(b"2"), "more_body": False}

        status: list[int] = []
        original = gate._app

        async def watching(scope: Any, receive: Any, send: Any) -> None:
            async def send_watched(message: Any) -> None:
                await send(message)
                if message["type"] == "http.response.body":
                    status.append(len(message["body"]))
                    answered.set()

            await original(scope, receive, send_watched)

        gate._app = watching
        assert (await ask(gate, late)).status == 429
        assert status[0] > 0
        classifier.may_go_on.set()
        await first

    classifier = HeldClassifier()
    with served(classifier) as gate:
        run(test(gate, classifier))


def test_work_of_a_client_that_is_gone_is_dropped_and_its_place_given_back(
    caplog: pytest.LogCaptureFixture,
):
    gone = asyncio.Event()

    async def leaving() -> Messages:
        yield {"type": "http.request", "body": form(b"left"), "more_body": False}
        await gone.wait()
        yield {"type": "http.disconnect"}

    async def test(gate: Any, classifier: HeldClassifier) -> None:
        first = asyncio.create_task(ask(gate, leaving))
        await until(lambda: classifier.begun == [b"left"])
        waiting = asyncio.create_task(ask(gate, leaving))
        await until(lambda: classifier.work._num_taken == 2)
        gone.set()
        assert [(await task).status for task in (first, waiting)] == [499, 499]
        # The one that waited has left; the other is still in a thread, and so has its place.
        assert classifier.work._num_taken == 1
        classifier.may_go_on.set()
        await until(lambda: classifier.work._num_taken == 0)
        assert (classifier.begun, classifier.finished) == ([b"left"], [])

    classifier = HeldClassifier(max_places=2)
    with served(classifier) as gate:
        run(test(gate, classifier))
    assert not caplog.records


def test_a_picture_that_takes_too_long_is_a_504_and_a_stuck_pool_is_told():
    async def test(gate: Any, classifier: HeldClassifier) -> None:
        answer = await ask(gate, body(b"slow"))
        assert answer.status == 504
        assert "was not classified within 1 s" in answer.error
        await until(lambda: classifier.work.is_stuck)
        refused = await ask(gate, body(b"next"))
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        classifier.may_go_on.set()
        await until(lambda: not classifier.work.is_stuck)
        assert (await ask(gate, body(b"good"))).status == 200
        assert (classifier.begun, classifier.finished) == ([b"slow", b"good"], [b"good"])

    classifier = HeldClassifier(max_places=5, timeout_s=1)
    with served(classifier) as gate:
        run(test(gate, classifier))


def test_slow_uploads_take_no_place_and_end_with_a_408(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("serving.uploads.UPLOAD_GRACE_S", 0.3)

    async def trickle() -> Messages:
        yield {"type": "http.request", "body": form(b"x" * 100)[:50], "more_body": True}
        while True:
            await asyncio.sleep(0.05)
            yield {"type": "http.request", "body": b"x", "more_body": True}

    async def test(gate: Any, classifier: HeldClassifier) -> None:
        classifier.may_go_on.set()
        slow = [asyncio.create_task(ask(gate, trickle)) for _ in range(UPLOADS_PER_PLACE - 1)]
        await asyncio.sleep(0)
        assert (await ask(gate, body(b"good"))).status == 200
        for answer in await asyncio.gather(*slow):
            assert (answer.status, answer.headers["connection"]) == (408, "close")
            assert "the upload is too slow" in answer.error
        assert classifier.finished == [b"good"]

    classifier = HeldClassifier()
    with served(classifier) as gate:
        run(test(gate, classifier))


def test_a_body_that_stops_coming_is_a_408_at_the_deadline():
    async def silent() -> Messages:
        yield {"type": "http.request", "body": form(b"x" * 100)[:50], "more_body": True}
        await asyncio.Event().wait()

    async def test(gate: Any) -> None:
        answer = await ask(gate, silent)
        assert answer.status == 408
        assert "all of it within 1 s" in answer.error

    classifier = HeldClassifier()
    with served(classifier, replace(classifier.settings, timeout_s=1)) as gate:
        run(test(gate))


def test_when_all_uploads_are_taken_the_slowest_gives_way(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("serving.uploads.BEHIND_S", 0.1)

    async def silent() -> Messages:
        yield {"type": "http.request", "body": form(b"x" * 100)[:50], "more_body": True}
        await asyncio.Event().wait()

    async def test(gate: Any, classifier: HeldClassifier) -> None:
        classifier.may_go_on.set()
        slow = [asyncio.create_task(ask(gate, silent)) for _ in range(UPLOADS_PER_PLACE)]
        await until(lambda: len(gate._app._uploads) == UPLOADS_PER_PLACE)
        await asyncio.sleep(0.2)
        for _ in range(3):
            assert (await ask(gate, body(b"good"))).status == 200
        await until(lambda: sum(task.done() for task in slow) == 1)
        (answer,) = [task.result() for task in slow if task.done()]
        assert answer.status == 408 and "the upload is too slow" in answer.error
        for task in slow:
            task.cancel()

    classifier = HeldClassifier()
    with served(classifier) as gate:
        run(test(gate, classifier))


def test_more_uploads_than_may_be_on_their_way_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("serving.uploads.BEHIND_S", 60)
    done = asyncio.Event()

    async def held() -> Messages:
        yield {"type": "http.request", "body": form(b"x" * 100)[:50], "more_body": True}
        await done.wait()
        yield {"type": "http.request", "body": form(b"x" * 100)[50:], "more_body": False}

    async def test(gate: Any, classifier: HeldClassifier) -> None:
        classifier.may_go_on.set()
        first = [asyncio.create_task(ask(gate, held)) for _ in range(UPLOADS_PER_PLACE)]
        await until(lambda: len(gate._app._uploads) == UPLOADS_PER_PLACE)
        refused = await ask(gate, body(b"more"))
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        assert "8 pictures are on their way" in refused.error
        done.set()
        statuses = [(await task).status for task in first]
        assert set(statuses) <= {200, 429} and 200 in statuses
        assert not gate._app._uploads
        assert (await ask(gate, body(b"more"))).status == 200

    classifier = HeldClassifier()
    with served(classifier) as gate:
        run(test(gate, classifier))


def test_a_fault_is_one_line_of_the_log_with_the_number_of_its_request(
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level(logging.ERROR, "bentoml.access")

    async def test(gate: Any) -> None:
        answer = await ask(gate, body(b"1"))  # and no exception reaches the server
        assert answer.status == 500
        number = answer.headers["x-request-id"]
        assert answer.error.endswith(f"its log says why, at request {number}")
        (record,) = caplog.records
        text = record.getMessage()
        assert text.startswith(rf"request {number} failed: IndexError: list index\nout of \x1b[2Jr")
        assert "\n" not in text and record.exc_info is None
        assert re.search(r" in prepare \(.*test_serving_attacks\.py:\d+\) < ", text)

    with served(BrokenClassifier()) as gate:
        run(test(gate))


def test_a_fault_at_one_picture_of_a_batch_harms_no_other(caplog: pytest.LogCaptureFixture):
    class SometimesBroken(HeldClassifier):
        def prepare(self, data: bytes, is_wanted: IsWanted, times: StageTimes) -> Any:
            if data == b"2":
                raise IndexError("list index")
            return data

    async def messages() -> Messages:
        pictures = form(b"1", b"2", b"3", field="images")
        yield {"type": "http.request", "body": pictures, "more_body": False}

    async def test(gate: Any) -> None:
        answer = await ask(gate, messages, path=CLASSIFY_BATCH)
        assert answer.status == 200
        first, second, third = json.loads(answer.body)
        assert [first["predictions"][0]["label"], third["predictions"][0]["label"]] == ["1", "3"]
        number = answer.headers["x-request-id"]
        assert second["status"] == 500 and second["error"].endswith(f"at request {number}")
        (record,) = caplog.records
        assert record.getMessage().startswith(f"request {number} failed: IndexError: list index")

    caplog.set_level(logging.ERROR, "bentoml.service")
    with served(SometimesBroken()) as gate:
        run(test(gate))


def test_a_batch_of_a_client_that_is_gone_is_dropped_between_its_pictures():
    classifier = HeldClassifier()

    async def messages() -> Messages:
        pictures = form(b"1", b"2", b"3", field="images")
        yield {"type": "http.request", "body": pictures, "more_body": False}
        await until(lambda: bool(classifier.begun))
        yield {"type": "http.disconnect"}

    async def test(gate: Any) -> None:
        assert (await ask(gate, messages, path=CLASSIFY_BATCH)).status == 499
        classifier.may_go_on.set()
        await until(lambda: classifier.work._num_taken == 0)
        assert (classifier.begun, classifier.finished) == ([b"1"], [])

    with served(classifier) as gate:
        run(test(gate))


def test_a_web_socket_is_closed_at_the_gate():
    sent: list[Message] = []

    async def inner(*_: Any) -> None:
        raise AssertionError("it went through")

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("it was listened to")

    async def test() -> None:
        await Gate(inner, is_path)({"type": "websocket", "path": "/x"}, receive, send)

    run(test())
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_readiness_follows_the_pool():
    work = WorkQueue(num_threads=2, max_places=4, timeout_s=0.05)
    may_go_on = threading.Event()

    async def test() -> None:
        async def receive() -> dict[str, Any]:
            await asyncio.Event().wait()
            raise AssertionError

        def hold(_: IsWanted) -> Future[None]:
            may_go_on.wait(30)
            done: Future[None] = Future()
            done.set_result(None)
            return done

        with raises_naming(Refusal, 504, "0.05 s"):
            await work.run([hold], receive, time.monotonic())
        assert not work.is_stuck  # the other thread is free
        with raises_naming(Refusal, 504, "0.05 s"):
            await work.run([hold], receive, time.monotonic())
        await until(lambda: work.is_stuck)
        may_go_on.set()
        await until(lambda: not work.is_stuck)

    try:
        run(test())
    finally:
        may_go_on.set()
        work.close()
