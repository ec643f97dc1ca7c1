from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fuzz_service import fuzz, growth_of, mutations, pictures, slope_of

from efficientnet.images.decoding import IMAGE_FORMATS


def test_mutated_pictures_and_requests_find_nothing(
    tiny_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    is_good = fuzz(tiny_artifact, num_files=30, num_requests=300, seed=1, keep=tmp_path)
    told = capsys.readouterr().out
    assert is_good, told
    assert all(f"{kind}: " in told for kind in (*IMAGE_FORMATS, "requests"))


def test_a_service_that_fails_is_found(
    service_port: int, tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    @contextmanager
    def running(_: Path, log: Path) -> Iterator[int]:
        log.touch()
        yield service_port

    monkeypatch.setattr("fuzz_service.running_service", running)
    monkeypatch.setattr("fuzz_service.ask", lambda *_: ("504", 1.0))
    monkeypatch.setattr("fuzz_service.require_answered", lambda *_: None)
    assert not fuzz(tiny_artifact, num_files=1, num_requests=0, seed=1, keep=tmp_path)
    assert len(list(tmp_path.glob("JPEG-*"))) == 1


def test_memory_that_grows_to_the_end_is_told_from_what_warms_up():
    assert growth_of([100, 150, 180, 190, 190, 190, 190, 190]) == 0
    assert growth_of([100, 110, 120, 130, 140, 150, 160, 170]) == 20
    assert growth_of([1, 2, 3]) == 0
    assert slope_of([100, 900, 1000, 1500, 2000, 2500]) == pytest.approx(1)
    assert slope_of([100]) == 0


def test_every_kind_that_is_read_is_mutated_and_a_seed_gives_the_same_again():
    by_kind = pictures()
    assert by_kind.keys() == set(IMAGE_FORMATS) and by_kind == pictures()
    for kind, made in by_kind.items():
        assert made, kind
    sources = by_kind["PNG"]
    assert list(mutations(sources, 50, "1")) == list(mutations(sources, 50, "1"))
    assert list(mutations(sources, 50, "1")) != list(mutations(sources, 50, "2"))
    assert len(set(mutations(sources[:1], 50, "1"))) > 40
