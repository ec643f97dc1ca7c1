import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from costly_pictures import progressive_jpeg
from facts import require_named
from PIL import Image, PngImagePlugin
from processes import process_exists, service_at, wait_until

from efficientnet.images.decoding import IMAGE_FORMATS
from efficientnet.images.preprocess import (
    GOOGLE_MEAN,
    GOOGLE_STD,
    ImageError,
    ImageTooLargeError,
    PreprocessSpec,
    normalize_pixels,
    preprocess,
)
from serving import decoders as decoders_module
from serving.decoders import COMMAND_LINE, Decoders
from serving.decoding_process import DecodingJob
from serving.demo import running_service
from serving.stages import StageTimes
from serving.work import AbandonedError

PLANTED = (sys.executable, "-m", "tests.planted_decoder")
SPEC = PreprocessSpec(
    image_size=32,
    interpolation="bicubic",
    crop_fraction=0.875,
    mean=GOOGLE_MEAN,
    std=GOOGLE_STD,
)
FAST = SPEC.model_copy(update={"method": "fast"})


@contextmanager
def decoders(
    spec: PreprocessSpec = SPEC,
    num_decoders: int = 1,
    max_cpu_s: float = 30,
    command_line: tuple[str, ...] = COMMAND_LINE,
) -> Generator[tuple[Decoders, list[str]]]:
    job = DecodingJob(
        spec=spec, max_cpu_s=max_cpu_s, max_memory_bytes=500_000_000, max_picture_bytes=2_000_000
    )
    ended: list[str] = []
    pool = Decoders(job, num_decoders, ended.append, command_line)
    try:
        yield pool, ended
    finally:
        pool.close()


@contextmanager
def planted(*flags: str, **limits: Any) -> Generator[tuple[Decoders, list[str]]]:
    with decoders(command_line=(*PLANTED, *flags), **limits) as made:
        yield made


