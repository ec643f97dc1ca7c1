"""A checkpoint -> the artifacts that the stock tools make of it by their front doors."""

import copy
import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import onnx
import openvino as ov
import torch
from onnxruntime import quantization as ort_quantization
from onnxruntime.quantization.shape_inference import quant_pre_process

from efficientnet.formats.artifact import ArtifactError, QuantizationRecord, read_manifest
from efficientnet.precision import Precision
from efficientnet.runtimes.openvino_runtime import openvino_core, own_precision
from export.builders import openvino_builder
from export.builders.writing import Builder, Built, write_checked_artifact
from export.checks.parity import require_made_of
from export.graphs import calibration, folding
from export.inputs.config import ExportConfig
from export.inputs.reference import Reference

log = logging.getLogger(__name__)


def find_stock_artifacts(reference: Reference, config: ExportConfig, folder: Path) -> list[Path]:
    """Return what make_stock_artifacts wrote earlier.

    Raises:
        ArtifactError: one is missing, of another checkpoint, or not for all batch sizes.
    """
    found: list[Path] = []
    for runtime, precision in tools():
        path = folder_of(folder, runtime, precision)
        manifest = read_manifest(path)
        require_made_of(reference, path, manifest)
        # ONNX Runtime takes any size up to the largest.
        prepared = manifest.static_batches or range(1, manifest.input.batch.max + 1)
        missing = [size for size in config.static_batches if size not in prepared]
        if missing:
            raise ArtifactError(
                f"{path} is not prepared for batches of {', '.join(map(str, missing))}: make the "
                "stock artifacts again, without --made"
            )
        found.append(path)
    return found


def tools() -> tuple[tuple[str, Precision], ...]:
    """Name the runtimes and precisions of the stock artifacts, in order."""
    return (
        ("onnxruntime", "fp32"),
        ("onnxruntime", "int8"),
        ("openvino", own_precision()),
        ("openvino", "int8"),
    )


def folder_of(folder: Path, runtime: str, precision: Precision) -> Path:
    """Name a stock artifact's directory."""
    return folder / f"stock-{runtime}-{precision}"


def make_stock_artifacts(reference: Reference, config: ExportConfig, folder: Path) -> list[Path]:
    """Write the stock tools' artifacts; their parity is recorded, but refuses none of them."""
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "plain.onnx"
        export_plainly(reference, plain)
        samples = calibration.choose_samples(reference, config)
        batches = calibration.images_of(reference, samples)
        images = [{folding.INPUT_NAME: image[None]} for batch in batches for image in batch]
        float_precision = own_precision()

        def record(directory: Path, method: str) -> QuantizationRecord:
            return calibration.record_calibration(
                directory, samples, config, method, float_precision
            )

        def built_onnx(file: Path, quantization: QuantizationRecord | None = None) -> Built:
            weight_bytes = folding.count_weight_bytes(onnx.load(file))
            return Built(file.name, weight_bytes, quantization=quantization)

        def built_openvino(
            model: ov.Model,
            directory: Path,
            precision: Precision,
            quantization: QuantizationRecord | None = None,
        ) -> Built:
            openvino_builder.save(model, directory, precision)
            weights = openvino_builder.WEIGHTS_FILE
            return Built(
                openvino_builder.PROGRAM_FILE,
                (directory / weights).stat().st_size,
                other_files=(weights,),
                static_batches=config.static_batches,
                quantization=quantization,
            )

        def onnxruntime_fp32(directory: Path, _: tuple[str, ...]) -> Built:
            (directory / "model.onnx").write_bytes(plain.read_bytes())
            return built_onnx(directory / "model.onnx")

        def onnxruntime_int8(directory: Path, _: tuple[str, ...]) -> Built:
            prepared, file = Path(scratch) / "prepared.onnx", directory / "model.onnx"
            quant_pre_process(str(plain), str(prepared))
            ort_quantization.quantize_static(
                str(prepared),
                str(file),
                _Reader(images),
                quant_format=ort_quantization.QuantFormat.QDQ,
                per_channel=True,
                activation_type=ort_quantization.QuantType.QUInt8,
                weight_type=ort_quantization.QuantType.QInt8,
            )
            method = "onnxruntime quantize_static, U8S8, per channel"
            return built_onnx(file, record(directory, method))

        def openvino_float(directory: Path, _: tuple[str, ...]) -> Built:
            return built_openvino(openvino_core().read_model(plain), directory, float_precision)

        def openvino_int8(directory: Path, _: tuple[str, ...]) -> Built:
            model: Any = nncf.quantize(
                openvino_core().read_model(plain),
                nncf.Dataset(images),
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(images),
            )
            quantization = record(directory, "nncf.quantize, mixed")
            return built_openvino(model, directory, "int8", quantization)

        builders: tuple[Builder, ...] = (
            onnxruntime_fp32,
            onnxruntime_int8,
            openvino_float,
            openvino_int8,
        )
        made: list[Path] = []
        for (runtime, precision), build in zip(tools(), builders, strict=True):
            log.info("stock %s %s", runtime, precision)
            own = replace(config, precision=precision)
            output = folder_of(folder, runtime, precision)
            made.append(
                write_checked_artifact(reference, own, output, runtime, build, is_judged=False)
            )
        return made


def export_plainly(reference: Reference, path: Path) -> None:
    """Write what torch.onnx.export makes of the model, with a free batch and no other change.

    Squeeze-excite has the form in which timm and torchvision publish it, 1x1 convolutions: of
    the matrix products of model.py NNCF makes no program (an axis that the map has not).
    """
    model = copy.deepcopy(reference.model)
    folding.use_convolutions_in_squeeze_excite(model)
    torch.onnx.export(
        model,
        (torch.zeros(2, 3, reference.image_size, reference.image_size),),
        path,
        dynamo=True,
        input_names=[folding.INPUT_NAME],
        output_names=[folding.OUTPUT_NAME],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        verbose=False,
    )


class _Reader(ort_quantization.CalibrationDataReader):
    def __init__(self, images: list[dict[str, np.ndarray]]) -> None:
        self._images = iter(images)

    def get_next(self) -> Any:
        return next(self._images, None)
