import asyncio
import concurrent.futures
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from facts import require_named
from processes import listening_ports, process_exists, wait_until
from services import ROOT, running

from efficientnet.images.datasets import load_dataset
from efficientnet.images.preprocess import preprocess
from efficientnet.runtimes import open_runtime
from efficientnet.runtimes.native.build import LIBRARY
from efficientnet.runtimes.probabilities import softmax
from export import native
from export.inputs.config import NativeConfig
from serving.answers import Problem
from serving.connections import Refuser
from serving.demo import free_port
from serving.supervisor import listening_socket, refuse_new_connections

with warnings.catch_warnings():
    # Deprecations inside BentoML's and OpenTelemetry's own imports.
    warnings.simplefilter("ignore")
    from serving.worker import DrainingServer


@pytest.fixture
def artifact(tiny_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))


def renamed_classes(artifact: Path) -> str:
    """Make a manifest of another artifact, which fits the same program."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    return json.dumps({**manifest, "class_names": [f"other {i}" for i in range(10)]})


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_killed_worker_is_replaced_and_all_of_them_end_with_a_killed_supervisor(
    artifact: Path, tmp_path: Path
):
    with running(artifact, tmp_path, CLASSIFIER_WORKERS="2") as service:
        assert wait_until(lambda: service.num_ready() == 2)
        facts, before = service.get("/model").json(), service.workers
        assert listening_ports(service.process.pid) == {service.port}
        killed = min(before)
        os.kill(killed, signal.SIGKILL)
        for _ in range(20):
            assert service.classify().status_code == 200
        assert wait_until(lambda: service.num_ready() == 3)
        assert len(service.workers) == 2 and killed not in service.workers
        assert {service.get("/model").text for _ in range(10)} == {
            json.dumps(facts, separators=(",", ":"))
        }
        assert "was ended by SIGKILL; another is started" in service.log.read_text()
        workers = service.workers
        service.process.kill()
        assert wait_until(lambda: not any(process_exists(pid) for pid in workers))


def test_a_new_worker_serves_what_was_opened_at_the_start_until_ctrl_c_ends_all(
    artifact: Path, tmp_path: Path
):
    with running(artifact, tmp_path) as service:
        expected = service.classify().json()
        other = Path(shutil.copytree(artifact, tmp_path / "other"))
        (other / "manifest.json").write_text(renamed_classes(artifact))
        artifact.rename(tmp_path / "gone")
        other.rename(artifact)
        (worker,) = service.workers
        os.kill(worker, signal.SIGKILL)
        assert wait_until(lambda: service.num_ready() == 2)
        assert service.classify().json() == expected
        shutil.rmtree(tmp_path / "gone")
        (worker,) = service.workers
        os.kill(worker, signal.SIGKILL)
        assert wait_until(lambda: service.num_ready() == 3)
        assert service.classify().json() == expected
        (worker,) = service.workers
        assert list((tmp_path / "home").glob("metrics-*/*"))
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(60) == 0 and not process_exists(worker)
        assert not list((tmp_path / "home").glob("metrics-*"))


def test_an_artifact_written_over_makes_the_service_not_ready_until_it_is_back(
    artifact: Path, tmp_path: Path
):
    with running(artifact, tmp_path) as service:
        expected = service.classify().json()
        manifest = artifact / "manifest.json"
        original = manifest.read_text()
        manifest.write_text(renamed_classes(artifact))
        assert service.classify().json() == expected  # the old one goes on
        (worker,) = service.workers
        os.kill(worker, signal.SIGKILL)
        assert wait_until(lambda: "the artifact there now" in service.log.read_text())
        for answer in (service.get("/readyz"), service.classify()):
            assert answer.status_code == 503
            assert "is another than" in answer.json()["error"]
            assert answer.headers["Retry-After"]
        assert service.get("/livez").status_code == 200
        manifest.write_text(original)
        assert wait_until(lambda: service.num_ready() == 2)
        assert wait_until(lambda: service.get("/readyz").status_code == 200)
        # What answers for a worker takes connections for a tenth of a second yet.
        assert wait_until(lambda: service.classify().json() == expected, seconds=1)
        # A pause that doubles: no loop.
        assert service.log.read_text().count("tried again in") <= 5


def test_an_artifact_of_another_hash_than_the_setting_says_is_not_served(
    artifact: Path, tmp_path: Path
):
    command = [sys.executable, "serving/run.py", "--artifact", str(artifact)]
    command += ["--port", str(free_port())]
    environment = {**os.environ, "CLASSIFIER_ARTIFACT_SHA256": "a" * 64}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    require_named(result.stderr, "error", "aaaaaaaaaaaa")
    assert "Traceback" not in result.stderr


def test_readiness_goes_down_first_and_what_comes_until_the_end_is_served(
    artifact: Path, tmp_path: Path
):
    with running(artifact, tmp_path, CLASSIFIER_DRAIN_S="2", CLASSIFIER_WORKERS="2") as service:
        assert wait_until(lambda: service.num_ready() == 2)
        service.process.send_signal(signal.SIGTERM)
        assert wait_until(lambda: service.get("/readyz").status_code == 503)

        def is_the_last_of_its_connection() -> bool:
            answer = service.classify()
            assert answer.status_code == 200
            return answer.headers.get("Connection") == "close"

        # The other worker may hear of the end a little later.
        assert wait_until(is_the_last_of_its_connection)
        assert service.process.wait(60) == 0
        assert not service.workers


# The backlog, with a server in this process, so that connections come at the worst moment.


REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def application(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.sleep(0.05)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"served"})


def answer_of(client: socket.socket) -> bytes:
    received = b""
    while not received.endswith(b"\r\n0\r\n\r\n"):  # the last of its chunks
        part = client.recv(10_000)
        if not part:
            break
        received += part
    return received


def test_connections_that_nobody_has_accepted_are_served_before_the_end():
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    early: list[socket.socket] = []
    started = threading.Event()

    def connect() -> None:
        # The server's loop waits for this function, and accepts nothing meanwhile.
        for _ in range(30):
            early.append(socket.create_connection(address))
        for client in early[:20]:
            client.sendall(REQUEST)

    def tell() -> bool:
        started.set()
        return True

    config = uvicorn.Config(application, lifespan="off", log_config=None)
    server = DrainingServer(config, listener, tell, connect, drain_s=0, max_per_address=30)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running_server = pool.submit(server.run)
        assert started.wait(30)
        server.should_exit = True
        assert wait_until(lambda: len(early) == 30)
        for client in early[20:]:
            client.sendall(REQUEST)
        answers = [answer_of(client) for client in early]
        running_server.result(30)
    assert all(answer.startswith(b"HTTP/1.1 200 OK") for answer in answers)
    with pytest.raises(OSError):
        socket.create_connection(address, timeout=5)
    for client in early:
        client.close()


@contextmanager
def server_here(
    max_per_address: int, refuser: Refuser = lambda _: None
) -> Iterator[tuple[str, int]]:
    listener = socket.create_server(("127.0.0.1", 0))
    started = threading.Event()

    def tell() -> bool:
        started.set()
        return True

    config = uvicorn.Config(application, lifespan="off", log_config=None)
    server = DrainingServer(
        config, listener, tell, lambda: None, 0, max_per_address, refuser=refuser
    )
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running_server = pool.submit(server.run)
        assert started.wait(30)
        try:
            yield listener.getsockname()
        finally:
            server.should_exit = True
            running_server.result(30)


def test_a_connection_on_which_no_request_comes_is_closed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("serving.connections.HEAD_S", 0.5)
    with server_here(max_per_address=9) as address:
        silent, half, used = (socket.create_connection(address, timeout=20) for _ in range(3))
        half.sendall(REQUEST + REQUEST[:-2])
        assert b"served" in answer_of(half)
        # One that is used goes on, although it is without a request now and then.
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            used.sendall(REQUEST)
            assert b"served" in answer_of(used)
        for client in (silent, half):
            assert client.recv(1000) == b""
        used.sendall(REQUEST)
        assert b"served" in answer_of(used)
        for client in (silent, half, used):
            client.close()


def test_an_address_has_a_limited_number_of_connections():
    with server_here(max_per_address=2) as address:
        first, second, third = (socket.create_connection(address, timeout=20) for _ in range(3))
        for client in (first, second):
            client.sendall(REQUEST)
            assert b"served" in answer_of(client)
        refused = http.client.HTTPResponse(third)
        refused.begin()
        assert (refused.status, refused.headers["Retry-After"]) == (429, "1")
        problem = Problem.model_validate_json(refused.read())
        require_named(problem.detail, 2, "127.0.0.1")
        first.close()
        assert wait_until(lambda: is_answered(address))
        for client in (second, third):
            client.close()


def test_a_refused_connection_that_sends_a_picture_reads_the_refusal():
    with server_here(max_per_address=1) as address:
        first = socket.create_connection(address, timeout=20)
        first.sendall(REQUEST)
        assert b"served" in answer_of(first)
        for _ in range(20):
            with socket.create_connection(address, timeout=20) as refused:
                for _ in range(20):  # closed with something unread, it would be reset
                    refused.sendall(b"x" * 10_000)
                answer = http.client.HTTPResponse(refused)
                answer.begin()
                assert answer.status == 429 and answer.read()
        first.close()


def test_a_request_that_is_refused_by_its_head_reaches_no_application_and_reads_why():
    def refuser(request: Any) -> bytes | None:
        if request["method"] == "GET":
            return None
        return b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 2\r\n\r\nno"

    with server_here(max_per_address=30, refuser=refuser) as address:
        for _ in range(20):
            client = http.client.HTTPConnection(*address, timeout=20)
            client.request("POST", "/", b"x" * 200_000)
            answer = client.getresponse()
            assert (answer.status, answer.read()) == (429, b"no")
            client.close()
        assert wait_until(lambda: is_answered(address))


def is_answered(address: tuple[str, int]) -> bool:
    with socket.create_connection(address, timeout=20) as client:
        client.sendall(REQUEST)
        with contextlib.suppress(ConnectionError):
            return b"served" in answer_of(client)
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="the filter is Linux's")
@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
def test_connections_that_have_begun_are_kept_when_no_more_may_begin(
    family: socket.AddressFamily, host: str
):
    with socket.create_server((host, 0), family=family) as listener:
        address = listener.getsockname()[:2]
        with socket.create_connection(address) as client:
            refuse_new_connections(listener)
            with pytest.raises(TimeoutError):
                socket.create_connection(address, timeout=0.3)
            taken, _ = listener.accept()
            with taken:
                client.sendall(b"late")
                assert taken.recv(10) == b"late"


def test_answers_wait_for_no_acknowledgement():
    async def has_no_delay() -> bool:
        accepted = asyncio.get_running_loop().create_future()

        class Protocol(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                connection = transport.get_extra_info("socket")
                accepted.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
                transport.close()

        listener = listening_socket("127.0.0.1", 0)
        server = await asyncio.get_running_loop().create_server(Protocol, sock=listener)
        async with server:
            _, writer = await asyncio.open_connection(*listener.getsockname())
            found = await accepted
            writer.close()
        return bool(found)

    assert asyncio.run(has_no_delay())


@pytest.mark.skipif(not LIBRARY.is_file(), reason="the native engine is not built")
def test_a_native_network_answers_pictures_and_tensors_alike(tiny_checkpoint: Path, tmp_path: Path):
    artifact = native.main(NativeConfig(tiny_checkpoint, tmp_path / "artifact", reference=True))
    spec = open_runtime(artifact).info.preprocess
    image = preprocess(load_dataset("digits").val[0].read(), spec)
    tensor = {"name": "images", "datatype": "FP32", "shape": [1, *image.shape]}
    with running(artifact, tmp_path) as service:
        answer = service.classify().json()
        name = service.get("/info").json()["model"]
        infer = f"http://127.0.0.1:{service.port}/v2/models/{name}/infer"
        inputs = [{**tensor, "data": image.ravel().tolist()}]
        logits = httpx.post(infer, json={"inputs": inputs}, timeout=30).json()["outputs"][0]["data"]
    best = softmax(np.asarray([logits], np.float32))[0]
    expected = {str(index): best[index] for index in np.argsort(-best)[: len(answer)]}
    assert {one["label"]: one["probability"] for one in answer} == pytest.approx(expected)
