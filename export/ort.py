"""Checkpoint -> ONNX Runtime artifact, float32, checked against the eager model.

python export/ort.py
python export/ort.py --checkpoint runs/v2-s-20261122T101500Z/checkpoint --max-batch-size 128
"""

import logging
import time
from pathlib import Path

import onnx
import torch

from efficientnet.artifact import (
    ArtifactManifest,
    BatchRange,
    BuildRecord,
    InputSpec,
    OutputSpec,
    new_artifact_directory,
    write_manifest,
)
from efficientnet.atomic import sha256_of_file
from efficientnet.checkpoint import load_checkpoint, newest_checkpoint
from efficientnet.command import parse_flags, run_command
from efficientnet.cost import network_cost
from efficientnet.datasets import load_held_out
from efficientnet.environment import current_environment, num_usable_cores
from efficientnet.runtimes.onnx_runtime import OnnxRuntime
from efficientnet.runtimes.protocol import ProgramInfo
from efficientnet.variants import get_variant
from export.config import ExportConfig
from export.graph import INPUT_NAME, OPSET, OUTPUT_NAME, count_ops, count_weight_bytes, export_onnx
from export.parity import FP32_TOLERANCES, choose_images, measure_parity

PROGRAM_FILE = "model.onnx"

log = logging.getLogger(__name__)


def main(config: ExportConfig) -> Path:
    """Export, check and write the artifact; return its directory.

    Raises:
        CheckpointError: no whole checkpoint.
        GraphError: the exported graph has not the form it must have.
        ParityError: the artifact does not answer like the eager model; nothing is written.
    """
    checkpoint = config.checkpoint or newest_checkpoint()
    log.info(
        "checkpoint %s%s", checkpoint, "" if config.checkpoint else " (of the newest complete run)"
    )
    model, record = load_checkpoint(checkpoint)
    dataset = load_held_out(record.data, config.data, record.class_names)
    images = choose_images(dataset.val, config.num_parity_images, record.preprocess)
    output = config.output or Path("artifacts") / record.variant / "onnxruntime-fp32"
    size = record.preprocess.image_size

    cost = network_cost(get_variant(record.variant), size, num_classes=record.num_classes)
    started = time.perf_counter()
    log.info("export %s at %d px to ONNX, opset %d", record.variant, size, OPSET)
    graph = export_onnx(model, size)
    build_log = [
        f"exported by torch {torch.__version__}, onnx {onnx.__version__}, opset {OPSET}",
        "graph: " + ", ".join(f"{op} {n}" for op, n in count_ops(graph).most_common()),
    ]
    log.info("%s", build_log[-1])

    with new_artifact_directory(output) as directory:
        program = directory / PROGRAM_FILE
        onnx.save(graph, program)
        info = ProgramInfo(
            program_sha256=sha256_of_file(program),
            variant=record.variant,
            runtime="onnxruntime",
            precision="fp32",
            preprocess=record.preprocess,
            class_names=record.class_names,
            data=record.data,
            max_batch_size=config.max_batch_size,
            flops_per_image=cost.flops,
            weight_bytes=count_weight_bytes(graph),
        )
        runtime = OnnxRuntime(program, info, num_usable_cores())
        parity = measure_parity(model, runtime, images, FP32_TOLERANCES)
        build_log.append(
            f"parity on {parity.num_images} held-out images: "
            f"largest logit error {parity.max_abs_logit_error:.1e} "
            f"(at most {parity.tolerances.max_abs_logit_error:.0e}), "
            f"top-1 agreement {parity.top1_agreement:.1%}"
        )
        log.info("%s", build_log[-1])
        (directory / "build.log").write_text("\n".join(build_log) + "\n")
        write_manifest(
            directory,
            ArtifactManifest(
                variant=info.variant,
                runtime=info.runtime,
                precision="fp32",
                program_file=PROGRAM_FILE,
                program_sha256=info.program_sha256,
                checkpoint_sha256=record.weights_sha256,
                input=InputSpec(
                    name=INPUT_NAME,
                    dtype="float32",
                    layout="NCHW",
                    shape=(3, size, size),
                    batch=BatchRange(min=1, opt=1, max=config.max_batch_size),
                ),
                output=OutputSpec(name=OUTPUT_NAME, dtype="float32", shape=(record.num_classes,)),
                preprocess=info.preprocess,
                class_names=info.class_names,
                data=info.data,
                build=BuildRecord(
                    environment=current_environment(),
                    opset=OPSET,
                    target_device="cpu",
                    compute_capability=None,
                    seconds=time.perf_counter() - started,
                ),
                parity=parity,
                size_bytes=program.stat().st_size,
                flops_per_image=info.flops_per_image,
                weight_bytes=info.weight_bytes,
            ),
        )
    return output


if __name__ == "__main__":
    run_command(lambda: parse_flags(ExportConfig, __doc__), main)
