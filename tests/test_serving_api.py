import io
import json
import re
import shlex
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from facts import raises_naming
from PIL import Image

from efficientnet.formats.artifact import read_artifact
from efficientnet.images.datasets import load_dataset
from efficientnet.images.preprocess import preprocess
from efficientnet.runtimes import Runtime, open_runtime
from serving.answers import PROBLEMS, Problem, ServiceInfo
from serving.refusals import Refusal
from serving.settings import VERSION, artifact_sha256
from serving.tensors import HEADER_LENGTH, parse

ROOT = Path(__file__).resolve().parent.parent

# A call of several images may differ from calls of one in the last digits of float32.
LOGIT_TOLERANCE = 1e-4

MODEL = "/v2/models/tiny"


@pytest.fixture(scope="module")
def service(service_port: int) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{service_port}", timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def runtime(tiny_artifact: Path) -> Runtime:
    return open_runtime(tiny_artifact)


def digit(index: int = 0) -> bytes:
    return load_dataset("digits").val[index].read()


@pytest.fixture(scope="module")
def images(runtime: Runtime) -> np.ndarray:
    return np.stack([preprocess(digit(index), runtime.info.preprocess) for index in range(3)])


def assert_problem(response: httpx.Response, code: str, reason: str = "") -> None:
    problem = Problem.model_validate(response.json())
    assert response.headers["Content-Type"] == "application/problem+json"
    assert (problem.code, problem.status) == (code, response.status_code)
    assert PROBLEMS[problem.code][0] == response.status_code
    assert problem.error == problem.detail
    assert reason in problem.detail


# What the service says of itself


def test_info_names_what_answers(service: httpx.Client, tiny_artifact: Path):
    info = ServiceInfo.model_validate(service.get("/info").json())
    manifest = read_artifact(tiny_artifact)
    assert (info.model, info.runtime, info.precision) == ("tiny", "onnxruntime", "fp32")
    assert info.artifact_sha256 == artifact_sha256(tiny_artifact)
    assert info.program_sha256 == manifest.program_sha256
    assert info.checkpoint_sha256 == manifest.checkpoint_sha256
    assert info.preprocess == manifest.preprocess
    assert info.preprocess_sha256 == manifest.preprocess.sha256
    assert (info.workers, info.num_classes, info.trained_on) == (1, 10, "digits")
    assert info.gate == manifest.gate
    assert info.limits.max_upload_bytes == 20_000_000
    assert info.versions["efficientnet-pipeline"] == VERSION
    assert {"python", "onnxruntime", "bentoml"} <= set(info.versions)


def test_the_version_is_that_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION


def test_every_classification_names_its_model(service: httpx.Client, images: np.ndarray):
    info = service.get("/info").json()
    expected = {
        "X-Model": "tiny",
        "X-Artifact-SHA256": info["artifact_sha256"],
        "X-Preprocess-SHA256": info["preprocess_sha256"],
    }
    one = service.post("/classify", files={"image": ("p", digit())})
    several = service.post("/classify/batch", files=[("images", ("p", digit()))])
    tensors = service.post(f"{MODEL}/infer", json=in_json(images))
    for answer in (one, several, tensors):
        assert answer.status_code == 200
        assert {name: answer.headers.get(name) for name in expected} == expected


def test_a_request_keeps_its_number_if_it_is_fit_for_the_log(service: httpx.Client):
    mine = service.get("/info", headers={"X-Request-ID": "trace-7:a/b"})
    assert mine.headers["X-Request-ID"] == "trace-7:a/b"
    for other in ("two words", "x" * 129, "<b>", ""):
        answer = service.get("/info", headers={"X-Request-ID": other})
        assert re.fullmatch("[0-9a-f]{16}", answer.headers["X-Request-ID"])


# A picture as the body


def test_a_picture_may_be_the_body(service: httpx.Client):
    in_form = service.post("/classify", files={"image": ("p", digit())}, data={"top_k": "3"})
    body = service.post("/classify?top_k=3", content=digit(), headers={"Content-Type": "image/png"})
    assert body.json() == in_form.json()
    assert len(body.json()) == 3
    large = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(large, "PNG")
    assert len(large.getvalue()) > 2_000_000  # lies in a file meanwhile
    in_form = service.post("/classify", files={"image": ("p", large.getvalue())})
    headers = {"Content-Type": "image/png"}
    body = service.post("/classify", content=large.getvalue(), headers=headers)
    assert body.json() == in_form.json()


