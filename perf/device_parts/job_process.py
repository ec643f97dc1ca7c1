"""An order -> what its job measures, appended to the records as it comes: a process of its own."""

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from efficientnet.machine.children import obey_parent
from perf.device_parts.commands import measure_loading, measure_training, run_tests
from perf.device_parts.exports import measure_exports
from perf.device_parts.gpu_watch import GpuWatch, watch_gpu
from perf.device_parts.limits import measure_limits
from perf.device_parts.network_case import build_scene
from perf.device_parts.networks import measure_compiled, measure_network
from perf.device_parts.plan import Order
from perf.device_parts.records import Line, PytestMeasured, append, read
from perf.device_parts.runner import OUT_OF_TIME, SECONDS_VARIABLE


def main(order: Order) -> int:
    """Do one job; return the exit code."""
    output = Path(order.output)
    with watch_gpu() as watch:
        for line in _measure(order, watch):
            append(output, line)
            if isinstance(line, PytestMeasured) and not line.is_complete:
                return OUT_OF_TIME
    return 0


def _measure(order: Order, watch: GpuWatch) -> Iterator[Line]:
    if order.part == "tests":
        return iter([run_tests(order)])
    if order.part == "training":
        return measure_training(order)
    if order.part == "loader":
        return measure_loading(order)
    if order.part == "limits":
        return measure_limits(order, watch)
    scene = build_scene(order.variant, torch.device("cpu" if order.is_dry_run else "cuda"))
    if order.part == "network":
        return measure_network(order, scene, watch)
    earlier = read(Path(order.output))
    if order.part == "compile":
        return measure_compiled(order, scene, watch, earlier)
    return measure_exports(order, scene, watch, earlier)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    obey_parent()
    # In a session of its own no signal of the command's reaches it; and those that it ignores would
    # be ignored by pytest and all that its tests start, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    seconds = float(os.environ.get(SECONDS_VARIABLE, "600"))
    sys.exit(main(replace(Order(**json.loads(sys.argv[1])), seconds=seconds)))