def picture(kind: str = "PNG", mode: str = "RGB", size: int = 90, **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def decode(pool: Decoders, data: bytes, is_wanted: Callable[[], bool] = lambda: True) -> Any:
    return pool.preprocess(data, is_wanted, StageTimes())


def texts() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("Title", "\u00e4\u4e16", "de", "Katze", zip=True)
    info.add_text("Comment", "\xe4", zip=True)
    return info


PICTURES = {
    **{kind.lower(): picture(kind) for kind in IMAGE_FORMATS},
    **{f"png {mode}": picture(mode=mode) for mode in ("1", "L", "LA", "P", "RGBA", "I;16")},
    **{f"jpeg {mode}": picture("JPEG", mode) for mode in ("L", "CMYK")},
    **{
        f"tiff {name}": picture("TIFF", compression=name)
        for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
    },
    "progressive": picture("JPEG", progressive=True),
    "gif of frames": picture("GIF", save_all=True, append_images=[Image.new("RGB", (90, 90))]),
    "png with texts": picture(pnginfo=texts()),
    "webp without loss": picture("WEBP", lossless=True, exif=b"Exif\0\0II*\0"),
}


@pytest.mark.parametrize("spec", [SPEC, FAST], ids=["exact", "fast"])
def test_answers_are_the_same_to_the_last_bit_as_without_a_process(spec: PreprocessSpec):
    with decoders(spec) as (pool, ended):
        for name, data in PICTURES.items():
            assert np.array_equal(decode(pool, data), preprocess(data, spec)), name
            pixels = pool.preprocess(data, lambda: True, StageTimes(), as_pixels=True)
            assert pixels.dtype == np.uint8
            assert np.allclose(normalize_pixels(pixels, True, spec), preprocess(data, spec)), name
        assert not ended


def test_errors_are_the_same_as_without_a_process():
    broken = [b"", b"text", picture("JPEG")[:500], picture()[:500], picture("AVIF")[:500]]
    with decoders() as (pool, ended):
        for data in broken:
            with pytest.raises(ImageError) as expected:
                preprocess(data, SPEC)
            with pytest.raises(ImageError) as found:
                decode(pool, data)
            assert (type(found.value), str(found.value)) == (
                type(expected.value),
                str(expected.value),
            )
        assert not ended


@pytest.mark.parametrize(
    ("data", "error", "facts", "reason"),
    [
        (b"spin", ImageTooLargeError, ("1 s", "processor time"), "time"),
        (progressive_jpeg(7000, 45_000), ImageTooLargeError, ("1 s", "processor time"), "time"),
        (b"eat", ImageTooLargeError, ("500 MB", "memory"), "memory"),
        (picture("BMP", size=6000)[:1000] + bytes(1000), ImageError, ("damaged",), None),
        (b"crash", ImageError, ("SIGSEGV",), "crash"),
        (b"killed", ImageError, ("killed",), "killed"),
        (b"fault", RuntimeError, ("IndexError", "list index out of range"), "crash"),
        (b"network", RuntimeError, ("OSError",), "crash"),
        (b"file", RuntimeError, ("OSError",), "crash"),
    ],
    ids=["spin", "scans", "eat", "cut", "crash", "killed", "fault", "network", "file"],
)
def test_a_picture_that_harms_its_decoder_gets_an_error_and_the_next_one_an_answer(
    data: bytes, error: type[Exception], facts: tuple[str, ...], reason: str | None
):
    with planted("sound", max_cpu_s=1) as (pool, ended):
        expected = decode(pool, picture())
        with pytest.raises(error) as raised:
            decode(pool, data)
        require_named(str(raised.value), *facts)
        assert ended == ([reason] if reason else [])
        assert np.array_equal(decode(pool, picture()), expected)
        assert not pool.is_stuck


def test_a_decoder_ends_when_its_client_is_gone():
    is_gone = threading.Event()
    with planted("sound") as (pool, ended), ThreadPoolExecutor(1) as threads:
        decode(pool, picture())
        (decoder,) = pool._idle
        asked = threads.submit(decode, pool, b"hang", lambda: not is_gone.is_set())
        assert wait_until(lambda: bool(pool._busy))
        assert process_exists(decoder.pid)
        is_gone.set()
        with pytest.raises(AbandonedError):
            asked.result(20)
        assert not process_exists(decoder.pid)
        assert ended == ["unwanted"]
        decode(pool, picture())


def test_decoders_that_were_killed_while_idle_cost_no_picture():
    with decoders(num_decoders=2) as (pool, ended):
        expected = decode(pool, picture())
        assert wait_until(lambda: len(pool._idle) == 2)
        for decoder in list(pool._idle):
            os.kill(decoder.pid, signal.SIGKILL)
            assert wait_until(lambda pid=decoder.pid: not process_exists(pid))
        assert np.array_equal(decode(pool, picture()), expected)
        assert ended == ["killed"] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_the_process_that_forks_is_replaced_with_all_its_decoders():
    with decoders(num_decoders=2) as (pool, _):
        expected = decode(pool, picture())
        assert wait_until(lambda: len(pool._idle) == 2)
        pids = [decoder.pid for decoder in pool._idle]
        assert pool._forker
        os.kill(pool._forker._process.pid, signal.SIGKILL)
        assert wait_until(lambda: not any(process_exists(pid) for pid in pids))
        assert np.array_equal(decode(pool, picture()), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_process_that_forks_and_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch):
    with decoders() as (pool, ended):
        expected = decode(pool, picture())
        monkeypatch.setattr(decoders_module, "ANSWER_S", 0.5)
        assert pool._forker
        forker, decoder = pool._forker, pool._idle[0]
        forker._control.settimeout(0.5)
        os.kill(forker._process.pid, signal.SIGSTOP)
        os.kill(decoder.pid, signal.SIGKILL)
        assert wait_until(lambda: decoder.has_ended)
        assert np.array_equal(decode(pool, picture()), expected)
        assert pool._forker is not forker
        assert not process_exists(forker._process.pid)
        assert ended == ["killed"]


def test_a_pool_whose_decoders_all_hang_is_stuck_until_they_are_ended():
    is_gone = threading.Event()
    with (
        planted("sound", num_decoders=2, max_cpu_s=0.5) as (pool, _),
        ThreadPoolExecutor(2) as threads,
    ):
        decode(pool, picture())
        asked = [
            threads.submit(decode, pool, b"hang", lambda: not is_gone.is_set()) for _ in range(2)
        ]
        assert wait_until(lambda: len(pool._busy) == 2)
        assert wait_until(lambda: pool.is_stuck)
        is_gone.set()
        for future in asked:
            assert isinstance(future.exception(20), AbandonedError)
        decode(pool, picture())
        assert not pool.is_stuck


@pytest.mark.parametrize(
    "command_line",
    [(*PLANTED, "broken"), (sys.executable, "-c", "raise SystemExit(1)")],
    ids=["each crashes", "none starts"],
)
def test_a_pool_that_cannot_start_a_decoder_is_stuck_and_tries_again_after_pauses(
    command_line: tuple[str, ...], caplog: pytest.LogCaptureFixture
):
    deadline = time.monotonic() + 2.5
    with decoders(command_line=command_line) as (pool, _):
        assert not pool.is_stuck  # before anything is known
        assert wait_until(lambda: pool._num_failures >= 2)
        assert pool.is_stuck
        with pytest.raises(AbandonedError):
            decode(pool, picture(), lambda: time.monotonic() < deadline)
        assert pool._num_failures <= 5
    assert "no decoder could be started" in caplog.text


def test_a_process_that_hangs_at_its_start_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoders_module, "START_S", 0.5)
    monkeypatch.setattr(decoders_module, "ANSWER_S", 0.5)
    hanging = (sys.executable, "-c", "import time; time.sleep(600)")
    with decoders(command_line=hanging) as (pool, _):
        assert wait_until(lambda: pool.is_stuck)


