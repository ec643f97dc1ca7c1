import asyncio
import concurrent.futures
import errno
import functools
import http.client
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import numpy as np
import psutil
import pytest
from facts import raises_naming, require_named
from PIL import Image
from processes import listening_ports

from efficientnet.formats.artifact import read_artifact
from efficientnet.images.datasets import load_dataset
from efficientnet.images.preprocess import ImageError, preprocess
from efficientnet.runtimes import open_runtime
from efficientnet.runtimes.probabilities import softmax
from serving.answers import ModelFacts, Prediction, Problem
from serving.demo import free_port, running_service, stop, wait_until_ready
from serving.pack import PackError, with_packages
from serving.settings import DEFAULT_ARTIFACT, Settings, read_settings
from serving.stages import Stage, StageTimes
from serving.tracing import PACKAGE
from serving.work import IsWanted, WorkQueue

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = "env/docker/Dockerfile"
BOUNDARY = "picture-boundary"

# The service computes as the shared package does, with a batch of one; only the last digits of
# float32 may differ when a batch is larger.
PROBABILITY_TOLERANCE = 1e-5


@pytest.fixture
def service(service_port: int) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{service_port}", timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def service_module(tiny_artifact: Path) -> Iterator[Any]:
    # Settings are read at import; no other test imports this module.
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # Deprecations inside BentoML's and OpenTelemetry's own imports.
        warnings.simplefilter("ignore")
        patch.setenv("CLASSIFIER_ARTIFACT", str(tiny_artifact))
        yield importlib.import_module("serving.service")


@functools.cache
def digit(index: int = 0) -> bytes:
    return load_dataset("digits").val[index].read()


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def classify(service: httpx.Client, picture: bytes, **fields: str) -> httpx.Response:
    return service.post("/classify", files={"image": ("picture", picture)}, data=fields)


def form(picture: bytes) -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="p"\r\n\r\n'
    return head.encode() + picture + f"\r\n--{BOUNDARY}--\r\n".encode()


def in_chunks(data: bytes) -> Generator[bytes]:
    for start in range(0, len(data), 1 << 16):
        yield data[start : start + (1 << 16)]


def assert_lives(service: httpx.Client) -> None:
    assert service.get("/livez").status_code == 200
    assert classify(service, digit()).status_code == 200


def assert_refuses(response: httpx.Response, status: int, reason: str) -> None:
    assert response.headers["Content-Type"] == "application/problem+json"
    problem = Problem.model_validate(response.json())
    assert (response.status_code, problem.status) == (status, status)
    assert reason in problem.detail


def test_served_probabilities_equal_those_of_the_artifact_in_a_batch(
    service: httpx.Client, tiny_artifact: Path
) -> None:
    runtime = open_runtime(tiny_artifact)
    pictures = [digit(index) for index in range(8)]
    images = np.stack([preprocess(picture, runtime.info.preprocess) for picture in pictures])
    expected = softmax(runtime.infer(images))
    for picture, probabilities in zip(pictures, expected, strict=True):
        answer = classify(service, picture, top_k="10").json()
        served = {prediction["class_index"]: prediction["probability"] for prediction in answer}
        for index, probability in enumerate(probabilities):
            assert served[index] == pytest.approx(probability, abs=PROBABILITY_TOLERANCE)


def test_answer_names_five_classes_and_the_most_probable_first(service: httpx.Client) -> None:
    answer = classify(service, digit()).json()
    assert [set(prediction) for prediction in answer] == [
        {"label", "class_index", "probability"}
    ] * 5
    probabilities = [prediction["probability"] for prediction in answer]
    assert probabilities == sorted(probabilities, reverse=True)
    assert all(prediction["label"] == str(prediction["class_index"]) for prediction in answer)


def test_top_k_is_taken_from_the_form_or_the_address(service: httpx.Client) -> None:
    files = {"image": ("picture", digit())}
    assert len(classify(service, digit(), top_k="2").json()) == 2
    assert len(service.post("/classify?top_k=3", files=files).json()) == 3


def test_top_k_above_the_number_of_classes_gives_all_of_them(service: httpx.Client) -> None:
    answer = classify(service, digit(), top_k="1000").json()
    assert len(answer) == 10
    assert sum(prediction["probability"] for prediction in answer) == pytest.approx(1)


