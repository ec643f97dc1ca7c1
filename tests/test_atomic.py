import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from efficientnet.machine import atomic
from efficientnet.machine.atomic import append_line, replaced_directory, write_text


def test_a_directory_appears_only_when_its_block_has_ended(tmp_path: Path):
    target = tmp_path / "made"
    with replaced_directory(target) as fresh:
        (fresh / "a.txt").write_text("new")
        assert not target.exists()
    assert (target / "a.txt").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_an_error_leaves_the_older_directory_and_nothing_else(tmp_path: Path):
    target = tmp_path / "made"
    target.mkdir()
    (target / "a.txt").write_text("old")
    with pytest.raises(RuntimeError), replaced_directory(target) as fresh:
        (fresh / "a.txt").write_text("half")
        raise RuntimeError
    assert (target / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_an_older_directory_is_replaced_whole(tmp_path: Path):
    target = tmp_path / "made"
    target.mkdir()
    (target / "stale.txt").write_text("old")
    with replaced_directory(target) as fresh:
        (fresh / "a.txt").write_text("new")
    assert [p.name for p in target.iterdir()] == ["a.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_another_process_may_replace_it_meanwhile(tmp_path: Path):
    target = tmp_path / "made"
    with replaced_directory(target) as fresh:
        (fresh / "a.txt").write_text("late")
        with replaced_directory(target) as sooner:
            (sooner / "a.txt").write_text("soon")
    assert (target / "a.txt").read_text() == "late"
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


@pytest.mark.skipif(sys.platform != "linux", reason="exchanging two names is Linux's")
def test_a_reader_finds_a_directory_at_every_moment(tmp_path: Path):
    target = tmp_path / "made"
    target.mkdir()
    (target / "a.txt").write_text("old")
    missing: list[int] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            if not target.is_dir():
                missing.append(1)

    reader = threading.Thread(target=look)
    reader.start()
    for number in range(30):
        with replaced_directory(target) as fresh:
            (fresh / "a.txt").write_text(str(number))
    ended.set()
    reader.join()
    assert not missing
    assert (target / "a.txt").read_text() == "29"


def test_where_names_cannot_be_exchanged_it_is_replaced_in_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(atomic, "_swap", lambda *_: False)
    test_an_older_directory_is_replaced_whole(tmp_path)


def test_what_a_killed_process_left_is_removed_but_not_what_a_living_one_fills(tmp_path: Path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    left, living = (tmp_path / f".made.new-{host}-{pid}-0" for pid in (dead.pid, os.getpid()))
    elsewhere = tmp_path / f".made.new-another-{dead.pid}-0"
    for path in (left, living, elsewhere):
        path.mkdir()
    with replaced_directory(tmp_path / "made") as fresh:
        (fresh / "a.txt").write_text("new")
    assert {p.name for p in tmp_path.iterdir()} == {"made", living.name, elsewhere.name}


def test_a_text_that_cannot_be_written_leaves_the_older_file(tmp_path: Path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_lines_are_appended(tmp_path: Path):
    path = tmp_path / "folder" / "a.jsonl"
    append_line(path, "1")
    append_line(path, "2")
    assert path.read_text() == "1\n2\n"