def test_a_body_that_is_no_picture_is_refused(service: httpx.Client):
    headers = {"Content-Type": "image/jpeg"}
    assert_problem(service.post("/classify", content=b"text", headers=headers), "no_picture")
    assert_problem(service.post("/classify", headers=headers), "no_picture", "(0 bytes)")
    large = service.post("/classify", content=b"x" * 21_000_000, headers=headers)
    assert_problem(large, "upload_too_large", "20 MB")
    batch = service.post("/classify/batch", content=digit(), headers=headers)
    assert_problem(batch, "unsupported_type", "expected multipart/form-data")
    packed = service.post(
        "/classify", content=digit(), headers={**headers, "Content-Encoding": "gzip"}
    )
    assert_problem(packed, "unsupported_type", "the Content-Encoding is gzip, expected none")


@pytest.mark.parametrize("top_k", ["", "0", "1_0", "+1", "1e2", "\u0663"])
def test_top_k_of_the_address_is_a_count(service: httpx.Client, top_k: str):
    response = service.post(
        "/classify",
        params={"top_k": top_k},
        content=digit(),
        headers={"Content-Type": "image/png"},
    )
    assert_problem(response, "invalid_field", "expected a whole number of at least 1")


def test_top_k_may_have_any_number_of_digits(service: httpx.Client):
    headers = {"Content-Type": "image/png"}
    for top_k in ("0" * 50 + "10", "9" * 1000):
        answer = service.post(f"/classify?top_k={top_k}", content=digit(), headers=headers)
        assert len(answer.json()) == 10


# Tensors


def in_json(images: np.ndarray, **more: Any) -> dict[str, Any]:
    tensor = {"name": "images", "datatype": "FP32", "shape": list(images.shape)}
    return {"inputs": [{**tensor, "data": images.ravel().tolist()}], **more}


def in_bytes(images: np.ndarray, **more: Any) -> tuple[bytes, dict[str, str]]:
    data = images.tobytes()
    tensor = {"name": "images", "datatype": "FP32", "shape": list(images.shape)}
    tensor |= {"parameters": {"binary_data_size": len(data)}}
    text = json.dumps({"inputs": [tensor], **more}).encode()
    return text + data, {
        HEADER_LENGTH: str(len(text)),
        "Content-Type": "application/octet-stream",
    }


def logits_of(answer: dict[str, Any]) -> np.ndarray:
    (output,) = answer["outputs"]
    return np.reshape(output["data"], output["shape"]).astype(np.float32)


def test_the_model_is_described(service: httpx.Client, tiny_artifact: Path):
    assert service.get("/v2/health/live").json() == {"live": True}
    assert service.get("/v2/health/ready").json() == {"ready": True}
    server = service.get("/v2").json()
    assert server["version"] == VERSION and "binary_tensor_data" in server["extensions"]
    manifest = read_artifact(tiny_artifact)
    for model in (MODEL, f"{MODEL}/versions/1"):
        assert service.get(f"{model}/ready").json() == {"ready": True, "name": "tiny"}
        assert service.get(model).json() == {
            "name": "tiny",
            "versions": ["1"],
            "platform": "onnxruntime_fp32",
            "inputs": [{"name": manifest.input.name, "datatype": "FP32", "shape": [-1, 3, 32, 32]}],
            "outputs": [{"name": manifest.output.name, "datatype": "FP32", "shape": [-1, 10]}],
        }
        config = service.get(f"{model}/config").json()
        assert (config["max_batch_size"], config["input"][0]["dims"]) == (32, [3, 32, 32])


@pytest.mark.parametrize("path", ["/v2/models/other", "/v2/models/tiny/versions/2", "/v2/x"])
def test_other_models_do_not_exist(service: httpx.Client, path: str):
    for address in (path, f"{path}/ready", f"{path}/config"):
        assert_problem(service.get(address), "not_found", address)
    assert_problem(service.post(f"{path}/infer", json={}), "not_found")


