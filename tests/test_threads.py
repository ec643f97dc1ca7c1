import time
from collections.abc import Iterator

import pytest

from efficientnet.machine import threads
from efficientnet.machine.threads import map_in_threads


def test_results_come_in_order():
    assert map_in_threads(str, range(50), 4, "counting") == [str(n) for n in range(50)]


def test_an_interrupt_leaves_what_has_not_begun(monkeypatch: pytest.MonkeyPatch):
    begun: list[int] = []

    def interrupted(results: Iterator[None], *_: object, **__: object) -> Iterator[None]:
        yield next(results)
        raise KeyboardInterrupt

    def work(number: int) -> None:
        begun.append(number)
        time.sleep(0.001)

    monkeypatch.setattr(threads, "tqdm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        map_in_threads(work, range(1000), 1, "checking")
    assert len(begun) < 1000
