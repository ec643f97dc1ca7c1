"""A checkpoint -> the artifacts that the stock tools make of it by their front doors."""

import copy
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import onnx
import openvino as ov
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from efficientnet.formats.artifact import QuantizationRecord
from efficientnet.precision import Precision
from efficientnet.runtimes.openvino_runtime import openvino_core, own_precision
from export.builders.openvino_builder import PROGRAM_FILE, WEIGHTS_FILE, save
from export.builders.writing import Builder, Built, write_checked_artifact
from export.graphs.calibration import choose_samples, images_of, write_calibration
from export.graphs.folding import (
    INPUT_NAME,
    OUTPUT_NAME,
    count_weight_bytes,
    use_convolutions_in_squeeze_excite,
)
from export.inputs.config import ExportConfig
from export.inputs.reference import Reference

log = logging.getLogger(__name__)


def make_stock_artifacts(reference: Reference, config: ExportConfig, folder: Path) -> list[Path]:
    """Write the stock tools' artifacts; their parity is recorded, but refuses none of them."""
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "plain.onnx"
        export_plainly(reference, plain)
        samples = choose_samples(reference, config)
        images = [
            image
            for batch in images_of(reference, samples)
            for image in np.split(batch, len(batch))
        ]
        float_precision = own_precision()

        def record(directory: Path, method: str) -> QuantizationRecord:
            return QuantizationRecord(
                method=method,
                num_calibration_images=len(samples),
                calibration_sha256=write_calibration(directory, samples, config, method),
                kept_precision=float_precision,
                kept_blocks=(),
            )

        def onnxruntime_fp32(directory: Path, _: tuple[str, ...]) -> Built:
            (directory / "model.onnx").write_bytes(plain.read_bytes())
            return Built("model.onnx", count_weight_bytes(onnx.load(plain)))

        def onnxruntime_int8(directory: Path, _: tuple[str, ...]) -> Built:
            prepared = Path(scratch) / "prepared.onnx"
            quant_pre_process(str(plain), str(prepared))
            quantize_static(
                str(prepared),
                str(directory / "model.onnx"),
                _Reader(images),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            weight_bytes = count_weight_bytes(onnx.load(directory / "model.onnx"))
            quantization = record(directory, "onnxruntime quantize_static, U8S8, per channel")
            return Built("model.onnx", weight_bytes, quantization=quantization)

        def openvino_float(directory: Path, _: tuple[str, ...]) -> Built:
            return _save(openvino_core().read_model(plain), directory, config, float_precision)

        def openvino_int8(directory: Path, _: tuple[str, ...]) -> Built:
            dataset = nncf.Dataset([{INPUT_NAME: image} for image in images])
            model: Any = nncf.quantize(
                openvino_core().read_model(plain),
                dataset,
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(images),
            )
            quantization = record(directory, "nncf.quantize, mixed")
            return _save(model, directory, config, "int8", quantization)

        tools: list[tuple[str, str, Builder]] = [
            ("onnxruntime", "fp32", onnxruntime_fp32),
            ("onnxruntime", "int8", onnxruntime_int8),
            ("openvino", float_precision, openvino_float),
            ("openvino", "int8", openvino_int8),
        ]
        made: list[Path] = []
        for runtime, precision, build in tools:
            log.info("stock %s %s", runtime, precision)
            own: ExportConfig = replace(config, precision=precision)
            output = folder / f"stock-{runtime}-{precision}"
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
    use_convolutions_in_squeeze_excite(model)
    torch.onnx.export(
        model,
        (torch.zeros(2, 3, reference.image_size, reference.image_size),),
        path,
        dynamo=True,
        input_names=[INPUT_NAME],
        output_names=[OUTPUT_NAME],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        verbose=False,
    )


class _Reader(CalibrationDataReader):
    def __init__(self, images: Sequence[NDArray[np.float32]]) -> None:
        self._images: Iterator[NDArray[np.float32]] = iter(images)

    def get_next(self) -> Any:
        image = next(self._images, None)
        return None if image is None else {INPUT_NAME: image}


def _save(
    model: ov.Model,
    directory: Path,
    config: ExportConfig,
    precision: Precision,
    quantization: QuantizationRecord | None = None,
) -> Built:
    save(model, directory, precision)
    return Built(
        PROGRAM_FILE,
        (directory / WEIGHTS_FILE).stat().st_size,
        other_files=(WEIGHTS_FILE,),
        static_batches=config.static_batches,
        quantization=quantization,
    )