def test_tensors_give_the_logits_of_the_artifact(
    service: httpx.Client, runtime: Runtime, images: np.ndarray
):
    expected = runtime.infer(images)
    flat = service.post(f"{MODEL}/infer", json=in_json(images, id="mine"))
    assert flat.status_code == 200
    assert (flat.json()["id"], flat.json()["model_name"]) == ("mine", "tiny")
    np.testing.assert_allclose(logits_of(flat.json()), expected, atol=LOGIT_TOLERANCE)
    request = in_json(images)
    request["inputs"][0]["data"] = images.tolist()
    nested = service.post(f"{MODEL}/versions/1/infer", json=request)
    np.testing.assert_array_equal(logits_of(nested.json()), logits_of(flat.json()))
    assert "id" not in nested.json()


def test_tensors_may_come_and_go_as_bytes(
    service: httpx.Client, runtime: Runtime, images: np.ndarray
):
    expected = runtime.infer(images)
    body, headers = in_bytes(images)
    text = service.post(f"{MODEL}/infer", content=body, headers=headers)
    np.testing.assert_allclose(logits_of(text.json()), expected, atol=LOGIT_TOLERANCE)
    output = text.json()["outputs"][0]["name"]
    wanted = {"outputs": [{"name": output, "parameters": {"binary_data": True}}]}
    for more in (wanted, {"parameters": {"binary_data_output": True}}):
        body, headers = in_bytes(images, **more)
        answer = service.post(f"{MODEL}/infer", content=body, headers=headers)
        assert answer.headers["Content-Type"] == "application/octet-stream"
        length = int(answer.headers[HEADER_LENGTH])
        (described,) = json.loads(answer.content[:length])["outputs"]
        data = answer.content[length:]
        assert (described["shape"], "data" in described) == ([3, 10], False)
        assert described["parameters"]["binary_data_size"] == len(data) == 3 * 10 * 4
        logits = np.frombuffer(data, "<f4").reshape(3, 10)
        np.testing.assert_allclose(logits, expected, atol=LOGIT_TOLERANCE)


def with_input(images: np.ndarray, **changes: Any) -> dict[str, Any]:
    request = in_json(images)
    request["inputs"][0] |= changes
    return request


IMAGE = np.zeros((1, 3, 32, 32), np.float32)

