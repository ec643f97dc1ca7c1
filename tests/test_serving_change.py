import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from facts import raises_naming, require_named
from processes import wait_until
from services import ROOT, Running, running

from efficientnet.images.datasets import load_dataset
from serving.control import MAX_MESSAGE_BYTES, Control, ControlError, ask, control_path
from serving.settings import artifact_sha256

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peer's user is asked of Linux")

ALLOWED = "--allow-change"


def change(service: Running, artifact: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "serving/change.py", "--to", str(artifact)]
    command += ["--port", str(service.port)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def served(service: Running) -> str:
    answer = service.classify()
    assert answer.status_code == 200
    return answer.headers["X-Artifact-SHA256"]


class Load:
    """Clients that ask all the time, half of them by connections that they keep."""

    def __init__(self, service: Running) -> None:
        self.address = f"http://127.0.0.1:{service.port}"
        self.seen: Counter[tuple[int, str]] = Counter()
        self.readiness: set[int] = set()
        self.is_over = threading.Event()

    def keep_connection(self) -> None:
        with httpx.Client(timeout=60) as client:
            while not self.is_over.is_set():
                self.ask(client)

    def connect_each_time(self) -> None:
        while not self.is_over.is_set():
            with httpx.Client(timeout=60) as client:
                self.ask(client)

    def ask(self, client: httpx.Client) -> None:
        headers = {"Content-Type": "image/png"}
        answer = client.post(f"{self.address}/classify", content=PICTURE, headers=headers)
        self.seen[answer.status_code, answer.headers.get("X-Artifact-SHA256", "")] += 1
        self.readiness.add(client.get(f"{self.address}/readyz").status_code)


PICTURE = load_dataset("digits").val[0].read()


@contextlib.contextmanager
def load_on(service: Running) -> Iterator[Load]:
    load = Load(service)
    with ThreadPoolExecutor(4) as pool:
        clients = [
            pool.submit(client) for client in 2 * (load.keep_connection, load.connect_each_time)
        ]
        try:
            yield load
        finally:
            load.is_over.set()
        for client in clients:
            client.result()


def test_a_change_under_load_loses_no_request_and_new_workers_serve_it_too(
    tiny_artifact: Path, openvino_artifact: Path, tmp_path: Path
):
    old, new = artifact_sha256(tiny_artifact), artifact_sha256(openvino_artifact)
    settings = {"CLASSIFIER_WORKERS": "2", "CLASSIFIER_DRAIN_S": "1"}
    with running(tiny_artifact, tmp_path, ALLOWED, **settings) as service:
        assert wait_until(lambda: service.num_ready() == 2)
        before = service.workers
        with load_on(service) as load:
            assert wait_until(lambda: load.seen[200, old] > 20)
            done = change(service, openvino_artifact)
            assert (done.returncode, done.stdout) == (0, f"{new}\n"), done.stderr
            # The old workers have ended, and with them all connections to them.
            assert not before & service.workers
            num_old = load.seen[200, old]
            assert wait_until(lambda: load.seen[200, new] > 20)
        assert load.seen.keys() == {(200, old), (200, new)} and load.seen[200, old] == num_old
        assert load.readiness == {200}
        info = service.get("/info").json()
        assert (info["artifact_sha256"], info["runtime"]) == (new, "openvino")
        told = re.findall(r'classifier_model_info{.*artifact_sha256="(\w+)"', metrics_of(service))
        assert set(told) == {new}
        for worker in service.workers:
            os.kill(worker, signal.SIGKILL)
        assert wait_until(lambda: service.num_ready() == 6)
        assert {served(service) for _ in range(10)} == {new}
        # And back, as there is no end to it.
        assert change(service, tiny_artifact).returncode == 0
        assert served(service) == old
        service.process.terminate()
        assert service.process.wait(60) == 0
        assert not control_path(service.port).parent.exists()


def metrics_of(service: Running) -> str:
    return service.get("/metrics").text


def test_an_upload_that_is_on_its_way_is_answered_by_the_worker_that_has_it(
    tiny_artifact: Path, openvino_artifact: Path, tmp_path: Path
):
    old, new = artifact_sha256(tiny_artifact), artifact_sha256(openvino_artifact)
    # The change may take longer than the 5 s after which so few bytes would be too slow.
    settings = {"CLASSIFIER_DRAIN_S": "1", "CLASSIFIER_MIN_UPLOAD_BYTES_PER_S": "1"}
    with (
        running(tiny_artifact, tmp_path, ALLOWED, **settings) as service,
        ThreadPoolExecutor(1) as pool,
        socket.create_connection(("127.0.0.1", service.port), timeout=60) as client,
    ):
        head = "POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
        client.sendall(f"{head}Content-Length: {len(PICTURE)}\r\n\r\n".encode() + PICTURE[:50])
        assert served(service) == old
        changing = pool.submit(change, service, openvino_artifact)
        assert wait_until(lambda: served(service) == new, 60)
        assert {served(service) for _ in range(10)} == {new} and not changing.done()
        client.sendall(PICTURE[50:])
        answer = client.recv(10_000).decode().lower()
        assert answer.startswith("http/1.1 200 ok")
        assert f"x-artifact-sha256: {old}" in answer and "connection: close" in answer
        assert changing.result().returncode == 0


def test_an_artifact_that_fails_its_checks_leaves_the_old_one_serving(
    tiny_artifact: Path, openvino_artifact: Path, tmp_path: Path
):
    damaged = Path(shutil.copytree(tiny_artifact, tmp_path / "damaged"))
    (damaged / "model.onnx").write_bytes(b"damaged")
    # Its files are what its manifest says, and its network is not: only a worker finds out.
    unfit = Path(shutil.copytree(tiny_artifact, tmp_path / "unfit"))
    manifest = json.loads((unfit / "manifest.json").read_text())
    manifest |= {
        "class_names": manifest["class_names"][:9],
        "output": {**manifest["output"], "shape": [9]},
    }
    (unfit / "manifest.json").write_text(json.dumps(manifest))
    with running(tiny_artifact, tmp_path, ALLOWED) as service:
        expected, workers = served(service), service.workers
        for artifact, fact in (
            (tmp_path / "none", tmp_path / "none"),
            (damaged, damaged / "model.onnx"),
            (unfit, "class_names"),
        ):
            done = change(service, artifact)
            assert done.returncode == 1 and not done.stdout
            require_named(done.stderr, "error", fact)
            assert "Traceback" not in done.stderr
            assert wait_until(lambda: service.workers == workers)
            assert served(service) == expected
        assert service.get("/readyz").status_code == 200
        assert change(service, openvino_artifact).returncode == 0


def test_without_the_flag_nothing_listens_and_the_command_says_so(
    tiny_artifact: Path, tmp_path: Path
):
    with running(tiny_artifact, tmp_path) as service:
        assert not control_path(service.port).exists()
        done = change(service, tiny_artifact)
        assert done.returncode == 1
        require_named(done.stderr, "--allow-change", "--port", service.port)


def test_one_artifact_alone_and_any_contradict_each_other(tiny_artifact: Path):
    command = [sys.executable, "serving/run.py", "--artifact", str(tiny_artifact), ALLOWED]
    environment = {**os.environ, "CLASSIFIER_ARTIFACT_SHA256": "a" * 64}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    require_named(done.stderr, "CLASSIFIER_ARTIFACT_SHA256", ALLOWED)


def test_a_command_that_is_ended_calls_its_change_off_and_none_is_done_beside_it(
    tiny_artifact: Path, openvino_artifact: Path, tmp_path: Path
):
    with running(tiny_artifact, tmp_path, ALLOWED) as service:
        old, workers, path = served(service), service.workers, control_path(service.port)
        with connection_to(path), connection_to(path) as first:  # one says nothing
            first.sendall(bytes(openvino_artifact))
            with raises_naming(ControlError, "already"):
                ask(path, tiny_artifact)
        assert wait_until(lambda: "no change to" in service.log.read_text())
        assert wait_until(lambda: service.workers == workers)
        assert served(service) == old
        assert ask(path, openvino_artifact) == artifact_sha256(openvino_artifact)


@contextlib.contextmanager
def connection_to(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(str(path))
        yield connection


NOBODY = 65534


def ask_as_another_user(path: Path) -> str:
    """Return what another user is told."""

    def try_to_ask(told: "multiprocessing.connection.Connection") -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        try:
            with connection_to(path) as connection:
                told.send(connection.recv(MAX_MESSAGE_BYTES).decode())
        except OSError as error:
            told.send(type(error).__name__)

    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=try_to_ask, args=(theirs,))
    process.start()
    told = ours.recv()
    process.join()
    return told


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_another_user_is_kept_out_by_the_folder_by_the_socket_and_by_who_it_is():
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(1) as pool:
        Path(scratch).chmod(0o711)  # pytest's own cannot be looked into by another user
        path = Path(scratch) / "control" / "socket"
        control = Control(path)
        assert (path.parent.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)
        assert ask_as_another_user(path) == "PermissionError"
        path.parent.chmod(0o711)
        assert ask_as_another_user(path) == "PermissionError"
        path.chmod(0o666)
        accepted = pool.submit(control.accept)
        require_named(ask_as_another_user(path), f"user {NOBODY}", 0)
        assert accepted.result(10) is None
        control.close()
        assert not path.parent.exists()


def test_a_folder_that_others_can_look_into_is_refused(tmp_path: Path):
    folder = tmp_path / "control"
    folder.mkdir()
    folder.chmod(0o755)
    with raises_naming(ControlError, folder, 755, 700):
        Control(folder / "socket")
    folder.chmod(0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:  # by a killed service
        left.bind(str(folder / "socket"))
    with raises_naming(ControlError, folder / "socket", ALLOWED):
        ask(folder / "socket", tmp_path)
    Control(folder / "socket").close()