@pytest.mark.parametrize("top_k", ["0", "-1", "2.5", "many"])
def test_top_k_that_is_no_count_is_refused(service: httpx.Client, top_k: str) -> None:
    reason = f"top_k is '{top_k}', expected a whole number of at least 1"
    assert_refuses(classify(service, digit(), top_k=top_k), 422, reason)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_pictures_of_every_mode_are_classified(service: httpx.Client, mode: str) -> None:
    image = noise()
    if mode == "I;16":
        image = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    picture = encoded(image if mode == "I;16" else image.convert(mode))
    assert Image.open(io.BytesIO(picture)).mode == mode
    assert len(classify(service, picture).json()) == 5


def test_cmyk_pictures_are_classified(service: httpx.Client) -> None:
    assert len(classify(service, encoded(noise().convert("CMYK"), "JPEG")).json()) == 5


def test_picture_turned_by_exif_is_classified_upright(service: httpx.Client) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a viewer turns it by 90 degrees clockwise
    lying = encoded(noise().transpose(Image.Transpose.ROTATE_90), exif=exif)
    assert classify(service, lying).json() == classify(service, encoded(noise())).json()


REFUSED = {
    "empty": (b"", 422, "the image is empty (0 bytes)"),
    "text": (b"what is in this picture?", 422, "not an image"),
    "truncated": (encoded(noise(300, 300), "JPEG")[:4000], 422, "damaged or truncated"),
    "51 megapixels": (encoded(Image.new("L", (8000, 6400))), 413, "50 megapixels"),
    "400 megapixels": (encoded(Image.new("1", (20000, 20000))), 413, "400000000 pixels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_upload_that_is_no_usable_picture_is_refused(service: httpx.Client, name: str) -> None:
    picture, status, reason = REFUSED[name]
    assert_refuses(classify(service, picture), status, reason)
    assert_lives(service)


def test_picture_of_exactly_the_largest_size_is_taken(service: httpx.Client) -> None:
    # Pillow does not mind bytes behind the end of a PNG.
    picture = digit().ljust(20_000_000, b"\0")
    assert classify(service, picture).json() == classify(service, digit()).json()


@pytest.mark.parametrize("num_bytes", [20_000_001, 25_000_000])
@pytest.mark.parametrize("connection", ["keep-alive", "close"])
@pytest.mark.parametrize("is_chunked", [False, True], ids=["declared", "chunked"])
def test_client_that_sends_too_much_reads_the_reason(
    service_port: int, service: httpx.Client, num_bytes: int, connection: str, is_chunked: bool
) -> None:
    body = form(digit().ljust(num_bytes, b"\0"))
    headers = {
        "Content-Type": f"multipart/form-data; boundary={BOUNDARY}",
        "Connection": connection,
    }
    if is_chunked:
        headers["Transfer-Encoding"] = "chunked"
    client = http.client.HTTPConnection("127.0.0.1", service_port, timeout=60)
    client.request(
        "POST",
        "/classify",
        in_chunks(body) if is_chunked else body,
        headers,
        encode_chunked=is_chunked,
    )
    response = client.getresponse()
    assert response.status == 413
    assert "larger than the 20 MB allowed" in json.loads(response.read())["error"]
    client.close()
    assert_lives(service)


def test_form_without_a_picture_file_is_refused(service: httpx.Client) -> None:
    missing = service.post("/classify", files={"top_k": (None, "1")})
    assert_refuses(missing, 422, "the field 'image' is missing; send it as a form field")
    text = service.post("/classify", files={"image": (None, "http://127.0.0.1/picture.png")})
    assert_refuses(text, 422, "the field 'image' is text, expected a picture file")
    headers = {"Content-Type": "multipart/form-data; boundary=other"}
    broken = service.post("/classify", content=form(digit()), headers=headers)
    assert_refuses(broken, 400, "the form cannot be read")


def classify_batch(service: httpx.Client, pictures: list[bytes], **fields: str) -> httpx.Response:
    files = [("images", ("picture", picture)) for picture in pictures]
    return service.post("/classify/batch", files=files, data=fields)


def test_a_batch_is_answered_in_its_order_and_a_broken_picture_harms_no_other(
    service: httpx.Client,
) -> None:
    truncated = encoded(noise(), "JPEG")[:300]
    pictures = [digit(0), b"text", digit(1), truncated, digit(2)]
    response = classify_batch(service, pictures, top_k="3")
    assert response.status_code == 200
    answers = response.json()
    for picture, answer in zip(pictures, answers, strict=True):
        alone = classify(service, picture, top_k="3")
        if alone.status_code == 200:
            assert answer == {"predictions": alone.json()}
        else:
            problem = alone.json()
            assert answer == {key: problem[key] for key in ("status", "code", "error")}
    assert [answer.get("code") for answer in answers].count("no_picture") == 2


def test_a_batch_has_the_limits_of_one_picture_and_one_of_its_length(
    service: httpx.Client,
) -> None:
    most = classify_batch(service, [digit()] * 32)
    assert (most.status_code, len(most.json())) == (200, 32)
    too_many = classify_batch(service, [digit()] * 33)
    assert_refuses(too_many, 413, "the form holds 33 pictures, expected at most 32")
    largest = classify_batch(service, [digit(), b"x" * 20_000_001])
    assert [answer.get("status") for answer in largest.json()] == [None, 413]
    too_large = classify_batch(service, [b"x" * 11_000_000] * 2)
    assert_refuses(too_large, 413, "larger than the 20 MB allowed")


def test_a_batch_without_pictures_is_told_how_to_send_them(service: httpx.Client) -> None:
    wrong = service.post("/classify/batch", files={"image": ("picture", digit())})
    assert_refuses(wrong, 422, "the field 'images' is missing; send it as a form field")
    text = service.post("/classify/batch", files={"images": (None, "picture.png")})
    assert_refuses(text, 422, "the field 'images' is text")
    no_form = service.post("/classify/batch", json=[])
    assert_refuses(no_form, 415, "curl -F images=@one.jpg -F images=@two.jpg .../classify/batch")


def test_answers_tell_how_long_each_stage_took(service: httpx.Client) -> None:
    for response in (classify(service, digit()), classify_batch(service, [digit()] * 2)):
        stages = dict(
            re.findall(r"(\w+);dur=(\d+\.\d+)(?:, |$)", response.headers["Server-Timing"])
        )
        assert list(stages) == ["decode", "preprocess", "queue", "infer"]
        assert float(stages["decode"]) > 0 and float(stages["infer"]) > 0


def test_wrong_address_and_wrong_method_are_json_errors(service: httpx.Client) -> None:
    assert_refuses(service.get("/pictures"), 404, "there is nothing at /pictures; see /docs")
    assert_refuses(service.get("/classify"), 405, "/classify does not take GET, use POST")


def test_client_that_vanishes_while_sending_does_no_harm(
    service_port: int, service: httpx.Client
) -> None:
    head = (
        "POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000000\r\n"
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n"
    )
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", service_port)) as client:
            client.sendall(head.encode() + form(bytes(100_000)))
    assert_lives(service)


def test_many_requests_at_once_get_the_answers_of_their_own_pictures(
    service: httpx.Client,
) -> None:
    pictures = [digit(index % 5) for index in range(30)]
    expected = [classify(service, digit(index)).json() for index in range(5)]
    with concurrent.futures.ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(lambda picture: classify(service, picture).json(), pictures))
    assert answers == [expected[index % 5] for index in range(30)]


def test_health_metrics_and_model_are_answered(service: httpx.Client) -> None:
    assert service.get("/livez").status_code == 200
    assert service.get("/readyz").status_code == 200
    assert "bentoml_service_request_total" in service.get("/metrics").text
    facts = ModelFacts.model_validate(service.get("/model").json())
    assert (facts.variant, facts.image_size, facts.num_classes) == ("tiny", 32, 10)


def metric(text: str, name: str) -> float:
    """Add up a metric's samples of all labels."""
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.M))