REFUSED: dict[str, tuple[Any, str]] = {
    "no inputs": ({"inputs": []}, "the JSON is no request: inputs"),
    "two inputs": ({"inputs": in_json(IMAGE)["inputs"] * 2}, "expected 'images' alone"),
    "another name": (with_input(IMAGE, name="pixels"), "the inputs are 'pixels'"),
    "another type": (with_input(IMAGE, datatype="UINT8"), "the input is UINT8 [1, 3, 32, 32]"),
    "another size": (with_input(IMAGE, shape=[1, 3, 64, 16]), "expected FP32 [images, 3, 32, 32]"),
    "no image": (with_input(IMAGE, shape=[0, 3, 32, 32], data=[]), "[0, 3, 32, 32]"),
    "negative": (with_input(IMAGE, shape=[-1, 3, 32, 32]), "[-1, 3, 32, 32]"),
    "fewer values": (with_input(IMAGE, data=[0.0] * 7), "the input has 7 values, expected 3072"),
    "text": (with_input(IMAGE, data=["1"] * 3072), "the data are no numbers"),
    "ragged": (with_input(IMAGE, data=[[1, 2], [3]]), "the data are no numbers"),
    "huge": (with_input(IMAGE, data=[1e300] + [0.0] * 3071), "NaN or infinite"),
    "too many values": (with_input(IMAGE, data=[0] * 200_000), "more than the 98304 of the most"),
    "an unknown output": (in_json(IMAGE, outputs=[{"name": "x"}]), "there is no output 'x'"),
    "shared memory": (
        with_input(IMAGE, parameters={"shared_memory_region": "a"}),
        "the parameter shared_memory_region is not known",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tensors_that_the_network_does_not_take_are_refused(service: httpx.Client, name: str):
    body, reason = REFUSED[name]
    assert_problem(service.post(f"{MODEL}/infer", json=body), "invalid_request", reason)


def test_bytes_that_do_not_fit_their_description_are_refused(service: httpx.Client):
    body, headers = in_bytes(IMAGE)
    for length in ("0", "-1", "x", str(len(body) + 1), "9" * 5000):
        answer = service.post(
            f"{MODEL}/infer", content=body, headers={**headers, HEADER_LENGTH: length}
        )
        assert_problem(answer, "invalid_request", f"{HEADER_LENGTH} is '{length[:40]}")
    short = service.post(f"{MODEL}/infer", content=body[:-4], headers=headers)
    assert_problem(short, "invalid_request", "12284 bytes follow the JSON, expected 12288")
    nan, headers = in_bytes(np.full((1, 3, 32, 32), np.nan, np.float32))
    answer = service.post(f"{MODEL}/infer", content=nan, headers=headers)
    assert_problem(answer, "invalid_request", "NaN or infinite")


def test_bodies_that_are_no_tensors_are_refused(service: httpx.Client):
    for text in (b"", b"{", b"[" * 100_000, b"\xff", b'{"inputs": 1}'):
        headers = {"Content-Type": "application/json"}
        answer = service.post(f"{MODEL}/infer", content=text, headers=headers)
        assert_problem(answer, "invalid_request")
    form = service.post(f"{MODEL}/infer", files={"image": ("p", digit())})
    assert_problem(form, "unsupported_type", "expected application/json")
    many, headers = in_bytes(np.zeros((33, 3, 32, 32), np.float32))
    answer = service.post(f"{MODEL}/infer", content=many, headers=headers)
    assert_problem(answer, "too_many_pictures", "33 images, expected at most 32")


def test_values_are_counted_before_they_are_read():
    with raises_naming(Refusal, 20000, 1000):
        parse(b"[" + b"0," * 20_000, 1000)


def test_what_a_worker_has_done_is_counted(service: httpx.Client, images: np.ndarray):
    def stats() -> dict[str, Any]:
        (model,) = service.get(f"{MODEL}/stats").json()["model_stats"]
        return model

    before = stats()
    service.post(f"{MODEL}/infer", json=in_json(images))
    service.post("/classify", files={"image": ("p", digit())})
    after = stats()
    assert after["inference_count"] - before["inference_count"] == 4
    assert after["execution_count"] - before["execution_count"] == 2
    for stage in ("success", "queue", "compute_infer"):
        old, new = before["inference_stats"][stage], after["inference_stats"][stage]
        assert (new["count"] - old["count"], new["ns"] > old["ns"]) == (2, True)
    assert service.get("/v2/models/stats").json() == {"model_stats": [stats()]}


# Examples


def test_the_examples_of_the_docs_work(service_port: int, tmp_path: Path):
    text = (ROOT / "docs/serving.md").read_text()
    for name in ("digit.png", "picture.png"):
        (tmp_path / name).write_bytes(digit())
    (tmp_path / "notes.txt").write_text("no picture")
    lines = re.findall(r"^curl .*$", text, re.M)
    assert len(lines) >= 4
    for line in lines:
        command = shlex.split(line.replace("localhost:3000", f"127.0.0.1:{service_port}"))
        done = subprocess.run(
            [command[0], "--silent", "--fail-with-body", *command[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (line, done.stdout)
        assert json.loads(done.stdout), line


def test_the_client_of_the_docs_works(service_port: int, tmp_path: Path):
    codes = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serving.md").read_text(), re.S)
    (code,) = (code for code in codes if "httpx" in code)
    (tmp_path / "photo.jpg").write_bytes(digit())
    (tmp_path / "client.py").write_text(code.replace("localhost:3000", f"127.0.0.1:{service_port}"))
    done = subprocess.run(
        [sys.executable, "client.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (best, *_) = httpx.post(
        f"http://127.0.0.1:{service_port}/classify", files={"image": ("p", digit())}
    ).json()
    assert done.stdout.startswith(f"{best['probability']:.1%} {best['label']}\n")
    (tmp_path / "photo.jpg").write_bytes(b"no picture")
    done = subprocess.run(
        [sys.executable, "client.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stderr.startswith("no_picture: these 10 bytes are not an image")


def test_openapi_refers_to_nothing_that_is_not_there():
    with warnings.catch_warnings():
        # Deprecations inside BentoML's and OpenTelemetry's own imports.
        warnings.simplefilter("ignore")
        from serving.routes import app
    schema = app.openapi()
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(schema)))
    assert references <= set(schema["components"]["schemas"])
    assert {"Problem", "InferRequest", "Prediction", "ServiceInfo"} <= references
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            assert {"200", "400", "414", "500"} <= set(operation["responses"]), path
            assert "422" not in operation["responses"] or "/classify" in path
