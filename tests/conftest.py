"""How pytest runs the tests; what they start from is in common_fixtures.py."""

import gc
import os
import signal

import pytest

from efficientnet.machine.environment import num_usable_cores

# Tests run side by side, in more processes than cores: more threads would only wait for each other.
# Commands that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Give `-n auto` a worker more than cores, as a third of the time tests wait.

    Of one tree on two cores: 7:31 minutes with two workers, 6:14 with three, 6:18 with four.
    """
    if config.option.numprocesses != "auto" or "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    return num_usable_cores() + 1


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from all tests but those of `pytest -m gpu`, and let Ctrl-C be heard."""
    # A core for each worker, and what it starts: threads of two of them would wait for each other.
    if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # A shell's job in the background ignores Ctrl-C, and so would the commands that tests start.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # The process that hands tests out to workers runs none, and would load torch before they begin.
    if config.getoption("dist") == "no":
        # What is loaded stays: to search it for garbage, again and again, would take seconds.
        gc.disable()
        config.pluginmanager.import_plugin("common_fixtures")


# With --dist loadfile a file is one worker's: one that takes long and begins last leaves the others
# without work.
LONG_FILES = (
    "test_training_distributed.py",
    "test_training_resume.py",
    "test_perf_drills.py",
    "test_serving_page.py",
    "test_serving_workers.py",
    "test_serving_service.py",
    "test_pipeline.py",
    "test_training_loop.py",
    "test_training_ablation.py",
    "test_serving_decoders.py",
    "test_serving_bulk.py",
    "test_export_matrix.py",
    "test_export_search.py",
    "test_export_aoti.py",
    "test_weights.py",
    "test_perf_latency.py",
    "test_perf_load.py",
    "test_perf_device.py",
    "test_training_search.py",
    "test_perf_regression.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files."""
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish() -> None:
    """Search for garbage from here on, but not among what is loaded."""
    gc.freeze()
    gc.enable()
