import importlib.util
import math
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from facts import raises_naming, require_named
from PIL import Image

from efficientnet.reporting.publishing import PublishError
from perf.service_load import load
from perf.service_load.config import LoadConfig
from perf.service_load.load_contenders import LoadError, running_service
from perf.service_load.load_generator import (
    Answers,
    Target,
    planned_times,
    send_in_turn,
    send_planned,
)
from perf.service_load.load_record import LoadRecord, Point, to_markdown, to_point


@contextmanager
def server(answer: Callable[[bytes], int]) -> Iterator[str]:
    """Give the address of a server that answers a body with a status."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            status = answer(self.rfile.read(int(self.headers["Content-Length"])))
            if not status:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{served.server_port}/"
    finally:
        served.shutdown()
        thread.join()
        served.server_close()


def test_planned_requests_are_sent_although_none_is_answered():
    all_are_there = threading.Barrier(5)

    def answer(_: bytes) -> int:
        all_are_there.wait(30)
        return 200

    with server(answer) as address:
        times = [0, 0, 0.001, 0.002, 0.003]
        answers = send_planned(Target(address, [b"picture"]), times)
    assert answers.num_answered == 5


def test_what_is_refused_or_fails_is_never_in_time():
    statuses = {b"good": 200, b"full": 429, b"stuck": 503, b"broken": 500, b"cut": 0}
    with server(lambda body: statuses[body]) as address:
        answers = send_planned(Target(address, list(statuses)), [0.0] * len(statuses))
    assert (answers.num_answered, answers.num_refused, answers.num_failed) == (1, 2, 2)
    assert [math.isfinite(ms) for ms in answers.latencies_ms] == [True, *[False] * 4]


def test_clients_that_wait_send_one_picture_after_the_other():
    bodies: list[bytes] = []

    def answer(body: bytes) -> int:
        bodies.append(body)
        return 200

    with server(answer) as address:
        answers = send_in_turn(Target(address, [b"0", b"1", b"2"]), num_clients=1, seconds=0.05)
    assert bodies == [b"%d" % (index % 3) for index in range(answers.num_answered)]


def test_plans_have_their_rate_and_the_same_seed_gives_the_same_plan():
    assert planned_times("fixed", 4, 1, 0) == [0, 0.25, 0.5, 0.75]
    assert planned_times("fixed", 0.1, 1, 0) == [0]
    times = planned_times("poisson", 100, 40, 7)
    assert times == planned_times("poisson", 100, 40, 7) != planned_times("poisson", 100, 40, 8)
    assert times[0] == 0 and max(times) < 40 and times == sorted(times)
    # Of a Poisson process the number in a time, and the gaps' deviation, are known.
    assert abs(len(times) - 4000) < 5 * math.sqrt(4000)
    assert np.diff(times).std() * 100 == pytest.approx(1, abs=0.1)


def answers_of(*latencies_ms: float, num_refused: int = 0) -> Answers:
    return Answers(latencies_ms, num_refused, 0, 2.0, (0.5,) * len(latencies_ms), 0.1)


def test_goodput_counts_what_was_planned_and_answered_within_the_bound():
    inside = answers_of(*[10.0] * 990)
    late = answers_of(*[80.0] * 9, math.inf, num_refused=1)
    point = to_point("batched", "poisson", 250, [inside, late], bound_ms=50, seconds=4)
    assert (point.num_requests, point.num_refused, point.num_failed) == (1000, 1, 0)
    assert (point.in_time_per_s, point.share_in_time) == (990 / 4, 0.99)
    assert point.answered_per_s == 999 / 4
    assert (point.p50_ms, point.p99_ms) == (10, 10)
    none = to_point("batched", "poisson", 1, [answers_of(*[math.inf] * 30)], 50, 4)
    assert (none.p50_ms, none.p99_ms, none.in_time_per_s) == (None, None, 0)


def test_the_goodput_is_that_of_the_highest_rate_that_keeps_the_bound(measured: LoadRecord):
    def point(rate: float, share: float) -> Point:
        known = measured.points[0]
        update = {"in_time_per_s": rate, "share_in_time": share}
        return known.model_copy(update={**update, "service": "batched", "schedule": "poisson"})

    points = (point(40, 1.0), point(50, 0.99), point(60, 0.98))
    record = measured.model_copy(update={"points": points})
    assert record.goodput("batched", "poisson") == 50
    assert record.goodput("unbatched", "poisson") is None
    assert record.goodput("batched", "fixed") is None
    assert "| 50" in to_markdown(record)


@pytest.fixture(scope="module")
def config(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadConfig:
    folder = tmp_path_factory.mktemp("load")
    photos = folder / "photos"
    photos.mkdir()
    for number in range(3):
        Image.new("RGB", (40, 30), (80 * number, 9, 9)).save(photos / f"{number}.jpg")
    return LoadConfig(
        tiny_artifact,
        photos,
        seconds=0.2,
        turns=1,
        rates=(0.05,),  # so few that none is refused on a core that has the clients, too
        schedules=("fixed",),
        batch=2,
        clients=4,
        peers=("fastapi", "litserve"),
        output=folder / "out" / "load.json",
    )


@pytest.fixture(scope="module")
def measured(config: LoadConfig) -> LoadRecord:
    assert load.main(config).suffix == ".md"
    return LoadRecord.model_validate_json(config.output.read_text())


def test_both_services_and_the_plain_loops_are_measured(config: LoadConfig, measured: LoadRecord):
    taking_part = {"batched", "unbatched", "fastapi", "litserve"} - measured.skipped.keys()
    assert {p.service for p in measured.points} == taking_part
    assert not any(p.num_failed or p.num_refused for p in measured.points)
    assert set(measured.saturated.plain_images_per_s) == {1, config.batch}
    assert min(measured.saturated.service_images_per_s.values()) > 0
    assert measured.bound_ms == 5 * measured.single.plain_p50_ms
    table = config.output.with_name(f"{measured.slug}.md").read_text()
    assert f"({measured.slug}.png)" in table and "service without batching" in table
    with Image.open(config.output.with_name(f"{measured.slug}.png")) as picture:
        assert picture.size[0] > 500


def test_a_peer_whose_package_is_missing_is_skipped_with_the_reason(measured: LoadRecord):
    if importlib.util.find_spec("litserve"):
        pytest.skip("LitServe is installed")
    assert measured.skipped.keys() == {"litserve"}
    require_named(measured.skipped["litserve"], "litserve")
    require_named(to_markdown(measured), "LitServe", "FastAPI")


def test_publishing_without_a_place_for_the_table_measures_nothing(
    config: LoadConfig, tmp_path: Path
):
    readme = tmp_path / "results.md"
    readme.write_text("no marks")
    with raises_naming(PublishError, "load", readme):
        load.main(replace(config, publish=True, readme=readme))


def test_a_service_that_does_not_start_shows_its_log(tmp_path: Path):
    with raises_naming(LoadError, tmp_path / "none"), running_service(tmp_path / "none"):
        pass
