"""An order -> what its job measures, appended to the records as it comes: a process of its own.

`python -m perf.device_parts.job_process ORDER SECONDS` takes an Order as JSON.
"""

import json
import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from efficientnet.machine.children import obey_parent
from perf.device_parts import commands
from perf.device_parts.exports import measure_exports
from perf.device_parts.gpu_watch import GpuWatch, watch_gpu
from perf.device_parts.jobs import OUT_OF_TIME
from perf.device_parts.limits import measure_limits
from perf.device_parts.network_case import build_scene
from perf.device_parts.networks import measure_compiled, measure_network
from perf.device_parts.order import Order
from perf.device_parts.records import Line, PytestMeasured, append, read
from perf.device_parts.turns import Bench


def main(order: Order, seconds: float) -> int:
    """Do one job; return the exit code."""
    output = Path(order.output)
    with watch_gpu() as watch:
        for line in _measure(order, seconds, watch):
            append(output, line)
            if isinstance(line, PytestMeasured) and not line.is_complete:
                return OUT_OF_TIME
    return 0


def _measure(order: Order, seconds: float, watch: GpuWatch) -> Iterator[Line]:
    if order.part == "tests":
        return iter([commands.run_tests(order, seconds)])
    if order.part == "training":
        return commands.measure_training(order)
    if order.part == "loader":
        return commands.measure_loading(order)
    if order.part == "limits":
        return measure_limits(order, watch)
    scene = build_scene(order.variant, torch.device(order.scale.device))
    bench = Bench(order, scene, watch, read(Path(order.output)))
    measures = {"network": measure_network, "compile": measure_compiled}
    return measures.get(order.part, measure_exports)(bench)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    obey_parent()
    # In a session of its own no signal of the command's reaches it; and those that it ignores would
    # be ignored by pytest and all that its tests start, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(main(Order(**json.loads(sys.argv[1])), float(sys.argv[2])))