def test_metrics_tell_stages_calls_places_and_the_artifact(service: httpx.Client) -> None:
    before = service.get("/metrics").text
    for index in range(3):
        assert classify(service, digit(index)).status_code == 200
    after = service.get("/metrics").text

    def more(name: str) -> float:
        return metric(after, name) - metric(before, name)

    for stage in get_args(Stage):
        label = f'{{stage="{stage}"}}'
        assert more(re.escape(f"classifier_stage_seconds_count{label}")) == 3
    assert 1 <= more("classifier_batch_images_count") <= 3
    assert more("classifier_batch_images_sum") == 3
    assert re.search(r"^classifier_in_flight 0\.0$", after, re.M)
    sha256 = service.get("/info").json()["artifact_sha256"]
    (model,) = re.findall(r"^classifier_model_info{(.*)} 1\.0$", after, re.M)
    assert f'artifact_sha256="{sha256}"' in model and 'model="tiny"' in model


def test_the_dashboard_asks_for_metrics_that_there_are(service: httpx.Client) -> None:
    classify(service, digit(0))
    names = set(re.findall(r"^(\w+?)(?:{.*})? ", service.get("/metrics").text, re.M))
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "classifier.json").read_text())
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    asked = set(re.findall(r"\b(?:classifier|bentoml_service)_\w+", " ".join(queries)))
    assert len(asked) > 5 and asked <= names


