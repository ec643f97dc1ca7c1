"""Checkpoint -> what answers fastest on this CPU, from one process and in less than a minute."""

import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from efficientnet.errors import PipelineError
from efficientnet.formats.artifact import read_artifact
from efficientnet.machine.atomic import point_link
from efficientnet.measuring.clock import Call, measure_turn
from efficientnet.measuring.inputs import rotate
from efficientnet.measuring.turns import take_turns
from efficientnet.precision import Precision
from efficientnet.runtimes import Runtime, open_runtime
from efficientnet.runtimes.openvino_runtime import own_precision
from export.builders.onnxruntime_builder import write_onnxruntime
from export.builders.openvino_builder import write_openvino
from export.inputs.config import ExportConfig, OpenVinoConfig, OrtConfig
from export.inputs.rebuild import rebuild_command
from export.inputs.reference import Reference, load_reference
from export.inputs.study_config import QuickConfig
from export.studies.export_table import DEFAULT_LINK, Line, choose_default, line_of, table_of

# Half of what an export takes by itself: what it adds in accuracy is not worth ten seconds here.
NUM_CALIBRATION_IMAGES = 128

SECONDS = 0.5
TURNS = 4
# ONNX Runtime's threads go on waiting for work for a while after a call.
PAUSE_S = 0.05

log = logging.getLogger(__name__)


def main(config: QuickConfig) -> Path:
    """Make the artifacts, time them, and return the fastest, to which `default` points."""
    settings = ExportConfig(checkpoint=config.checkpoint, data=config.data)
    reference = load_reference(settings)
    folder = Path("artifacts") / reference.variant
    lines = with_latency([export(reference, each, folder) for each in chosen_exports()], reference)
    default, _ = choose_default(lines)
    if default is None:
        raise PipelineError("not one artifact could be made: see the reasons above")
    point_link(folder / DEFAULT_LINK, Path(Path(default).name))
    table = table_of(lines, default)
    log.info("%s", "\n".join((table.aligned_text(), *table.notes)))
    return folder / DEFAULT_LINK


def chosen_exports() -> list[OrtConfig | OpenVinoConfig]:
    """Return what this processor has kernels for."""
    of_openvino: list[Precision] = ["fp32", own_precision(), "int8"]
    return [
        *(OrtConfig(precision=precision) for precision in ("fp32", "int8")),
        *(OpenVinoConfig(precision=precision) for precision in dict.fromkeys(of_openvino)),
    ]


def export(reference: Reference, config: OrtConfig | OpenVinoConfig, folder: Path) -> Line:
    """Write one artifact, or say why there is none."""
    is_onnx = isinstance(config, OrtConfig)
    name = "onnxruntime" if is_onnx else "openvino"
    output = folder / f"{name}-{config.precision}"
    log.info("%s %s", name, config.precision)
    try:
        config = replace(
            config,
            output=output,
            keeps_blocks=False,
            num_calibration_images=NUM_CALIBRATION_IMAGES,
        )
        if isinstance(config, OrtConfig):
            rebuild = rebuild_command("export/ort.py", config, reference.checkpoint)
            write_onnxruntime(reference, config, rebuild=rebuild)
        else:
            rebuild = rebuild_command("export/ov.py", config, reference.checkpoint)
            write_openvino(reference, config, rebuild=rebuild)
    except PipelineError as error:
        log.info("left out: %s", error)
        return Line(name=name, precision=config.precision, artifact=None, left_out=str(error))
    return line_of(name, output, read_artifact(output))


def with_latency(lines: Sequence[Line], reference: Reference) -> list[Line]:
    """Time a call of one image in turns, all programs in this process."""
    made = [line for line in lines if line.artifact is not None]
    runtimes = [open_runtime(str(line.artifact)) for line in made]
    calls = [_call_of(runtime, reference) for runtime in runtimes]

    def turn(number: int, _: int) -> float:
        turn = measure_turn(calls[number], time.perf_counter_ns, SECONDS / TURNS)
        time.sleep(PAUSE_S)
        return turn.median_ms

    # The first turn does not count.
    medians = take_turns(range(len(calls)), TURNS + 1, turn)
    found = iter(statistics.median(own[1:]) for own in medians.values())
    return [
        line.model_copy(update={"p50_ms": next(found)}) if line.artifact else line for line in lines
    ]


def _call_of(runtime: Runtime, reference: Reference) -> Call:
    batches = rotate(reference.parity_images, 1)
    return lambda: runtime.infer(next(batches))