def test_a_large_picture_leaves_no_memory_behind():
    large = picture("BMP", size=800)
    with decoders() as (pool, _):
        assert np.array_equal(decode(pool, large), preprocess(large, SPEC))
        (decoder,) = pool._idle
        if sys.platform == "linux":
            start = pool._job.picture_start
            assert decoder._memory[start : start + len(large)].count(0) == len(large)


# In a service


def classify(client: httpx.Client, data: bytes) -> httpx.Response:
    return client.post("/classify", files={"image": ("picture", data)})


def decoders_of(port: int) -> list[psutil.Process]:
    """Find the processes of a service that decode."""
    (worker,) = service_at(port).children()
    (forker,) = worker.children()
    return forker.children()


@pytest.fixture(scope="module")
def port(tiny_artifact: Path) -> Iterator[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLASSIFIER_TIMEOUT_S", "4")
        patch.setenv("CLASSIFIER_DECODE_CPU_S", "1")
        patch.setenv("CLASSIFIER_API_KEY", "a-key-that-decoders-do-not-have")
        with running_service(tiny_artifact) as port:
            yield port


@pytest.fixture
def client(port: int) -> Iterator[httpx.Client]:
    headers = {"Authorization": "Bearer a-key-that-decoders-do-not-have"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, headers=headers) as client:
        yield client


def num_ended(client: httpx.Client, reason: str) -> float:
    line = f'classifier_decoders_ended_total{{reason="{reason}"}} '
    found = [text for text in client.get("/metrics").text.splitlines() if text.startswith(line)]
    return float(found[0].removeprefix(line)) if found else 0.0


def test_a_service_whose_decoders_hang_is_not_ready_until_new_ones_are_there(
    port: int, client: httpx.Client
):
    expected = classify(client, picture()).json()
    hanging = decoders_of(port)
    for decoder in hanging:
        decoder.suspend()
    with ThreadPoolExecutor(len(hanging)) as threads:
        answers = [threads.submit(classify, client, picture()) for _ in hanging]
        assert wait_until(lambda: client.get("/readyz").status_code == 503)
        assert classify(client, picture()).json()["code"] == "stuck"
        for answer in answers:
            assert (answer.result().status_code, answer.result().json()["code"]) == (504, "timeout")
    assert wait_until(lambda: client.get("/readyz").status_code == 200)
    assert classify(client, picture()).json() == expected
    assert wait_until(lambda: num_ended(client, "unwanted") == len(hanging))
    assert not any(process_exists(decoder.pid) for decoder in hanging)


def test_decoders_know_nothing_of_the_service_and_its_network(port: int, client: httpx.Client):
    assert classify(client, picture()).status_code == 200
    for decoder in decoders_of(port):
        maps = Path(f"/proc/{decoder.pid}/maps").read_text()
        assert "cv2" in maps
        assert "onnxruntime" not in maps and "torch" not in maps
        assert not any(name.startswith("CLASSIFIER_") for name in decoder.environ())
        assert not decoder.net_connections("inet")