def test_docs_and_page_need_no_other_host(service: httpx.Client) -> None:
    docs = service.get("/docs").text
    addresses = re.findall(r'(?:src|href)="([^"]+)"', docs)
    assert len(addresses) == 3
    assert all(service.get(address).status_code == 200 for address in addresses)
    page = service.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(r"""(?:src|href)=["'](?:https?:)?//|@import|url\(http""", page.text)
    assert service.head("/").status_code == 200


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_no_torch_in_the_service_process(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In a process that has imported what it wants by itself.
    monkeypatch.setattr("serving.demo.subprocess", subprocess)
    with running_service(tiny_artifact):
        require_no_torch()


def require_no_torch() -> None:
    supervisors = [
        process
        for process in psutil.Process().children()
        # One that has just ended has no command line.
        if process.status() != psutil.STATUS_ZOMBIE and "serving.supervisor" in process.cmdline()
    ]
    assert supervisors
    for supervisor in supervisors:
        (worker,) = supervisor.children()
        maps = Path(f"/proc/{worker.pid}/maps").read_text()
        assert "onnxruntime" in maps
        assert "torch" not in maps


def test_classifier_works_without_a_server_and_is_ready_after_its_constructor(
    service_module: Any,
) -> None:
    classifier = service_module.Classifier()
    assert asyncio.run(classifier.__is_ready__())
    (best,) = classifier.classify(digit(), top_k=1)
    assert best.label == str(best.class_index)
    with pytest.raises(ImageError, match="not an image"):
        classifier.classify(b"text", top_k=1)
    classifier.stop_pool()


class FailingClassifier:
    """Has a bug that shows with every picture."""

    settings = Settings()

    def __init__(self) -> None:
        self.work = WorkQueue(num_threads=1, max_places=1, timeout_s=60)

    def prepare(self, data: bytes, is_wanted: IsWanted, times: StageTimes) -> None:
        raise IndexError("list index out of\nrange")


@pytest.fixture
def failing_app(service_module: Any) -> Iterator[Any]:
    app = service_module.app
    app.state.classifier = FailingClassifier()
    yield app
    app.state.classifier.work.close()


def post_in_process(app: Any, picture: bytes) -> httpx.Response:
    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/classify", files={"image": ("picture", picture)})

    return asyncio.run(post())


def test_bug_is_answered_in_json_without_its_details(failing_app: Any) -> None:
    assert_refuses(post_in_process(failing_app, digit()), 500, "the service failed")


def test_full_disk_is_said_plainly(failing_app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_is_full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", disk_is_full)
    response = post_in_process(failing_app, bytes(2_000_000))
    assert_refuses(response, 507, "the disk of the service is full")


def test_settings_come_from_the_environment() -> None:
    assert read_settings({}) == Settings()
    assert read_settings({"CLASSIFIER_ARTIFACT": ""}).artifact == DEFAULT_ARTIFACT
    settings = read_settings({"CLASSIFIER_ARTIFACT": "artifacts/x", "CLASSIFIER_TIMEOUT_S": "7"})
    assert (settings.artifact, settings.timeout_s) == (ROOT / "artifacts" / "x", 7)


@pytest.mark.parametrize("value", ["0", "-3", "1.5", "lots"])
def test_setting_that_is_no_count_is_refused(value: str) -> None:
    with raises_naming(ValueError, "CLASSIFIER_NUM_THREADS", value):
        read_settings({"CLASSIFIER_NUM_THREADS": value})


def serve(*flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "serving/run.py", *flags],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_taken_port_is_said_plainly(tiny_artifact: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = serve("--artifact", str(tiny_artifact), "--port", str(port))
    assert result.returncode == 1
    require_named(result.stderr, "error", f"port {port}")
    assert "Traceback" not in result.stderr


def test_damaged_artifact_is_refused_before_the_service_starts(
    tiny_artifact: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_artifact, damaged)
    with (damaged / "model.onnx").open("ab") as program:
        program.write(b"!")
    for directory, reason in (
        (damaged, "is damaged: its SHA-256 is"),
        (tiny_checkpoint, "is not an artifact: there is no manifest.json in it"),
    ):
        result = serve("--artifact", str(directory))
        assert result.returncode == 1
        assert result.stderr.startswith("error: ")
        assert reason in result.stderr
        assert "Traceback" not in result.stderr


def test_wrong_flags_and_variables_are_refused() -> None:
    host = serve("--host", "localhost.example")
    assert host.returncode == 2
    require_named(host.stderr, "--host", "IP")
    port = serve("--port", "70000")
    assert port.returncode == 2
    require_named(port.stderr, "--port", "1 to 65535")
    variable = serve(CLASSIFIER_TIMEOUT_S="soon")
    assert variable.returncode == 1
    require_named(variable.stderr, "CLASSIFIER_TIMEOUT_S", "soon")


def test_demo_classifies_a_held_out_picture_and_leaves_nothing_running(
    tiny_artifact: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.html"
    report.write_text("<html></html>")
    command = [sys.executable, str(ROOT / "serving" / "demo.py")]
    command += ["--artifact", str(tiny_artifact), "--report", str(report)]
    # Other tests may serve the same artifact meanwhile.
    environment = os.environ | {"STARTED_BY": str(tmp_path)}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    answer = [Prediction.model_validate(p) for p in json.loads(result.stdout.splitlines()[-1])]
    assert len(answer) == 5
    assert (tmp_path / "reports" / "demo" / "digits-0002.png").read_bytes() == digit()
    assert "the class '2'" in result.stderr
    assert str(report) in result.stderr
    assert f"serving/run.py --artifact {os.path.relpath(tiny_artifact, tmp_path)}" in result.stderr
    assert not [pid for pid in psutil.pids() if is_started_by(pid, tmp_path)]


def is_started_by(pid: int, test: Path) -> bool:
    try:
        return psutil.Process(pid).environ().get("STARTED_BY") == str(test)
    except psutil.Error:
        return False


def has_uv() -> bool:
    return shutil.which("uv") is not None or importlib.util.find_spec("uv") is not None


def copy_project(project: Path) -> None:
    for folder in ("serving", "efficientnet"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, project / folder, ignore=ignore)
    for file in ("bentofile.yaml", "pyproject.toml", ".gitignore"):
        shutil.copy(ROOT / file, project)


def bento_environment(tmp_path: Path) -> dict[str, str]:
    home = tmp_path / "home"
    home.mkdir()
    # Without what a service of this process was told to serve.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CLASSIFIER_")}
    return environment | {"BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True"}


@pytest.mark.skipif(not has_uv(), reason="bentoml build would install uv from the network")
@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_a_bento_without_its_artifact_is_not_built(
    tiny_artifact: Path, tmp_path: Path, is_elsewhere: bool
) -> None:
    project = tmp_path / "project"
    copy_project(project)
    environment = bento_environment(tmp_path) | {"PYTHONPATH": str(project)}
    reason = "is not an artifact: there is no manifest.json in it"
    if is_elsewhere:
        environment["CLASSIFIER_ARTIFACT"] = str(tiny_artifact)
        reason = "use 'python serving/pack.py', which packs that one"
    built = subprocess.run(
        [sys.executable, "-m", "bentoml", "build"],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode != 0
    assert reason in built.stdout + built.stderr
    assert "Successfully built" not in built.stdout + built.stderr


@pytest.mark.skipif(not has_uv(), reason="bentoml build would install uv from the network")
def test_packed_bento_holds_the_artifact_and_serves_it(tiny_artifact: Path, tmp_path: Path) -> None:
    environment = bento_environment(tmp_path)
    built = subprocess.run(
        [sys.executable, str(ROOT / "serving/pack.py"), "--artifact", str(tiny_artifact)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    tag = built.stdout.splitlines()[-1]
    assert f"bentoml serve {tag}" in built.stderr
    bento = Path(environment["BENTOML_HOME"]) / "bentos" / tag.replace(":", "/")
    # What `bentoml containerize` builds: nothing runs as root, no package is left to chance.
    steps = re.findall(r"^(USER|ENTRYPOINT|RUN) (.*)$", (bento / DOCKERFILE).read_text(), re.M)
    assert next(step for step in steps if step[0] != "RUN") == ("USER", "bentoml")
    assert steps[-1][0] == "ENTRYPOINT"
    (user,) = re.findall(r"^ARG BENTO_USER_UID=(\d+)$", (bento / DOCKERFILE).read_text(), re.M)
    for flavor in ("cpu", "gpu"):
        pod = (ROOT / "deploy" / "kubernetes" / f"{flavor}.yaml").read_text()
        assert f"runAsUser: {user}\n" in pod
    packages = (bento / "env" / "python" / "requirements.txt").read_text().split()
    assert packages and all("==" in package for package in packages)
    # Its own copy of the code, and not the installed project, as on a machine without the project.
    source = bento / "src"
    environment["PYTHONPATH"] = str(source)
    for command in (["bentoml", "serve", tag], ["serving.run"]):
        port = free_port()
        log = tmp_path / f"{command[0]}.log"
        with log.open("wb") as log_file:
            process = subprocess.Popen(
                [sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", str(port)],
                cwd=tmp_path,
                env=environment,
                stdout=log_file,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_until_ready(process, port, log)
            # Not the ports of BentoML's process manager, by which others could give it commands.
            assert listening_ports(process.pid) == {port}
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as service:
                assert len(classify(service, digit()).json()) == 5
                assert "What is in the picture?" in service.get("/").text
        finally:
            stop(process)


@pytest.mark.parametrize(
    ("runtime", "package"),
    [("onnxruntime", "onnxruntime"), ("openvino", "openvino"), ("native", "")],
)
def test_a_bento_names_the_package_of_its_runtime(
    tiny_artifact: Path, runtime: str, package: str
) -> None:
    manifest = read_artifact(tiny_artifact).model_copy(update={"runtime": runtime})
    text = with_packages((ROOT / "bentofile.yaml").read_text(), manifest)
    found = re.findall(r"^    - (onnxruntime|openvino)==\d", text, re.M)
    assert found == ([package] if package else [])
    assert "    - pillow==" in text


def test_a_bento_holds_what_sends_traces_and_does_not_start_where_they_cannot_be_sent(
    service_module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bentofile = (ROOT / "bentofile.yaml").read_text()
    assert re.search(rf"^    - {PACKAGE}==\d", bentofile, re.M)
    check = service_module.Classifier.inner.check_artifact
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with raises_naming(service_module.BentoMLException, "OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"):
        check()


def test_an_artifact_for_a_gpu_is_not_packed(tiny_artifact: Path) -> None:
    manifest = read_artifact(tiny_artifact).model_copy(update={"runtime": "tensorrt"})
    with raises_naming(PackError, "tensorrt"):
        with_packages("", manifest)


def test_a_manifest_that_names_other_classes_than_its_program_has_is_refused(
    tiny_artifact: Path, tmp_path: Path
) -> None:
    edited = Path(shutil.copytree(tiny_artifact, tmp_path / "edited"))
    manifest = json.loads((edited / "manifest.json").read_text())
    output = {**manifest["output"], "shape": [9]}
    manifest |= {"class_names": manifest["class_names"][:9], "output": output}
    (edited / "manifest.json").write_text(json.dumps(manifest))
    result = serve("--artifact", str(edited))
    assert result.returncode == 1
    require_named(result.stderr, "class_names", 9, 10)


@pytest.mark.parametrize(
    ("data", "num_classes", "expected"),
    [("photos/pets", 37, "pets"), ("sample-photos", 1000, "ImageNet"), ("sample-photos", 37, None)],
)
def test_what_published_weights_were_trained_on_is_not_the_sample_photographs(
    service_module: Any, tiny_artifact: Path, data: str, num_classes: int, expected: str | None
):
    names = tuple(map(str, range(num_classes)))
    manifest = read_artifact(tiny_artifact).model_copy(update={"data": data, "class_names": names})
    assert service_module.trained_on(manifest) == (expected or "data of others")
