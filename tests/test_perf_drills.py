import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from facts import raises_naming, require_named
from PIL import Image

from efficientnet.reporting.publishing import PublishError
from perf.studies.config import DrillName, DrillsConfig
from perf.studies.drill_clients import LOST, REFUSED_CONNECTION, Seen
from perf.studies.drills import DRILLS, DrillRecord, Finding, lost, main, to_markdown

# What a busy machine decides is measured, and not tested.
OF_TIME = {"refused, p50 and p99", "next answer after", "one client 5 s later, p50 and p99"}


@pytest.fixture(scope="module")
def config(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> DrillsConfig:
    folder = tmp_path_factory.mktemp("drills")
    photos = folder / "photos"
    photos.mkdir()
    for number in range(3):
        Image.new("RGB", (1600, 1200), (80 * number, 9, 9)).save(photos / f"{number}.jpg")
    return DrillsConfig(
        tiny_artifact,
        photos,
        seconds=6,
        slow_clients=120,
        requests=1000,
        output=folder / "out",
    )


@pytest.mark.parametrize("drill", DRILLS)
def test_what_is_promised_in_trouble_is_kept(config: DrillsConfig, drill: DrillName):
    if drill == "memory":
        pytest.skip("1,000 requests are too few for a slope")
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


def test_memory_is_watched_over_many_requests(config: DrillsConfig):
    folder = main(replace(config, drills=("memory",)))
    record = DrillRecord.model_validate_json((folder / "memory.json").read_text())
    found = {finding.what: finding.found for finding in record.findings}
    require_named(found["sent"], "1000 x 200")
    require_named(found["slope, without the first fifth"], "bytes a request")


def test_what_nobody_took_is_not_lost_and_what_broke_is():
    seen = [Seen(status, 0.0, 0.1) for status in (200, 429, 503, REFUSED_CONNECTION, LOST, 500)]
    assert [s.status for s in lost(seen)] == [LOST, 500]


def test_the_table_says_which_promise_is_not_kept(config: DrillsConfig):
    folder = main(replace(config, drills=("artifact",)))
    record = DrillRecord.model_validate_json((folder / "artifact.json").read_text())
    finding = Finding(what="lost", found="3", promised="none", is_kept=False)
    text = to_markdown(record.model_copy(update={"findings": (finding,)}))
    assert "| lost | 3 | none: NOT KEPT |" in text


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
