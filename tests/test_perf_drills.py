import asyncio
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from facts import raises_naming, require_named
from PIL import Image

from efficientnet.machine.environment import current_environment
from efficientnet.reporting.publishing import PublishError
from perf.service_load import drill_clients, drills
from perf.service_load.config import DrillName, DrillsConfig
from perf.service_load.drill_clients import LOST, REFUSED_CONNECTION, Seen
from perf.service_load.drills import DRILLS, DrillRecord, Finding, lost, main, to_markdown

# What a busy machine decides is measured, and not tested.
OF_TIME = {
    "accepted, p50 and p99",
    "refused, p50 and p99",
    "next answer after",
    "one client 5 s later, p50 and p99",
}


def write_photos(folder: Path, size: tuple[int, int]) -> Path:
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", size, (80 * number, 9, 9)).save(folder / f"{number}.jpg")
    return folder


@pytest.fixture(scope="module")
def config(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> DrillsConfig:
    folder = tmp_path_factory.mktemp("drills")
    return DrillsConfig(
        tiny_artifact,
        write_photos(folder / "photos", (1600, 1200)),
        seconds=3,
        slow_clients=120,
        requests=1000,
        output=folder / "out",
    )


# 1,000 requests are too few for the slope of the memory.
@pytest.mark.parametrize("drill", sorted(DRILLS.keys() - {"memory"}))
def test_what_is_promised_in_trouble_is_kept(
    config: DrillsConfig, drill: DrillName, monkeypatch: pytest.MonkeyPatch
):
    if drill == "slow-clients":
        # The other client begins a second after them, and sends as long as they do.
        config = replace(config, seconds=4.5)
    if drill == "overload":
        # What is sent in a second takes ten to be answered, and the queue is empty then.
        config = replace(config, seconds=1)
        monkeypatch.setattr(drills, "RECOVERY_S", 0.1)
    if drill in ("change", "drain"):
        monkeypatch.setenv("CLASSIFIER_DRAIN_S", "1")
    # One that is deleted is as one that is replaced, see test_serving_workers.py.
    monkeypatch.delitem(drills.CHANGES, "deleted")
    folder = main(replace(config, drills=(drill,)))
    record = DrillRecord.model_validate_json((folder / f"{drill}.json").read_text())
    promised = [finding for finding in record.findings if finding.is_kept is not None]
    assert promised
    broken = [f for f in promised if not f.is_kept and not is_of_time(f)]
    assert not broken, record.findings
    table = (folder / f"{drill}.md").read_text()
    assert record.title in table and all(f.found in table for f in promised)


def is_of_time(finding: Finding) -> bool:
    if finding.what == "sent":
        # Clients that share a core with the service are late with a head, and lose the connection.
        statuses = set(re.findall(r" x ([\w ]+)", finding.found))
        return statuses <= {"200", "429", "503", "broken connection"}
    return finding.what in OF_TIME or "later" in finding.what


def test_memory_is_watched_over_many_requests(config: DrillsConfig, tmp_path: Path):
    small = write_photos(tmp_path / "photos", (160, 120))
    folder = main(replace(config, photos=small, drills=("memory",)))
    record = DrillRecord.model_validate_json((folder / "memory.json").read_text())
    found = {finding.what: finding.found for finding in record.findings}
    require_named(found["sent"], "1000 x 200")
    require_named(found["slope, without the first fifth"], "bytes a request")


def test_what_nobody_took_is_not_lost_and_what_broke_is():
    seen = [Seen(status, 0.0, 0.1) for status in (200, 429, 503, REFUSED_CONNECTION, LOST, 500)]
    assert [s.status for s in lost(seen)] == [LOST, 500]


def test_clients_have_no_more_requests_on_their_way_than_descriptors(
    monkeypatch: pytest.MonkeyPatch,
):
    num_open, most = 0, 0

    async def send(*_: object) -> Seen:
        nonlocal num_open, most
        num_open += 1
        most = max(most, num_open)
        await asyncio.sleep(0.2)
        num_open -= 1
        return Seen(200, 0.0, 0.01)

    monkeypatch.setattr(drill_clients, "send", send)
    monkeypatch.setattr(drill_clients, "MAX_OPEN", 3)
    seen = asyncio.run(drill_clients.send_at_rate(0, [b""], rate=20, seconds=1))
    assert 3 < len(seen) <= 20 and most == 3


def test_the_table_says_which_promise_is_not_kept():
    record = DrillRecord(
        drill="kill",
        title="One worker is killed",
        variant="tiny",
        runtime="onnxruntime",
        precision="fp32",
        image_size=32,
        program_sha256="0" * 64,
        num_photos=3,
        findings=(Finding(what="lost", found="3", promised="none", is_kept=False),),
        environment=current_environment(),
        started_at=datetime.now(UTC),
    )
    assert "| lost | 3 | none: NOT KEPT |" in to_markdown(record)


def test_publishing_without_a_place_for_the_tables_does_nothing(
    config: DrillsConfig, tmp_path: Path
):
    readme = tmp_path / "serving.md"
    readme.write_text("no marks")
    with raises_naming(PublishError, "drills", readme):
        main(replace(config, publish=True, readme=readme, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "value"),
    [("seconds", 0), ("slow_clients", 0), ("requests", 999), ("num_photos", 0), ("drills", ())],
)
def test_a_setting_outside_its_limits_is_refused(setting: str, value: Any):
    with raises_naming(ValueError, f"--{setting.replace('_', '-')}"):
        DrillsConfig(Path("artifact"), Path("photos"), **{setting: value})
