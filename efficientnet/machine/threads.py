"""Work on many items in threads, with a bar."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_threads(
    work: Callable[[Item], Result], items: Sequence[Item], num_threads: int, title: str
) -> list[Result]:
    """Return the work's results in the order of the items; its first exception ends it."""
    pool = ThreadPoolExecutor(num_threads)
    try:
        done = pool.map(work, items)
        return list(tqdm(done, title, len(items), disable=None, leave=False))
    finally:
        # After Ctrl-C what has not begun never does; a `with` would wait for all of it.
        pool.shutdown(cancel_futures=True)
