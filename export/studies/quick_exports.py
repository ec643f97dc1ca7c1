"""Checkpoint -> what answers fastest on this CPU, from one process and in about a minute."""

import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from efficientnet.errors import PipelineError
from efficientnet.formats.artifact import read_artifact
from efficientnet.machine.atomic import point_link
from efficientnet.measuring.clock import measure_turn
from efficientnet.measuring.inputs import rotate
from efficientnet.measuring.turns import take_turns
from efficientnet.precision import Precision
from efficientnet.runtimes import open_runtime
from efficientnet.runtimes.native_runtime import require_kernels
from efficientnet.runtimes.openvino_runtime import own_precision
from export.builders.native_builder import write_native
from export.builders.onnxruntime_builder import write_onnxruntime
from export.builders.openvino_builder import write_openvino
from export.inputs.config import (
    ExportConfig,
    NativeConfig,
    OpenVinoConfig,
    OrtConfig,
    rebuild_command,
)
from export.inputs.reference import Reference, load_reference
from export.inputs.study_config import QuickConfig
from export.studies import export_table
from export.studies.export_table import Line

# Half of what an export takes by itself: what it adds in accuracy is not worth ten seconds here.
NUM_CALIBRATION_IMAGES = 128

SECONDS = 0.5
TURNS = 4
# ONNX Runtime's threads go on waiting for work for a while after a call.
PAUSE_S = 0.05

# Its artifacts' first word, by what an export is set with.
NAMES = {OrtConfig: "onnxruntime", OpenVinoConfig: "openvino", NativeConfig: "native"}

log = logging.getLogger(__name__)


def main(config: QuickConfig) -> Path:
    """Make the artifacts, time them, and return the fastest, to which `default` points."""
    reference = load_reference(ExportConfig(checkpoint=config.checkpoint, data=config.data))
    folder = Path("artifacts") / reference.variant
    of_openvino: list[Precision] = ["fp32", own_precision(), "int8"]
    lines = [
        *(export(reference, OrtConfig(precision=p), folder) for p in ("fp32", "int8")),
        *(
            export(reference, OpenVinoConfig(precision=p), folder)
            for p in dict.fromkeys(of_openvino)
        ),
        export(reference, NativeConfig(precision="int8"), folder),
    ]
    lines = with_latency(lines, reference)
    default, _ = export_table.choose_default(lines)
    if default is None:
        raise PipelineError("not one artifact could be made: see the reasons above")
    point_link(folder / export_table.DEFAULT_LINK, Path(Path(default).name))
    table = export_table.table_of(lines, default)
    log.info("%s", "\n".join((table.aligned_text(), *table.notes)))
    return folder / export_table.DEFAULT_LINK


def export(
    reference: Reference, config: OrtConfig | OpenVinoConfig | NativeConfig, folder: Path
) -> Line:
    """Write one artifact, or say why there is none."""
    name = NAMES[type(config)]
    log.info("%s %s", name, config.precision)
    config = replace(
        config,
        output=folder / f"{name}-{config.precision}",
        keeps_blocks=False,
        num_calibration_images=NUM_CALIBRATION_IMAGES,
    )
    try:
        if isinstance(config, OrtConfig):
            rebuild = rebuild_command("export/ort.py", config, reference.checkpoint)
            output = write_onnxruntime(reference, config, rebuild=rebuild)
        elif isinstance(config, OpenVinoConfig):
            rebuild = rebuild_command("export/ov.py", config, reference.checkpoint)
            output = write_openvino(reference, config, rebuild=rebuild)
        else:
            require_kernels("the artifact", config.reference)
            output = write_native(reference, config)
    except PipelineError as error:
        log.info("left out: %s", error)
        return Line(name=name, precision=config.precision, artifact=None, left_out=str(error))
    return export_table.line_of(name, output, read_artifact(output))


def with_latency(lines: Sequence[Line], reference: Reference) -> list[Line]:
    """Time a call of one image in turns, all programs in this process."""
    runtimes = [open_runtime(str(line.artifact)) for line in lines if line.can_run]
    batches = rotate(reference.parity_images, 1)

    def turn(number: int, _: int) -> float:
        infer = runtimes[number].infer
        turn = measure_turn(lambda: infer(next(batches)), time.perf_counter_ns, SECONDS / TURNS)
        time.sleep(PAUSE_S)
        return turn.median_ms

    # The first turn does not count.
    turns = take_turns(range(len(runtimes)), TURNS + 1, turn)
    return export_table.with_p50(lines, [statistics.median(own[1:]) for own in turns.values()])
