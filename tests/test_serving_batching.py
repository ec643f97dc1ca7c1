import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from facts import raises_naming
from processes import wait_until

from serving.batching import CALLS_AHEAD, Batcher, Images
from serving.stages import StageTimes
from serving.work import AbandonedError

# For what must not be waited for: a test would take as long.
FOR_EVER_S = 600.0


class Network:
    """Gives each image's first value, and holds its calls until it is let go."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def infer(self, images: Images) -> Images:
        self.sizes.append(len(images))
        assert self.may_go_on.wait(30)
        if (images < 0).any():
            raise ValueError("a negative image")
        return images[:, :1].copy()


def image(*values: float) -> Images:
    return np.asarray(values, np.float32).reshape(-1, 1)


def submit(batcher: Batcher, *values: float, is_wanted: Callable[[], bool] = lambda: True):
    return batcher.submit(image(*values), is_wanted, StageTimes())


@contextmanager
def batcher_of(network: Network, max_images: int = 4, max_wait_s: float = 0) -> Iterator[Batcher]:
    batcher = Batcher(network.infer, network.infer, max_images, max_wait_s)
    try:
        yield batcher
    finally:
        network.may_go_on.set()
        batcher.close()


def held(network: Network, batcher: Batcher):
    """Make the network busy with one image."""
    network.may_go_on.clear()
    first = submit(batcher, 0)
    assert wait_until(lambda: network.sizes == [1])
    return first


def test_what_comes_while_the_network_is_busy_goes_into_one_call():
    network = Network()
    with batcher_of(network) as batcher:
        first = held(network, batcher)
        others = [submit(batcher, value) for value in (1, 2, 3, 4, 5, 6)]
        network.may_go_on.set()
        assert [float(f.result(30)[0, 0]) for f in (first, *others)] == [0, 1, 2, 3, 4, 5, 6]
        assert network.sizes == [1, 4, 2]


def test_a_single_client_does_not_wait():
    network = Network()
    with batcher_of(network, max_wait_s=FOR_EVER_S) as batcher:
        for value in range(3):
            assert submit(batcher, value).result(30)[0, 0] == value
        with batcher.coming():  # its own picture, which is prepared before it is handed over
            pass
        assert submit(batcher, 7).result(30)[0, 0] == 7


def test_an_image_waits_for_one_that_is_being_prepared():
    network = Network()
    with batcher_of(network, max_wait_s=FOR_EVER_S) as batcher:
        with batcher.coming():
            first = submit(batcher, 1)
            second = submit(batcher, 2)
            assert not first.done() and network.sizes == []
        assert [f.result(30)[0, 0] for f in (first, second)] == [1, 2]
        assert network.sizes == [2]


@pytest.mark.parametrize("is_short", [True, False])
def test_beside_pictures_that_are_decoded_threads_share_a_lone_image_of_a_long_call_only(
    is_short: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("serving.batching.SHORT_CALL_S", 60.0 if is_short else 0.0)
    alone, beside = Network(), Network()
    batcher = Batcher(alone.infer, beside.infer, 4, 0.0)
    batcher.warm_up((1,))
    alone.sizes.clear()
    beside.sizes.clear()
    for values in ((1,), (1, 2)):
        submit(batcher, *values).result(30)
        with batcher.coming():
            submit(batcher, *values).result(30)
    batcher.close()
    assert alone.sizes == ([1, 2] if is_short else [1, 1, 2])
    assert beside.sizes == ([1, 2] if is_short else [2])


def test_an_image_does_not_wait_longer_than_the_limit_nor_when_a_call_is_full():
    network = Network()
    with batcher_of(network, max_wait_s=0.01) as batcher, batcher.coming():
        assert submit(batcher, 1).result(30)[0, 0] == 1
    network = Network()
    with batcher_of(network, 2, FOR_EVER_S) as batcher, batcher.coming():
        both = [submit(batcher, value) for value in (1, 2)]
        assert [f.result(30)[0, 0] for f in both] == [1, 2]


def test_many_images_are_divided_and_come_back_in_order():
    network = Network()
    with batcher_of(network, max_images=2) as batcher:
        logits = submit(batcher, 1, 2, 3, 4, 5).result(30)
        assert logits.ravel().tolist() == [1, 2, 3, 4, 5]
        assert max(network.sizes) <= 2 and sum(network.sizes) == 5


def test_one_image_that_fails_harms_no_other_of_its_call():
    network = Network()
    with batcher_of(network) as batcher:
        first = held(network, batcher)
        good, bad, also_good = (submit(batcher, value) for value in (1, -1, 2))
        network.may_go_on.set()
        assert [f.result(30)[0, 0] for f in (first, good, also_good)] == [0, 1, 2]
        with raises_naming(ValueError, "negative"):
            bad.result(30)
        assert network.sizes == [1, 3, 1, 1, 1]


def test_an_image_that_nobody_wants_any_more_takes_no_place_in_a_call():
    network = Network()
    with batcher_of(network) as batcher:
        first = held(network, batcher)
        gone = [submit(batcher, 9, is_wanted=lambda: False) for _ in range(4)]
        wanted = submit(batcher, 1)
        network.may_go_on.set()
        assert [f.result(30)[0, 0] for f in (first, wanted)] == [0, 1]
        for future in gone:
            with pytest.raises(AbandonedError):
                future.result(30)
        assert network.sizes == [1, 1]


def test_more_images_than_fit_into_the_next_calls_wait_outside():
    network = Network()
    with batcher_of(network, max_images=1) as batcher, ThreadPoolExecutor(5) as pool:
        held(network, batcher)
        handed_over = [pool.submit(submit, batcher, value) for value in range(5)]
        assert wait_until(lambda: sum(f.done() for f in handed_over) == CALLS_AHEAD)
        network.may_go_on.set()
        assert sorted(float(f.result(30).result(30)[0, 0]) for f in handed_over) == [0, 1, 2, 3, 4]


def test_a_call_that_takes_too_long_is_told():
    network = Network()
    with batcher_of(network) as batcher:
        assert not batcher.is_stuck(0)
        held(network, batcher)
        assert wait_until(lambda: batcher.is_stuck(0.01))
        assert not batcher.is_stuck(FOR_EVER_S)


def test_every_size_is_called_before_the_service_is_ready():
    network = Network()
    with batcher_of(network, max_images=3) as batcher:
        batcher.warm_up((1,))
        assert network.sizes == [1, 2, 3, 1]  # the last as beside other work


def test_what_waits_at_the_end_is_told():
    network = Network()
    with batcher_of(network) as batcher:
        first = held(network, batcher)
        waiting = submit(batcher, 1)
        batcher.close()
        network.may_go_on.set()
        assert first.result(30)[0, 0] == 0
        with pytest.raises(AbandonedError):
            waiting.result(30)
        with pytest.raises(AbandonedError):
            submit(batcher, 2).result(30)


def test_pixels_and_floats_that_wait_together_go_into_calls_of_their_own():
    network = Network()
    with batcher_of(network) as batcher:
        first = held(network, batcher)
        others = [submit(batcher, 1)]
        for value in (2, 3):
            pixels = np.full((1, 1), value, np.uint8)
            others.append(batcher.submit(pixels, lambda: True, StageTimes()))
        others.append(submit(batcher, 4))
        network.may_go_on.set()
        assert [float(f.result(30)[0, 0]) for f in (first, *others)] == [0, 1, 2, 3, 4]
        assert network.sizes == [1, 1, 2, 1]
